"""Records that a stranger forged, through every command that reads records: no code, no file and no host is theirs to choose.

A canary is a file that forged code writes, a module that it brings along, and a listening socket that stands for every host: hub, package
index, tracker. The keys of the forgeries are right: they are hashes that anybody can compute.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.trust import Distrusted, configuration
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, dump, parse, write
from slimbench.leaderboard.exchange import parquet
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT, SMALL_CACHES

MODULE = "forged_canary"
WORDS = (
    *(
        "model=custom",
        "model.name=tiny",
        "model.source=random",
        "method=rtn-4bit",
        "settings.group_size=32",
        "device=cpu",
        "stages=[speed]",
    ),
    "+model.shape={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 4}",
)
ESCAPE = "\x1b]0;owned\x07\x1b[2J[/INST]=cmd()"


@dataclass(frozen=True)
class Trap:
    """Where forged code would show: a folder for it, the file that it would write, the socket that it would call.

    Attributes:
        checkpoint: A model and tokenizer without code.
    """

    folder: Path
    canary: Path
    listener: socket.socket
    checkpoint: Path

    @property
    def code(self) -> str:
        port = self.listener.getsockname()[1]
        return (
            f"import pathlib, socket\npathlib.Path({str(self.canary)!r}).write_text('ran')\n"
            f"socket.create_connection(('127.0.0.1', {port}), 5).close()\n"
            "def load(*a, **k):\n    raise SystemExit\n\nclass Method:\n    pass\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """Forged modules can be imported, and each host that a library knows by a variable is the socket."""
        host = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        hosts = dict.fromkeys(("HF_ENDPOINT", "PIP_INDEX_URL", "WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), host)
        path = os.pathsep.join(map(str, (SMALL_CACHES, ROOT / "src", ROOT, self.folder)))
        own = {"PYTHONPATH": path, "SLIMBENCH_CACHE": str(self.folder / "cache"), "HF_HOME": str(self.folder / "hub"), "COLUMNS": "200"}
        return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLIMBENCH_"))} | hosts | own

    def assert_untouched(self, after: object = "") -> None:
        assert not self.canary.exists(), f"forged code ran {after}"
        self.listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection, _ = self.listener.accept()
            connection.settimeout(1)
            pytest.fail(f"a forged record had a host called {after}: {connection.recv(300)!r}")


@pytest.fixture
def trap(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # while records are forged
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Trap(tmp_path / "forged", tmp_path / "canary", listener, tiny)
        made.folder.mkdir()
        (made.folder / f"{MODULE}.py").write_text(made.code)
        yield made


@pytest.fixture(scope="module")
def honest() -> Cell:
    """A cell of random weights and shipped parts: nothing of it needs the network."""
    return make_cell(resolve(WORDS), WORDS)


def forge(cell: Cell, config: dict[str, Any], model: str) -> list[Record]:
    """Records of good numbers for a cell, with a forged configuration and the keys of that, where it has any."""
    keys = cell.identity.keys
    with contextlib.suppress(Distrusted, ConfigError, ValueError):
        keys = make_cell(configuration(config, trusted=True)).identity.keys
    made = []
    for record in records(Spec(cell.identity.pipeline, "quantization", loss=1.1, bits=4.25)):
        identity = cell.identity.model_copy(update={"model": model, "keys": keys})
        changes = {"cell": identity, "key": identity.keys.of(record.stage), "config": config, "command": cell.command}
        made.append(record.model_copy(update=changes | {"hardware": cell.hardware(record.stage), "foreign": False}))
    return made


def changed(config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    forged = copy.deepcopy(config)
    for name, value in sections.items():
        forged[name] = forged[name] | value if isinstance(value, dict) else value
    return forged


def remote_model(trap: Trap) -> Path:
    """A checkpoint that brings code along."""
    folder = trap.folder / "model"
    if not folder.exists():
        shutil.copytree(trap.checkpoint, folder)
        classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
        for file in (folder / "config.json", folder / "tokenizer_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": classes}))
        (folder / "code.py").write_text(trap.code)
    return folder


def task_folder(trap: Trap) -> Path:
    folder = trap.folder / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text("task: forged\ndoc_to_text: !function code.load\n")
    (folder / "code.py").write_text(trap.code)
    return folder


def forgeries(cell: Cell, trap: Trap) -> dict[str, dict[str, Any]]:
    """Configurations that would run code, read files or call hosts, by what they do it with."""
    own, step = cell.recorded_config(), {"name": "rtn-4bit", "method": "rtn", "version": 1, "settings": {}}
    target = {"target": f"{MODULE}.Method", "_target_": f"{MODULE}.Method"}
    return {
        "local-code": changed(own, model={"source": f"file:{remote_model(trap)}", "trust_remote_code": True, "shape": None}),
        "remote-code": changed(own, model={"source": "hf:forged/model", "trust_remote_code": True, "shape": None}),
        "hub-model": changed(own, model={"source": "hf:forged/model", "shape": None}),
        "hub-text": changed(own, suite={"corpus": ["hf:forged/text:default:test:text"]}, stages=["quality"]),
        "tasks": changed(
            own,
            model={"source": f"file:{trap.checkpoint}", "shape": None},
            suite={"include_path": [str(task_folder(trap))], "tasks": ["forged"]},
            stages=["quality"],
        ),
        "file": changed(own, suite={"corpus": ["file:/etc/passwd"]}, calibration={"source": "file:/etc/passwd"}),
        "method": changed(own, pipeline=[step | target], reference={"name": "dense", "settings": {}} | target),
        "method-name": changed(own, pipeline=[{"name": f"{MODULE}.Method", "settings": {}} | target]),
        "engine": changed(
            own, engine=target | {"loaders": {"packed": f"{MODULE}.load", "huggingface": f"{MODULE}.load"}, "modules": [MODULE]}
        ),
        "engine-name": changed(own, engine=target | {"name": f"{MODULE}.Method"}),
        "kernels": changed(own, model={"shape": {"model_type": "llama", "attn_implementation": "forged/kernel"}}),
        "tracker": changed(own, tracking="wandb", results=str(trap.folder / "elsewhere")),
    }


@pytest.fixture
def results(honest: Cell, trap: Trap, tmp_path: Path) -> Path:
    """A results folder of one's own with good records, every forgery, a foreign key under another name, and names full of escapes."""
    store = Store(tmp_path / "runs")
    for record in forge(honest, honest.recorded_config(), honest.identity.model):
        store.put(record)
    for name, config in forgeries(honest, trap).items():
        for record in forge(honest, config, f"forged-{name}"):
            keys = record.cell.keys.model_copy(update={record.stage.value: record.key})
            record.cell = record.cell.model_copy(update={"keys": keys})
            write(store.path(record.cell, record.stage, record.hardware), record)
    for record in forge(honest, honest.recorded_config(), "zzz"):
        late = record.model_copy(update={"started": "2999-01-01T00:00:00+00:00"})
        write(store.path(late.cell, late.stage, late.hardware), late)
    for record in records(Spec(ESCAPE, ESCAPE, model=ESCAPE, engine=ESCAPE)):
        believed = parse(dump(record))
        assert isinstance(believed, Record)
        write(store.path(believed.cell, believed.stage, believed.hardware), record)
    return store.root


def commands(results: Path, tmp_path: Path) -> list[list[str]]:
    """Every command that reads records. `wandb log` writes offline."""
    at = ["--results", str(results)]
    out = str(tmp_path / "out")
    return [
        ["audit", *at, "--sample", "100", "--stage", "compress"],
        ["compare", "rtn-4bit(group_size=32)", ESCAPE, *at],
        ["recommend", "--model", "tiny", *at],
        ["recommend", "--model", "zzz", *at],
        ["board", "table", *at],
        ["board", "table", *at, "--format", "csv"],
        ["board", "build", *at, "--out", out, "--no-figures"],
        ["board", "figures", *at, "--out", out, "--only", "methods-bits"],
        ["methods", "list", *at],
        ["wandb", "log", *at, "--dir", out, "--mode", "offline"],
        ["records", "check", *at],
        ["records", "export", *at, "--to", str(tmp_path / "x.parquet")],
        ["records", "import", str(tmp_path / "forged.parquet"), "--results", str(tmp_path / "imported")],
        ["records", "migrate", *at],
        ["reproduce", "gptq", *at, "--plan"],
        ["sweep", "--plan", *WORDS, f"results={results}"],
    ]


def run(trap: Trap, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-P", "-m", "slimbench", *command]
    own_hosts = {"HF_HUB_OFFLINE": "1"} if command[0] == "reproduce" else {}  # a paper's models lie on the hub, whatever the records say
    return subprocess.run(started, env=trap.environment | own_hosts, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


IN_ONE_PROCESS = """
import contextlib, io, json, sys
from slimbench.harness.cli.main import main
commands = json.loads(sys.argv[1])
answers = []
for command in commands:
    sys.argv, said = ["slimbench", *command], (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            main()
        except SystemExit as end:
            answers.append([command, end.code, *(each.getvalue() for each in said)])
print()
print(json.dumps([answers, sorted(name for name in sys.modules if "forged" in name)]))"""
"""Commands one after the other: what each answers, and what all of them have imported in the end."""
PLANNED = """
import sys
from pathlib import Path
from slimbench.harness.run.audit import Repeat, draw, plan
from slimbench.harness.schema.identity import Stage
drawn = draw(Path(sys.argv[1]), 1000, 0, list(Stage))
planned = [plan(record) for record in drawn]
print(len(drawn), sum(isinstance(item, Repeat) for item in planned))
print(sorted(name for name in sys.modules if "forged" in name))"""
"""What an audit would repeat of all records, and what is imported for it."""


Done = subprocess.CompletedProcess


def answered(trap: Trap, commands: list[list[str]], cwd: Path) -> tuple[list[Done[str]], list[str]]:
    """The answers of commands in one process, after them what else it said on standard error, and the forged modules that it imported."""
    started = [sys.executable, "-P", "-c", IN_ONE_PROCESS, json.dumps(commands)]
    done = subprocess.run(started, env=trap.environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=True)
    *printed, last = done.stdout.splitlines()
    assert not any(printed), done
    answers, modules = json.loads(last)
    assert len(answers) == len(commands)
    return [*(Done(*answer) for answer in answers), Done(["all"], 0, "", done.stderr)], modules


def test_no_command_runs_reads_or_calls_what_a_record_names(trap: Trap, results: Path, tmp_path: Path) -> None:
    """What computes, or may ask the network for what no record names, in a process of its own; all others in one."""
    (tmp_path / "forged.parquet").write_bytes(parquet.of_records(Store(results).scan()[0]))
    before = {path: path.read_bytes() for path in Store(results).files()}
    own = [command for command in commands(results, tmp_path) if command[0] in ("wandb", "audit", "reproduce")]
    answers, modules = answered(trap, [command for command in commands(results, tmp_path) if command not in own], tmp_path)
    trap.assert_untouched()
    assert modules == []
    for command in own:
        done = run(trap, command, tmp_path)
        trap.assert_untouched((command, done))
        answers.append(Done(command, done.returncode, done.stdout, done.stderr))
    for done in answers:
        assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done
        for said in (done.stdout, done.stderr):
            assert "\x07" not in said and "\x1b" not in said and "\x9b" not in said, (done.args, said)
        assert "root:x:0" not in done.stdout + done.stderr
    assert {path: path.read_bytes() for path in Store(results).files()} == before, "and none changed a record"
    last = {" ".join(done.args[:2]): done for done in answers}
    audit = last["audit --results"]
    assert audit.returncode == 1 and audit.stdout.count(" refused ") >= 6, audit.stdout
    assert "tiny" in last["recommend --model"].stderr + last["board table"].stdout
    assert "zzz" not in last["recommend --model"].stdout


def test_no_forged_module_is_imported_where_an_audit_is_planned(trap: Trap, results: Path, tmp_path: Path) -> None:
    """Without the network: a plan asks the hub which commit a model's name stands for."""
    started = [sys.executable, "-P", "-c", PLANNED, str(results)]
    environment = trap.environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(started, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    counts, modules = done.stdout.strip().splitlines()[-2:]
    assert modules == "[]" and int(counts.split()[0]) > 20, done.stdout
    trap.assert_untouched()


def test_the_trap_would_have_caught_it(trap: Trap) -> None:
    """The canary sings when the forged module is imported, so its silence means something."""
    done = subprocess.run([sys.executable, "-c", f"import {MODULE}"], env=trap.environment, check=False, capture_output=True, timeout=60)
    assert done.returncode == 0 and trap.canary.exists()
    with pytest.raises(AssertionError, match="forged code ran"):
        trap.assert_untouched()


@pytest.mark.parametrize("how", ["local-code", pytest.param("tasks", marks=pytest.mark.full)])
def test_nothing_but_trust_stands_between_a_record_and_its_code(trap: Trap, honest: Cell, text: Path, tmp_path: Path, how: str) -> None:
    """The forgery is good enough to run: an audit that trusts it does so, one that does not leaves the canary alone."""
    config = changed(forgeries(honest, trap)[how], suite={"corpus": [f"file:{text}"], "seqlen": 64, "windows": 2}, stages=["quality"])
    store = Store(tmp_path / "runs")
    for record in forge(honest, config, "forged"):
        store.put(record)
    audit = ["audit", "--results", str(store.root), "--stage", "quality"]
    refused = run(trap, audit, tmp_path)
    trap.assert_untouched(refused)
    assert refused.returncode == 1 and "1 refused" in refused.stdout
    trusted = run(trap, [*audit, "--trust"], tmp_path)
    assert trap.canary.exists(), (trusted.stdout, trusted.stderr)


def test_a_foreign_key_takes_no_row(results: Path) -> None:
    from slimbench.leaderboard.rows.rows import rows

    board = rows(Store(results).scan()[0])
    mine = [row for row in board if not row.foreign]
    assert {row.model for row in mine} == {"tiny"} and not any(row.model == "zzz" for row in board)
    assert all(stage in {"compress", "quality", "speed"} for stage in map(str, Stage))

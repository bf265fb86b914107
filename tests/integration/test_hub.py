"""What asks the hub, with the real clients, against a small hub on this machine: what is fetched, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import hub_data
from tests.support.hub_server import Fault, HubServer
from tests.support.paths import SLIMBENCH

SMALL = ["device=cpu", "device.compress=cpu", "device.threads=1", "suite.windows=2", "suite.limit=2"]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[hub_data.Content]:
    """The repositories, made once."""
    return hub_data.make(tmp_path_factory.mktemp("repositories"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def full_hub(hub: HubServer, contents: list[hub_data.Content]) -> HubServer:
    hub_data.serve(hub, contents)
    return hub


@dataclass
class Home:
    """A user's machine with caches of its own, whose hub is the local one."""

    folder: Path
    hub: HubServer

    @property
    def environment(self) -> dict[str, str]:
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "SLIMBENCH_CACHE": str(self.folder / "cache")}
        return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own

    def slimbench(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [*SLIMBENCH, *arguments]
        wanted = self.environment | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=wanted, cwd=self.folder, check=False)

    def python(self, code: str, **environment: str) -> str:
        """What a program prints."""
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=self.environment | environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def records(self, results: str = "runs") -> list[dict]:
        return [json.loads(file.read_text()) for file in sorted((self.folder / results).glob("*/*/*.json"))]


@pytest.fixture
def home(hub: HubServer, tmp_path: Path) -> Home:
    return Home(tmp_path, hub)


FETCH = """
from slimbench.tasks import assets
from slimbench.tasks.errors import DataError
try:
    print(assets.fetch_hub("org/model"))
except DataError as error:
    print(type(error).__name__, error)
"""
WEIGHTS = "*/model.safetensors"


def publish(hub: HubServer, folder: Path, size: int, name: str = "org/model") -> bytes:
    """Serve weights of so many bytes, a model by their name only; returns them."""
    folder.mkdir()
    content = b"".join(number.to_bytes(4, "little") for number in range(size // 4))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    hub.add("models", name, folder)
    return content


@pytest.mark.parametrize("kind", ["stall", pytest.param("cut", marks=pytest.mark.full)])
def test_a_download_that_breaks_off_goes_on_where_it_was(home: Home, tmp_path: Path, kind: str) -> None:
    """By a range, after the client's own time-out. It writes in pieces of 10 MiB: what is in the file is not sent again."""
    content = publish(home.hub, tmp_path / "model", 32 << 20)
    home.hub.faults = [Fault("/large/*", kind, after=24 << 20, seconds=60)]
    folder = Path(home.python(FETCH, HF_HUB_DOWNLOAD_TIMEOUT="2"))
    assert (folder / "model.safetensors").read_bytes() == content
    first, second = home.hub.asked("/large/*")
    assert (first.begin, first.sent) == (0, 24 << 20) and (second.status, second.begin) == (206, 20 << 20)
    assert home.hub.sent("model.safetensors") == 36 << 20, "of 32 MiB"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(WEIGHTS, status=429, headers={"Retry-After": "1"}, times=2),
        Fault("/large/*", status=503, headers={"Retry-After": "1"}),
        Fault("/large/*", "reset", after=100_000),
        pytest.param(Fault("/api/models/*", status=503), marks=pytest.mark.full),
        pytest.param(Fault(WEIGHTS, status=503, method="HEAD"), marks=pytest.mark.full),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.kind} {fault.status}",
)
def test_a_hub_that_is_busy_for_a_while_is_waited_for(home: Home, tmp_path: Path, fault: Fault) -> None:
    content = publish(home.hub, tmp_path / "model", 400_000)
    home.hub.faults = [fault]
    folder = Path(home.python(FETCH))
    assert (folder / "model.safetensors").read_bytes() == content and fault.times == 0


def test_a_hub_that_stays_busy_is_an_error_of_the_hub(home: Home) -> None:
    home.hub.faults = [Fault("*", status=503, times=1000), Fault("*", status=503, times=1000, method="HEAD")]
    told = home.python(f"from slimbench.tasks import hub; hub._WAITS_S = (0.1, 0.1)\n{FETCH}")
    assert told.startswith("HubError cannot fetch org/model from the hub") and "tried 3 times" in told and "\n" not in told


@pytest.mark.parametrize("locked", [True, False], ids=["gated", "unknown"])
def test_what_the_hub_refuses_is_asked_for_once(home: Home, tmp_path: Path, locked: bool) -> None:
    if locked:
        publish(home.hub, tmp_path / "model", 1000)
        home.hub.gated.add("org/model")
    told = home.python(FETCH)
    assert told.startswith("AssetError cannot fetch org/model from the hub") and "HF_TOKEN" in told and "\n" not in told
    assert len(home.hub.asked("/api/models/org/model/*")) == 1


GPTQ = ["model=opt-125m", "method=dense,gptq-row", "calibration_samples=2", "calibration_length=64"]
ON_CPU = ["device=cpu", "device.compress=cpu", "device.threads=1"]
NO_SOCKETS = """
import os, socket, sys
def refused(*arguments):
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{sys.argv} {arguments}\\n")
    raise OSError("no connection may be made")
class Guarded(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refused(address)
    def connect_ex(self, address):
        return super().connect_ex(address) if self.family == socket.AF_UNIX else refused(address)
socket.socket, socket.getaddrinfo = Guarded, refused
"""


@pytest.fixture
def full_home(full_hub: HubServer, tmp_path: Path) -> Home:
    return Home(tmp_path, full_hub)


def verdicts(printed: str) -> list[str]:
    """The lines of the cells that were measured."""
    return [line for line in printed.splitlines() if line.startswith(" opt-125m") and "not measured" not in line]


@pytest.mark.full
def test_a_paper_is_reproduced_from_the_hub_and_again_without_network(full_home: Home, tmp_path: Path) -> None:
    """A tiny OPT under the paper's name: measured beside published, and the verdict that it is far off.

    Then from the cache alone, in a results folder of its own: the hub has ended, and whatever would open a socket is written down.
    """
    home = full_home
    here = home.slimbench("reproduce", "gptq", *GPTQ, *ON_CPU, "--results", "runs", COLUMNS="200")
    dense, compressed = verdicts(here.stdout)
    assert here.returncode == 1 and "27.65" in dense and "31.12" in compressed, here.stdout + here.stderr
    assert (
        dense.rstrip().endswith("differs") and compressed.rstrip().endswith("differs") and (tmp_path / "reproduced" / "gptq.svg").is_file()
    )

    sent = sum(request.sent for request in home.hub.asked("/large/*"))
    fetched = home.slimbench("assets", "prefetch", "experiment=paper/gptq", *GPTQ, *ON_CPU, HF_HOME=str(tmp_path / "fetched"))
    assert fetched.returncode == 0 and "3 of 3 are in the cache" in fetched.stdout, fetched.stdout + fetched.stderr
    assert "0.4 MB" in fetched.stdout, "the size is told before"
    assert sum(request.sent for request in home.hub.asked("/large/*")) == 2 * sent, "what is prefetched is what the stages fetch"
    before = len(home.hub.requests)
    again = home.slimbench("assets", "prefetch", "experiment=paper/gptq", *GPTQ, *ON_CPU, HF_HOME=str(tmp_path / "fetched"))
    assert again.stdout.count(": here") == 3 and len(home.hub.requests) == before, "what is cached is not asked for"

    home.hub.stop()
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_SOCKETS)
    guarded = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "guard"), os.environ["PYTHONPATH"]]), "CALLS": str(tmp_path / "calls")}
    offline = guarded | {"SLIMBENCH_OFFLINE": "1", "HF_HOME": str(tmp_path / "fetched"), "COLUMNS": "200"}
    offline |= {"SLIMBENCH_CACHE": str(tmp_path / "other")}
    there = home.slimbench("reproduce", "gptq", *GPTQ, *ON_CPU, "--results", "there", **offline)
    assert verdicts(there.stdout) == [dense, compressed], there.stdout + there.stderr
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
    mine, theirs = ({record["key"]: record["cell"]["revision"] for record in home.records(name)} for name in ("runs", "there"))
    assert mine == theirs and len(mine) == 4 and set(mine.values()) == {full_hub_commit(home.hub)}, "the commit stands in key and record"

    lacking = home.slimbench("reproduce", "gptq", "model=opt-350m", "method=dense", *ON_CPU, "--results", "lacking", **offline)
    assert lacking.returncode == 2 and not (tmp_path / "lacking").exists(), lacking.stderr
    assert "lacks model hf:facebook/opt-350m@main" in lacking.stderr and "slimbench assets prefetch" in lacking.stderr
    assert lacking.stderr.count("\n") == 1


def full_hub_commit(hub: HubServer) -> str:
    return hub.repositories["models", hub_data.OPT].refs["main"]


@pytest.mark.full
def test_suite_paper_runs_from_the_hub(full_home: Home) -> None:
    """All its corpora and tasks, as `corpora.yaml` and lm-eval's definitions ask for them."""
    small = ["suite=paper", "suite.seqlen=64", "suite.windows=2", "stages=[quality]", "suite.limit=2", *ON_CPU]
    done = full_home.slimbench("run", "model=opt-125m", "method=dense", *small)
    assert done.returncode == 0, done.stderr
    quality = next(record["quality"] for record in full_home.records() if record["stage"] == "quality")
    assert [part["corpus"] for part in quality["perplexity"]] == ["wikitext2", "ptb", "c4"]
    tasks = {"piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "openbookqa", "lambada_openai"}
    assert {task["task"] for task in quality["zeroshot"]} == tasks
    planned = full_home.slimbench("run", "model=opt-125m", "method=rtn-4bit", *small, "--plan", SLIMBENCH_OFFLINE="1")
    assert planned.returncode == 0 and "0 cannot run" in planned.stdout, "what lm-eval prepared is found"


@pytest.mark.full
def test_a_branch_that_moves_between_two_cells_is_one_commit_for_the_sweep(full_home: Home, tmp_path: Path) -> None:
    """It moves as soon as the first cell has asked for it; a second sweep goes on with the commit of the first."""
    import shutil

    first = full_hub_commit(full_home.hub)
    moved = tmp_path / "moved"
    shutil.copytree(full_home.hub.repositories["models", hub_data.OPT].commits[first], moved)
    (moved / "new.json").write_text("{}")
    full_home.hub.moves = {("models", hub_data.OPT): moved}
    small = [
        "suite.corpus=wikitext2",
        "suite.tasks=[]",
        "suite.seqlen=64",
        "suite.windows=2",
        "suite.include_path=null",
        "stages=[quality]",
    ]
    done = full_home.slimbench("sweep", "model=opt-125m", "method=dense,rtn-8bit", *small, *ON_CPU)
    assert done.returncode == 0, done.stderr
    assert full_hub_commit(full_home.hub) != first, "it has moved"
    assert {record["cell"]["revision"] for record in full_home.records()} == {first} and len(full_home.records()) == 4
    again = full_home.slimbench("sweep", "model=opt-125m", "method=dense,rtn-8bit", *small, *ON_CPU, "--plan")
    assert "0 to run" in again.stdout, again.stdout

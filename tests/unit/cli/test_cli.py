"""The command line as a user meets it: exit codes, one-line errors, nothing heavy imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, SLIMBENCH

ENTRY = "from slimbench.harness.cli.main import main; main()"
RESULTS = str(ROOT / "results")
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "wandb", "llmcompressor")


def slimbench(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SLIMBENCH, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "method=gtpq"), "did you mean 'gptq'"),
        (("sweep", "method=dense,gtpq"), "did you mean 'gptq'"),
        (("sweep", "experiment=dmo"), "did you mean 'demo'"),
        (("run", "suite.limt=3"), "did you mean 'suite.limit'"),
        (("run", "model=opt-125mm"), "did you mean 'opt-125m'"),
        (("methods", "show", "nf5"), "did you mean 'nf4'"),
        (("methods", "check", "nf5"), "did you mean 'nf4'"),
        (("assets", "path", "lee-new"), "did you mean 'lee-news'"),
        (("board", "table", "--results", "no-such-folder"), "no results folder"),
        (("board", "table", "--format", "jsn"), "did you mean 'json'"),
        (("board", "table", "--results", "."), "no records in '.'"),
        (("board", "serve", "--board", "."), "there is no board in '.'"),
        (("board", "build", "--results", RESULTS, "--out", "/dev/null"), "cannot write to '/dev/null'"),
        (("bench", "kernels", "--out", "/dev/null/x"), "cannot write to '/dev/null/x'"),
        (("bench", "attention", "--out", "/dev/null/x"), "cannot write to '/dev/null/x'"),
        (("bench", "attention", "--lengths", "512,x"), "'x' is no number of tokens from 2 to 1048576; give them as 512,1024"),
        (("bench", "attention", "--lengths", ""), "'' is no number of tokens"),
        (("bench", "attention", "--implementation", "flsh"), "did you mean 'flash'"),
        (("bench", "attention", "--device", "cuds"), "did you mean 'cuda'"),
        (("recommend", "--memory", "0"), "--memory 0 is no size"),
        (("recommend", "--memory", "120"), "--memory 120 is no size with its unit; give it as 300MB"),
        (("recommend", "--min-speed", "inf"), "--min-speed inf is no number to reach"),
        (("run", "results=/dev/null"), "results=/dev/null is no folder"),
        (("run", "model=custom", "model.name=x", "model.source=file:/no/such/folder"), "no config.json"),
        (("run", "suite.corpus=file:/no/such/text"), "/no/such/text"),
        (("run", "suite.include_path=/no/such/tasks", "suite.tasks=[a]"), "/no/such/tasks"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_line(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = slimbench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in slimbench("run", "method=gtpq", "--debug").stderr


@pytest.mark.parametrize("arguments", [("--help",), ("run", "method=gtpq"), ("methods", "list"), ("assets", "list")])
def test_nothing_heavy_is_imported_for_help_errors_and_listings(arguments: tuple[str, ...]) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules])); {ENTRY}"
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert "HEAVY []" in done.stdout


def test_a_missing_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hide = (
        f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'bitsandbytes' else find(n, *a); {ENTRY}"
    )
    done = subprocess.run([sys.executable, "-P", "-c", hide, "run", "method=nf4"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install 'slimbench[quantization]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_interrupted_run_says_how_to_go_on(overrides: list[str], tmp_path: Path) -> None:
    import signal

    process = subprocess.Popen(
        [*SLIMBENCH, "run", *overrides, "results=here"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background lets its children ignore it
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "goes on where it stopped" in process.stderr.read()

"""The same three faults at slimbench, lm-eval and optimum-benchmark: killed half-way, disk full at the result, a result file cut short.

`python -m tests.chaos.others [--optimum-benchmark PYTHON] [--table docs/faults.md]` runs each of them on the tiny model, strikes, gives the
same command again, and counts what had to be computed a second time. PYTHON is the interpreter of an environment that has
optimum-benchmark and a transformers that it can work with. Run by hand: some minutes on two cores.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.shim import Board, Call, Rule, build
from tests.chaos.tables import put
from tests.support.caches import with_kernels
from tests.support.paths import ROOT, SLIMBENCH
from tests.support.tiny import save_text, save_tiny, tiny_overrides

_LIMIT_S = 900
_ITEMS = 25
_BATCHES = (1, 2, 3)
_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
_OPTIMUM = """defaults: [benchmark, {{scenario: inference}}, {{launcher: process}}, {{backend: pytorch}}, _self_]
name: tiny
backend: {{device: cpu, model: {model}, task: text-generation, no_weights: false}}
scenario:
  memory: false
  warmup_runs: 1
  iterations: 1
  duration: 0
  input_shapes: {{batch_size: 1, sequence_length: 8}}
  generate_kwargs: {{max_new_tokens: 4, min_new_tokens: 4}}
hydra: {{sweep: {{dir: {out}, subdir: "${{hydra.job.num}}"}}, job: {{chdir: true}}}}
"""


@dataclass(frozen=True)
class Tool:
    """A program with a job of several results.

    Attributes:
        command: The whole job; its results go into `out`.
        units: Results that the job has.
        results: The result files that lie in `out`, those that a fault cuts short.
        done: How many units a run has computed, from what it has said and what lies in the folder of the job.
    """

    name: str
    version: str
    command: list[str]
    out: Path
    units: int
    results: Callable[[], list[Path]]
    done: Callable[[str, float], int]
    environment: dict[str, str]


@dataclass(frozen=True)
class Struck:
    """What one fault did to one tool.

    Attributes:
        code: Exit code of the run that was struck; None where a finished result was cut short afterwards.
        computed: Units that it had computed.
        again: Units that the same command computed then.
        then: Its exit code.
        torn: Result files that nobody can read, after the second run.
    """

    code: int | None
    computed: int
    again: int
    then: int
    torn: int


def run(tool: Tool, folder: Path, shim: Path, board: Path, until: Callable[[str], bool] | None = None) -> tuple[int, str, float]:
    """Run a tool, or until its output fulfils a condition, at which everything of it is killed; exit code, output and start time."""
    began, said = time.time(), folder / "said"
    environment = os.environ | tool.environment | {"LD_PRELOAD": str(shim), "CHAOS_BOARD": str(board)}
    with said.open("wb") as stream:
        process = subprocess.Popen(
            tool.command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    deadline = time.monotonic() + _LIMIT_S
    while process.poll() is None:
        if (until and until(said.read_text(errors="replace"))) or time.monotonic() > deadline:
            for group in _groups(process.pid):
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        time.sleep(0.02)
    return process.returncode, said.read_text(errors="replace"), began


def _groups(root: int) -> Iterator[int]:
    """The process groups of a process and all that it has started."""
    import psutil

    with suppress(psutil.Error):
        for process in [*psutil.Process(root).children(recursive=True), psutil.Process(root)]:
            with suppress(ProcessLookupError):
                yield os.getpgid(process.pid)


def killed(tool: Tool, folder: Path, shim: Path) -> Struck:
    """SIGKILL to all of its processes once half of the job is computed."""
    began = time.time()
    code, said, began = run(tool, folder, shim, _board(folder), lambda said: tool.done(said, began) >= tool.units / 2)
    return _again(tool, folder, shim, code, tool.done(said, began))


def disk_full(tool: Tool, folder: Path, shim: Path) -> Struck:
    """Each write into the folder of its results fails, as on a full disk, until the run ends."""
    board = Board(folder / "board")
    calls = Call.OPEN_WRITE | Call.WRITE | Call.MKDIR
    skip = Rule(calls, f"{tool.out}/*", error=errno.ENOSPC, times=None)
    board.arm([skip])
    code, said, began = run(tool, folder, shim, folder / "board")
    computed = tool.done(said, began)
    board.arm([])
    return _again(tool, folder, shim, code, computed)


def cut_short(tool: Tool, folder: Path, shim: Path) -> Struck:
    """One result file of a finished job loses its second half."""
    code, said, began = run(tool, folder, shim, _board(folder))
    if code:
        raise RuntimeError(f"{tool.name} ends with {code} undisturbed: {said[-2000:]}")
    computed = tool.done(said, began)
    file = sorted(tool.results())[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    time.sleep(1.1)  # for what is told apart by the second in which it was made
    return _again(tool, folder, shim, None, computed)


def _again(tool: Tool, folder: Path, shim: Path, code: int | None, computed: int) -> Struck:
    then, said, began = run(tool, folder, shim, _board(folder))
    return Struck(code, computed, tool.done(said, began), then, sum(not _is_readable(file) for file in tool.results()))


def _board(folder: Path) -> Path:
    Board(folder / "board")
    return folder / "board"


def _is_readable(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except ValueError:
        return False
    return True


def slimbench(folder: Path, model: Path, text: Path) -> Tool:
    """Three cells: nine stages, a record each."""
    from slimbench import __version__

    out, journal = folder / "out", folder / "journal"
    with_kernels(folder / "cache")
    command = [*SLIMBENCH, "sweep", *tiny_overrides(model, text), "method=rtn-4bit,magnitude", f"results={out}"]

    def done(said: str, began: float) -> int:
        lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
        return sum(line[4:] == ["ok"] and _seconds(line[0]) >= began for line in lines)

    own = {"SLIMBENCH_CACHE": str(folder / "cache"), "SLIMBENCH_JOURNAL": str(journal), "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "SLIMBENCH_TURNS": str(folder)}
    return Tool("slimbench", __version__, command, out, 9, lambda: sorted(out.glob("*/*/*.json")), done, own)


def lm_eval(folder: Path, model: Path, cached: bool) -> Tool:
    """Two tasks of 25 items with two choices each: 100 requests, and one file of results."""
    from importlib.metadata import version

    tasks, out = folder / "tasks", folder / "out"
    tasks.mkdir()
    for name in ("first", "second"):
        data = tasks / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps({"question": f"{name}: is {n} even? ", "answer": n % 2}) for n in range(_ITEMS)))
        (tasks / f"{name}.yaml").write_text(_TASK.format(name=f"chaos_{name}", data=data))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", "chaos_first,chaos_second", "--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    command += ["--device", "cpu", "--batch_size", "1", *(["--use_cache", str(folder / "requests")] if cached else [])]

    def done(said: str, began: float) -> int:
        steps = re.findall(r"Running loglikelihood requests:.*? (\d+)/\d+", said)
        return int(steps[-1]) if steps else 0

    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    name = "lm-eval, `--use_cache`" if cached else "lm-eval"
    return Tool(name, version("lm_eval"), command, out, 4 * _ITEMS, lambda: sorted(out.glob("*/results_*.json")), done, own)


def optimum_benchmark(folder: Path, model: Path, python: str) -> Tool:
    """A sweep of three batch sizes: three runs, a report each."""
    out = folder / "out"
    (folder / "tiny.yaml").write_text(_OPTIMUM.format(model=model, out=out))
    command = [str(Path(python).with_name("optimum-benchmark")), "--config-dir", str(folder), "--config-name", "tiny", "-m"]
    command += [f"scenario.input_shapes.batch_size={','.join(map(str, _BATCHES))}"]

    def results() -> list[Path]:
        return sorted(out.glob("*/benchmark_report.json"))

    def done(said: str, began: float) -> int:
        return sum(path.stat().st_mtime >= began for path in results())

    code = "from importlib.metadata import version as v; print(v('optimum-benchmark'), 'with transformers', v('transformers'))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return Tool("optimum-benchmark", version, command, out, len(_BATCHES), results, done, {"HF_HUB_OFFLINE": "1"})


def _seconds(time_: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(time_).timestamp()


FAULTS = {"killed half-way": killed, "disk full at the result": disk_full, "result cut short": cut_short}


def compare(python: str | None, folder: Path) -> str:
    """The table, as Markdown."""
    model, text, shim = folder / "model", folder / "text.txt", build(folder)
    save_tiny(model)
    save_text(text)
    makers: list[Callable[[Path], Tool]] = [lambda place: slimbench(place, model, text)]
    makers += [lambda place: lm_eval(place, model, False), lambda place: lm_eval(place, model, True)]
    makers += [lambda place: optimum_benchmark(place, model, str(python))] if python else []
    lines = ["| | fault | exit code | computed before | computed again by the same command | its exit code | torn results left |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for number, make in enumerate(makers):
        for name, strike in FAULTS.items():
            place = folder / f"{number}-{name.replace(' ', '-')}"
            place.mkdir()
            tool = make(place)
            struck = strike(tool, place, shim)
            code = "–" if struck.code is None else str(struck.code)
            counts = [f"{struck.computed} of {tool.units}", f"{struck.again} of {tool.units}", str(struck.then), str(struck.torn)]
            lines.append(f"| {tool.name} {tool.version} | {name} | {code} | {' | '.join(counts)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.others", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--optimum-benchmark", metavar="PYTHON", help="interpreter of an environment that has it; left out without")
    parser.add_argument("--table", type=Path, help="a Markdown file whose part `others` it replaces")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-others-"))
    try:
        table = compare(asked.optimum_benchmark, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table)
    if asked.table:
        put(asked.table, "others", table)


if __name__ == "__main__":
    main()

"""A stage that is killed at random points goes on where it stopped: little is computed twice, and the numbers are those of a calm one."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.util.files import cache_dir
from tests.support import watched
from tests.support.caches import with_kernels
from tests.support.running import Listener, cell

pytestmark = pytest.mark.alone
MOST_LOST_S = 30
"""But for a pass of a document of 8,192 tokens, which may take longer by itself."""
ENGINE = "engine._target_=tests.support.watched.Watched"
ITEMS = ["suite.protocols=[window,document]", "suite.documents=2", "suite.include_path=asset:bigbench", "suite.limit=4"]
TINY = [*ITEMS, "suite.windows=80", "suite.tasks=[bb_general_knowledge]", "suite.batch_tokens=512", ENGINE]
REAL = [*ITEMS, "model=smollm2-135m", "suite=quick", "suite.limit=32", "device=cpu", ENGINE]


class Log:
    """What has gone through the model, in this process or another."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()

    @property
    def lines(self) -> int:
        return self.file.stat().st_size // watched.LINE

    def ended(self, first: int) -> int:
        """How many passes have ended since the line `first`, one that was computed twice counted once."""
        return len({tokens for sign, tokens, _ in self.passes(first) if sign == "-"})

    def passes(self, first: int = 0) -> list[tuple[str, str, float]]:
        """(sign, tokens, seconds) of the lines from `first` on."""
        return [(sign, tokens, float(at)) for sign, tokens, at in (line.split() for line in self.file.read_text().splitlines()[first:])]


@pytest.fixture(scope="module")
def log(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    """The log of an engine that runs in a cache that has the user's model and texts, and nothing that stages made."""
    folder = tmp_path_factory.mktemp("kill")
    own, users = with_kernels(folder / "cache"), cache_dir()
    for name in ("assets", "models", "tokens"):
        if (users / name).is_dir():
            (own / name).symlink_to(users / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMBENCH_CACHE", str(own))
        patch.setenv(watched.VARIABLE, str(folder / "log"))
        patch.setenv(watched.PASS_S, "0.1")
        yield Log(folder / "log")


@pytest.fixture(scope="module")
def runner(log: Log) -> Iterator[Runner]:
    made = Runner(Store(Path("unused")), Listener())
    yield made
    made.close()


def attempt(runner: Runner, cell: Cell, stage: Stage) -> Record:
    record = runner.attempt(cell, stage)
    assert record is not None
    return record


def process_of(runner: Runner) -> psutil.Process:
    """In which a stage runs."""
    (worker,) = runner._workers.values()
    assert worker._server
    (child,) = psutil.Process(worker._server.pid).children()
    return child


def strike(runner: Runner, log: Log, first: int, passes: int, later_s: float, number: int, struck: list[float]) -> threading.Thread:
    """A thread that sends the stage's process a signal some time after so many passes have ended, and one has begun in it."""

    def wait() -> None:
        while (log.lines == before or log.ended(first) < passes) and not over.is_set():
            time.sleep(0.02)
        if over.wait(later_s):
            return
        struck.append(time.monotonic())
        process_of(runner).send_signal(number)

    over, before = threading.Event(), log.lines
    thread = threading.Thread(target=wait, daemon=True)
    thread.over = over  # type: ignore[attr-defined]
    thread.start()
    return thread


def stormy(runner: Runner, log: Log, cell: Cell, calm: list[tuple[str, str, float]], kills: int) -> tuple[Record, list[list[float]]]:
    """The record of a quality stage that was killed so many times, and the seconds of each computed item that a kill cost."""
    dice, first, struck = random.Random(20260727), log.lines, []
    shortest = min(end[2] - begin[2] for begin, end in zip(calm[::2], calm[1::2], strict=True))
    points = sorted(dice.sample(range(len({tokens for _, tokens, _ in calm})), kills))
    for index, point in enumerate(points):
        number = signal.SIGTERM if index % 3 == 2 else signal.SIGKILL
        thread = strike(runner, log, first, point, dice.uniform(0, shortest), number, struck)
        record = attempt(runner, cell, Stage.QUALITY)
        thread.over.set()  # type: ignore[attr-defined]
        thread.join()
        if record.status is Status.OK:
            break
        assert record.status is Status.TRANSIENT, record.failure
    record = attempt(runner, cell, Stage.QUALITY)
    return record, lost(log.passes(first), struck)


def lost(passes: list[tuple[str, str, float]], struck: list[float]) -> list[list[float]]:
    """Seconds of each pass that a kill cost: computed, or being computed, since the one before, and begun again after it."""
    begun = [(tokens, at) for sign, tokens, at in passes if sign == "+"]
    ends = {(tokens, start): at for (sign, tokens, at), start in zip(passes[1:], (line[2] for line in passes), strict=False) if sign == "-"}
    spent = []
    for before, at in zip([0.0, *struck], struck, strict=False):
        again = {tokens for tokens, start in begun if start > at}
        mine = [(tokens, start) for tokens, start in begun if before < start < at and tokens in again]
        spent.append([min(ends.get(run, at), at) - run[1] for run in mine])
    return spent


def numbers(record: Record) -> dict[str, Any]:
    assert record.quality, record.failure
    return record.quality.model_dump(exclude={"seconds", "load_seconds", "flags", "evidence"})


@pytest.mark.parametrize(
    ("model", "method", "kills"),
    [
        pytest.param("tiny", "dense", 3, id="reference"),
        pytest.param("smollm2-135m", "dense", 10, id="whole-reference", marks=pytest.mark.full),
        pytest.param("smollm2-135m", "rtn-4bit", 10, id="whole-candidate", marks=pytest.mark.full),
    ],
)
def test_killed_at_random_points_it_computes_nothing_that_was_there(
    runner: Runner, log: Log, overrides: list[str], tmp_path: Path, model: str, method: str, kills: int
) -> None:
    mine = cell([*overrides, *TINY] if model == "tiny" else REAL, f"method={method}")
    found = {}
    for weather in ("calm", "stormy"):
        runner.store = Store(tmp_path / weather)
        for part in [mine] if mine.config.is_reference else [mine.reference(), mine]:
            assert attempt(runner, part, Stage.COMPRESS).status is Status.OK
        if weather == "calm":
            first = log.lines
            found["calm"] = attempt(runner, mine, Stage.QUALITY)
            calm = log.passes(first)
        else:
            found["stormy"], cost = stormy(runner, log, mine, calm, kills)
    assert found["stormy"].status is Status.OK, found["stormy"].failure
    assert numbers(found["stormy"]) == numbers(found["calm"])
    assert len(cost) >= kills - 1, "hardly an attempt was cut off"
    print(f"{method}: seconds computed twice, each kill: {' '.join(f'{sum(seconds):.1f}' for seconds in cost)}")
    assert all(sum(seconds) <= MOST_LOST_S or len(seconds) == 1 for seconds in cost), "more than one pass, which nothing divides"
    (flag,) = (flag for flag in found["stormy"].quality.flags if flag.startswith("went on after"))  # type: ignore[union-attr]
    assert f"{len(cost)} interruptions" in flag
    assert len(found["stormy"].attempts) == len(cost)
    assert not list((cache_dir() / "partial").iterdir()), "what was kept is gone with the record"


class KillsAt(Listener):
    """Kills the stage's process when it tells of a phase, once."""

    def __init__(self, runner: Runner, phase: str) -> None:
        super().__init__()
        self.runner, self.phase = runner, phase

    def stage_event(self, cell: Cell, stage: Stage, event: dict[str, Any]) -> None:
        if event.get("name") == self.phase:
            self.phase = ""
            process_of(self.runner).kill()


def test_what_a_kill_cost_is_what_was_begun_before_it_and_again_after_it() -> None:
    told = [("+", "a", 1.0), ("-", "a", 2.0), ("+", "b", 2.0), ("-", "b", 5.0), ("+", "c", 5.0)]  # killed at 7, which cuts off c
    told += [("+", "b", 9.0), ("-", "b", 12.0), ("+", "c", 12.0), ("-", "c", 15.0)]
    assert lost(told, [0.5, 7.0, 8.0, 16.0]) == [[], [3.0, 2.0], [], []]


def test_killed_in_its_second_point_speed_keeps_the_first(
    runner: Runner, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = cell(overrides, "speed.grid=[{batch: [1, 2, 3], prompt: 8, new_tokens: 4}]")
    runner.store = Store(tmp_path)
    monkeypatch.setattr(runner, "listener", KillsAt(runner, "speed 2×8+4"))
    assert attempt(runner, mine, Stage.COMPRESS).status is Status.OK
    assert attempt(runner, mine, Stage.SPEED).status is Status.TRANSIENT
    (file,) = (cache_dir() / "partial").glob("speed-*/journal")
    lines = [json.loads(line.partition(" ")[2]) for line in file.read_text().splitlines() if line]
    kept = [line["result"]["point"] for line in lines if line.get("part") == "points"]
    assert [point["batch"] for point in kept] == [1]
    record = attempt(runner, mine, Stage.SPEED)
    assert record.speed, record.failure
    first, *others = record.speed.points
    assert first.model_dump(exclude={"roofline"}) == {name: value for name, value in kept[0].items() if name != "roofline"}
    assert [point.batch for point in others] == [2, 3]
    assert record.speed.flags[-1].endswith("1 of 3 points were there before; its points are of several processes")

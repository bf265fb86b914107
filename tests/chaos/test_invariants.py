"""A campaign that finds nothing means something only if it would: each breach is planted once, and is seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Failure
from slimbench.harness.store.store import Store
from tests.chaos.invariants import Calm, Outcome, doubled, of_end, of_launch
from tests.chaos.scene import MARK, Fault, Journal, Launch, Scene
from tests.chaos.shim import Board, Call, Depth, Rule, build
from tests.support.board_records import Spec, records


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A scene whose sweep is done: three records."""
    made = Scene(tmp_path / "case", None, [])
    store = Store(made.results)
    for record in records(Spec("rtn-4bit", "quantization", loss=1.1, bits=4.25)):
        store.put(record)
    made.cache.mkdir()
    with made.ended():
        yield made


@pytest.fixture
def calm(scene: Scene) -> Calm:
    return Calm.of(scene.results)


def paths(scene: Scene) -> list[Path]:
    return sorted(scene.results.glob("*/*/*.json"))


def ends(scene: Scene, calm: Calm) -> set[Outcome]:
    return {breach.outcome for breach in of_end(scene, calm, complete=True)}


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_sweep_that_is_whole_breaks_nothing(scene: Scene, calm: Calm) -> None:
    assert ends(scene, calm) == set()
    assert not of_launch(scene, Launch([0], [""], [], 1.0), calm, [])


def test_each_breach_is_seen(scene: Scene, calm: Calm) -> None:
    paths(scene)[0].unlink()
    assert ends(scene, calm) == {Outcome.LOST}
    assert {breach.outcome for breach in of_end(scene, calm, complete=False)} == {Outcome.LOST, Outcome.INCOMPLETE}


def test_a_torn_record_is_seen(scene: Scene, calm: Calm) -> None:
    path = paths(scene)[0]
    path.write_bytes(path.read_bytes()[:100])
    assert Outcome.TORN in ends(scene, calm)


def test_a_foreign_record_is_seen(scene: Scene, calm: Calm) -> None:
    edit(paths(scene)[0], origin="f" * 16)
    assert ends(scene, calm) == {Outcome.FOREIGN}


def test_another_number_is_seen(scene: Scene, calm: Calm) -> None:
    path = next(path for path in paths(scene) if path.name.startswith(Stage.QUALITY))
    quality = json.loads(path.read_text())["quality"]
    quality["perplexity"][0]["window_nll"][0] += 1e-9
    edit(path, quality=quality)
    assert ends(scene, calm) == {Outcome.CHANGED}


def test_a_second_record_of_one_stage_is_seen(scene: Scene, calm: Calm) -> None:
    record = next(record for record in Store(scene.results).scan()[0])
    hardware = record.hardware.model_copy(update={"fingerprint": "0" * 8})
    Store(scene.results).put(record.model_copy(update={"hardware": hardware}))
    assert ends(scene, calm) == {Outcome.DOUBLED}


@pytest.mark.parametrize("status", [Status.FAILED, Status.OOM, Status.TIMEOUT])
def test_a_fault_that_became_a_fact_is_seen(scene: Scene, calm: Calm, status: Status) -> None:
    record = next(record for record in Store(scene.results).scan()[0])
    nothing = dict.fromkeys(("compress", "quality", "speed"))
    Store(scene.results).put(record.model_copy(update=nothing | {"status": status, "failure": Failure(type="Full", message="disk")}))
    assert Outcome.FACT in ends(scene, calm)
    assert Outcome.FACT in {breach.outcome for breach in of_launch(scene, Launch([1], ["failed"], [], 1.0), calm, [])}


@pytest.mark.parametrize(
    "name", ["tmp/slimbench-x", "results/tiny/.x.tmp", "results/.slimbench.x", "cache/artefacts/.x", "cache/checkpoints/x"]
)
def test_a_leftover_is_seen(scene: Scene, calm: Calm, name: str) -> None:
    (scene.root / name).mkdir(parents=True)
    assert ends(scene, calm) == {Outcome.LEFTOVER}


def test_a_process_that_lives_on_is_seen_in_whatever_session(scene: Scene, calm: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.invariants._GRACE_S", 0.2)
    code = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(60)"
    environment = os.environ | {MARK: str(scene.root)}
    subprocess.run([sys.executable, "-S", "-c", code], env=environment, check=True)
    assert ends(scene, calm) == {Outcome.ORPHAN}
    time.sleep(0.1)
    assert ends(scene, calm) == set(), "and is ended"


@pytest.mark.parametrize(
    ("code", "said", "lost"),
    [(0, "", 1), (1, "", 0), (75, "", 0), (-9, "", 0), (None, "", 0), (0, "Traceback (most recent call last)", 0), (2, "", 1)],
)
def test_an_exit_code_that_is_not_true_is_seen(scene: Scene, calm: Calm, code: int | None, said: str, lost: int) -> None:
    for path in paths(scene)[:lost]:
        path.unlink()
    breaches = of_launch(scene, Launch([code], [said], [], 1.0), calm, [])
    assert {breach.outcome for breach in breaches} == {Outcome.HUNG if code is None else Outcome.EXIT}


def test_an_exit_code_that_a_fault_explains_is_true(scene: Scene, calm: Calm) -> None:
    fault = Fault("signals", "KILL", codes=frozenset({-9}))
    assert not of_launch(scene, Launch([-9], [""], [fault], 1.0), calm, [fault])


def journal(*lines: str, ended: float = 100.0) -> Journal:
    """Lines such as `3 compress-a ok`, the first word in seconds."""
    times = [f"1970-01-01T00:00:{int(line.split()[0]):02d}+00:00 host 1 {line.partition(' ')[2]}" for line in lines]
    return Journal(times, ended)


def test_a_stage_that_runs_twice_is_seen_in_the_journals() -> None:
    calm = [[journal("1 a", "2 a ok")], [journal("5 b", "6 b ok")]]
    assert not doubled(calm, set())
    again = [[journal("1 a", "2 a ok")], [journal("5 a", "6 a ok")]]
    assert doubled(again, set()) == ["a ran again although its record stood"]
    assert not doubled(again, {"a"})
    together = [[journal("1 a", "4 a ok"), journal("2 a", "3 a ok")]]
    assert "a ran in two processes at the same time" in doubled(together, set())
    killed = [[journal("1 a", ended=10.0), journal("9 a", "12 a ok")]]
    assert not doubled(killed, set()), "seen dead a moment after the other began"
    alive = [[journal("1 a", ended=20.0), journal("9 a", "12 a ok")]]
    assert doubled(alive, set()) == ["a ran in two processes at the same time"]
    tried_again = [[journal("1 a", "2 a transient", "3 a", "4 a ok")]]
    assert not doubled(tried_again, set())
    clock_back = [[journal("8 a", "9 a transient", "2 a", "3 a ok")], [journal("4 b", "5 b ok")]]
    assert not doubled(clock_back, set())
    assert doubled([[journal("8 a", "9 a ok", "2 a", "3 a ok")]], set()) == ["a ran again although its record stood"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    return build(tmp_path_factory.mktemp("shim"))


def python(shim: Path, board: Path, code: str, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"LD_PRELOAD": str(shim), "CHAOS_BOARD": str(board)}
    return subprocess.Popen([sys.executable, "-S", "-c", code], env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True)


def test_a_rule_fails_the_call_that_it_names_and_no_other(shim: Path, tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.arm([Rule(Call.OPEN_WRITE, "*/full/*", error=errno.ENOSPC, skip=1, times=2)])
    (tmp_path / "full").mkdir()
    code = """
for n in range(6):
    try:
        open(f'full/{n}', 'w').close()
        print('ok')
    except OSError as error:
        print(error.errno)
open('other', 'w')"""
    said, _ = python(shim, tmp_path / "board", code, tmp_path).communicate(timeout=60)
    assert said.split() == ["ok", "28", "28", "ok", "ok", "ok"]
    assert board.fired(0)


def test_a_rule_holds_a_process_until_it_is_let_go_and_moves_its_clock(shim: Path, tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.arm([Rule(Call.WRITE, text="second", depths=Depth.CHILD)])
    board.set_clock(-3600)
    code = """
import os, time
if os.fork():
    os.wait()
else:
    for text in ('first ', 'second ', time.time()):
        os.write(1, str(text).encode())"""
    began = time.time()
    process = python(shim, tmp_path / "board", code, tmp_path)
    deadline = time.monotonic() + 60
    while not board.held() and time.monotonic() < deadline:
        time.sleep(0.01)
    (pid,) = board.held().values()
    assert pid != process.pid and process.poll() is None
    board.let_go(0)
    said, _ = process.communicate(timeout=60)
    assert said.split()[:2] == ["first", "second"]
    assert began - 3700 < float(said.split()[2]) < began - 3500


def test_records_that_are_not_whole_are_no_measure(scene: Scene) -> None:
    paths(scene)[0].write_text("{}")
    with pytest.raises(ValueError, match="did not end well"):
        Calm.of(scene.results)

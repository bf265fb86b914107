"""Turns: `speed` is alone on its card, or on the machine of a CPU; others share, wait in a queue, and never hold what died."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slimbench.harness.run import turns
from slimbench.harness.run.turns import Place, turn
from slimbench.harness.run.worker import Closed, Outcome
from slimbench.harness.schema.identity import Stage, Status
from tests.support.running import cell

ALONE, SHARED = [Place("machine", True)], [Place("machine", False)]
_HOLD = """
import sys, time
from slimbench.harness.run.turns import Place, turn
with turn([Place("machine", sys.argv[1] == "alone")], 60) as fault:
    print("has", fault, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMBENCH_TURNS", str(tmp_path / "turns"))
    return tmp_path / "turns"


def holder(kind: str, seconds: float) -> subprocess.Popen[str]:
    """Another process that has a turn by the time this returns."""
    process = subprocess.Popen([sys.executable, "-P", "-c", _HOLD, kind, str(seconds)], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout and process.stdout.readline() == "has None\n"
    return process


def test_speed_waits_for_another_process_and_says_so() -> None:
    other, told, began = holder("shared", 1.0), [], time.monotonic()
    with turn(ALONE, 60, told.append) as fault:
        waited = time.monotonic() - began
    assert fault is None and waited > 0.5 and told == ["wait for the machine"]
    assert other.wait(30) == 0


def test_what_shares_does_not_wait_for_what_shares() -> None:
    other, told = holder("shared", 30), []
    with turn(SHARED, 60, told.append) as fault:
        assert fault is None and not told
    other.kill()
    other.wait()


def test_a_turn_ends_with_the_process_that_had_it() -> None:
    other = holder("alone", 600)
    threading.Timer(0.5, other.kill).start()
    with turn(SHARED, 60) as fault:
        assert fault is None
    assert other.wait(30) != 0


def test_who_wants_it_alone_is_not_passed_by_those_who_share() -> None:
    """A stream of stages that share, always two at a time, would otherwise keep it waiting for ever."""
    order: list[str] = []

    def take(name: str, places: list[Place], seconds: float) -> None:
        with turn(places, 60):
            order.append(name)
            time.sleep(seconds)

    threads = []
    for name, places, seconds in (("first", SHARED, 1.5), ("speed", ALONE, 0.1), ("later", SHARED, 0.1)):
        threads.append(threading.Thread(target=take, args=(name, places, seconds)))
        threads[-1].start()
        time.sleep(0.4)
    for thread in threads:
        thread.join()
    assert order == ["first", "speed", "later"]


def test_patience_ends_and_the_speed_that_was_measured_says_so() -> None:
    other = holder("alone", 60)
    with turn(ALONE, 0.3) as fault:
        assert fault == "machine was not free within 0 s"
    other.kill()
    other.wait()
    speed = turns.marked(Outcome(Status.OK, "", 1.0, result={"flags": ["one"]}), Stage.SPEED, fault)
    assert speed.result == {"flags": ["one", f"other stages of slimbench may have run beside this one: {fault}"]}
    assert turns.marked(Outcome(Status.OK, "", 1.0, result={}), Stage.QUALITY, fault).result == {}


def test_a_folder_without_locks_is_a_fault_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMBENCH_TURNS", str(tmp_path / "file"))
    with turn(ALONE, 1) as fault:
        assert fault and fault.startswith(f"no lock in {tmp_path / 'file'}: ")


def test_waiting_ends_when_the_runner_is_closed() -> None:
    other, closed = holder("alone", 60), threading.Event()
    threading.Timer(0.3, closed.set).start()
    with pytest.raises(Closed), turn(SHARED, 60, is_stopped=closed.is_set):
        pass
    other.kill()
    other.wait()


def test_a_stage_takes_the_machine_and_its_card(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "card_names", lambda: ["GPU-0", "GPU-1"])
    config = cell(overrides).config
    assert [turns.places(config, stage) for stage in Stage] == [SHARED, SHARED, ALONE]
    device = config.device.model_copy(update={"name": "cuda", "index": 1})
    taken = [turns.places(config.model_copy(update={"device": device}), stage) for stage in Stage]
    assert taken == [SHARED, [*SHARED, Place("GPU-1", False)], [*SHARED, Place("GPU-1", True)]]


def test_two_cards_are_not_in_each_others_way() -> None:
    with turn([*SHARED, Place("GPU-0", True)], 1) as one, turn([*SHARED, Place("GPU-1", True)], 1) as other:
        assert one is None and other is None
        with turn([*SHARED, Place("GPU-0", False)], 0.2) as third:
            assert third == "card was not free within 0 s"


def test_a_model_over_two_cards_takes_both(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "card_names", lambda: ["GPU-2", "GPU-1", "GPU-0"])
    config = cell(overrides).config
    device = config.device.model_copy(update={"name": "cuda", "compress": "cuda", "index": 1, "cards": 2})
    taken = [turns.places(config.model_copy(update={"device": device}), stage) for stage in (Stage.COMPRESS, Stage.SPEED)]
    assert taken == [[*SHARED, Place("GPU-1", False)], [*SHARED, Place("GPU-0", True), Place("GPU-1", True)]], "in one order for all"

"""What a stage has got is believed only line by line: whole, unchanged, and of the same identity."""

from __future__ import annotations

import math
import os
import struct
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from slimbench.harness.store.partial import Journal, discard, location, pack, unpack

IDENTITY = {"artefacts": {"k": {"model.safetensors": "aa"}}, "config": {"suite": {"batch_tokens": 1024}}}


@pytest.fixture
def name() -> str:
    return uuid4().hex


def attempt(name: str, pieces: range, identity: dict[str, Any] = IDENTITY) -> tuple[Journal, list[Any], list[int]]:
    """The journal of an attempt at these pieces, their results, and those that were worked on."""
    journal, worked = Journal(name, identity), []

    def work(piece: int) -> list[float]:
        worked.append(piece)
        return [math.sqrt(piece), 1 / 3]

    part = journal.part("roots", "roots")
    return journal, [part.once([piece], 1, lambda piece=piece: work(piece)) for piece in pieces], worked


def test_what_was_done_is_not_done_again_and_is_the_same_number(name: str) -> None:
    first, _, worked = attempt(name, range(5))
    assert worked == [0, 1, 2, 3, 4]
    assert first.remarks() == []
    second, results, worked = attempt(name, range(8))
    assert worked == [5, 6, 7]
    assert results == [[math.sqrt(piece), 1 / 3] for piece in range(8)]
    assert second.remarks() == ["went on after an interruption: 5 of 8 roots were there before"]
    third, _, worked = attempt(name, range(9))
    assert worked == [8]
    assert third.remarks() == ["went on after 2 interruptions: 8 of 9 roots were there before"]


def test_after_its_record_nothing_is_left(name: str) -> None:
    attempt(name, range(3))
    discard(name)
    assert not location(name).exists()
    assert attempt(name, range(3))[2] == [0, 1, 2]


def test_without_a_name_nothing_is_kept(cache: Path) -> None:
    before = sorted(cache.rglob("journal"))
    part = Journal().part("roots", "roots")
    assert [part.once([0], 1, lambda: 1), part.once([0], 1, lambda: 2)] == [1, 2]
    assert sorted(cache.rglob("journal")) == before


@pytest.mark.parametrize(
    "other",
    [
        IDENTITY | {"artefacts": {"k": {"model.safetensors": "ab"}}},
        IDENTITY | {"config": {"suite": {"batch_tokens": 2048}}},
        IDENTITY | {"versions": {"torch": "2.0"}},
    ],
)
def test_another_identity_takes_nothing_and_leaves_nothing(name: str, other: dict[str, Any]) -> None:
    journal, _, _ = attempt(name, range(3))
    assert journal.folder
    (journal.folder / "distributions").mkdir()
    foreign, _, worked = attempt(name, range(4), other)
    assert worked == [0, 1, 2, 3]
    assert foreign.remarks() == []
    assert not (journal.folder / "distributions").exists()
    assert attempt(name, range(4))[2] == [0, 1, 2, 3], "the first identity finds nothing any more"


def test_half_a_line_is_none_and_the_next_one_is_whole(name: str) -> None:
    attempt(name, range(3))
    file = location(name) / "journal"
    os.truncate(file, file.stat().st_size - 20)
    assert attempt(name, range(4))[2] == [2, 3]
    assert attempt(name, range(4))[2] == []


def test_no_byte_of_a_line_can_change(name: str) -> None:
    attempt(name, range(2))
    file = location(name) / "journal"
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for position in range(last, len(whole) - 1):
        for bit in (0, 6):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            _, results, worked = attempt(name, range(2))
            assert worked == [1]
            assert results[1] == [1.0, 1 / 3]


def test_what_is_not_accepted_is_done_again(name: str) -> None:
    attempt(name, range(1))
    part = Journal(name, IDENTITY).part("roots", "roots")
    assert part.once([0], 1, lambda: "new", lambda kept: False) == "new"
    assert part.kept == 0


def test_equal_pieces_are_as_many_pieces(name: str) -> None:
    part = Journal(name, IDENTITY).part("p", "pieces")
    assert [part.once(b"x", 1, lambda: 1), part.once(b"x", 1, lambda: 2)] == [1, 2]
    part = Journal(name, IDENTITY).part("p", "pieces")
    assert [part.once(b"x", 1, lambda: 9) for _ in range(3)] == [1, 2, 9]
    other = Journal(name, IDENTITY).part("q", "pieces")
    assert other.once(b"x", 1, lambda: 5) == 5, "another part is other work"


def test_seconds_of_earlier_attempts_are_added(name: str) -> None:
    for pieces in (1, 2):  # the second attempt takes the first piece and works on the second
        part = Journal(name, IDENTITY).part("naps", "naps")
        for piece in range(pieces):
            part.once([piece], 1, lambda: time.sleep(0.1))
    part = Journal(name, IDENTITY).part("naps", "naps")
    for piece in range(3):
        part.once([piece], 1, lambda: None)
    assert 0.2 <= part.seconds < 0.2 + 5


def test_numbers_come_back_bit_by_bit(name: str) -> None:
    numbers = [struct.unpack("<d", os.urandom(8))[0] for _ in range(2000)]
    finite = [number for number in numbers if math.isfinite(number)]
    Journal(name, IDENTITY).part("p", "numbers").once(b"", 1, lambda: finite)
    kept = Journal(name, IDENTITY).part("p", "numbers").once(b"", 1, lambda: None)
    assert struct.pack(f"<{len(finite)}d", *kept) == struct.pack(f"<{len(finite)}d", *finite)
    array = np.frombuffer(struct.pack(f"<{len(numbers)}d", *numbers))
    assert unpack(pack(array)).tobytes() == array.tobytes()


def test_a_full_disk_costs_no_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(name, IDENTITY)
    part = journal.part("p", "pieces")
    part.once([0], 1, lambda: 0)
    write = os.write
    monkeypatch.setattr("slimbench.harness.store.partial.os.write", lambda file, line: write(file, line[:-9]))
    assert [part.once([piece], 1, lambda piece=piece: piece) for piece in (1, 2)] == [1, 2]
    monkeypatch.undo()
    again = Journal(name, IDENTITY).part("p", "pieces")
    assert [again.once([piece], 1, lambda: "new") for piece in range(3)] == [0, "new", "new"]

"""What the committed ledgers must show: parts that make the step, and gains that were foretold and then measured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from slimbench.harness.schema.ledger import Ledger
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.explain.advice import forecasts
from slimbench.leaderboard.explain.measured import gains

OWN = {"transformers", "compiled"}
SEED, DRAWN, WITHIN = 21, 8, 0.10


@pytest.fixture(scope="module")
def told(committed: list[Record]) -> list[Record]:
    """Records with a ledger of parts, on engines that show them."""
    return [r for r in committed if r.speed and r.cell.engine in OWN and any(ledger.parts for ledger in r.speed.ledgers)]


def shares(record: Record) -> Iterator[tuple[str, float]]:
    """Of both kinds of step, and of those of the reference: what the parts make of them."""
    assert record.speed
    for role, ledgers in (("candidate", record.speed.ledgers), ("reference", record.speed.reference_ledgers)):
        for ledger in ledgers:
            yield f"{record.cell.pipeline} on {record.cell.engine}, {role}, {ledger.phase}", 1 - ledger.rest_ms / ledger.step_ms


def test_parts_make_the_step_wherever_there_is_a_ledger(told: list[Record]) -> None:
    found = dict(share for record in told for share in shares(record))
    assert all(0.90 <= share <= 1.05 for share in found.values()), {n: s for n, s in found.items() if not 0.90 <= s <= 1.05}


def test_parts_make_the_step_of_thirty_artefacts_on_our_engines(told: list[Record]) -> None:
    assert len(told) == len({(r.cell.keys.compress, r.cell.engine) for r in told}), "each pair once"
    missed = [(r.cell.pipeline, r.cell.engine) for r in told if not all(0.90 <= share <= 1.05 for _, share in shares(r))]
    assert missed == [] and len(told) - len(missed) >= 30


def pairs(told: list[Record]) -> list[tuple[str, float, float]]:
    """Gains of decoding that were foretold, and measured in a cell that has the setting: one of two cells that foretell each other."""
    found: dict[frozenset[str], tuple[str, float, float]] = {}
    for record in sorted(told, key=lambda record: (record.cell.pipeline, record.cell.engine)):
        peers = [other for other in told if other.hardware.fingerprint == record.hardware.fingerprint]
        assert record.speed
        decode: Ledger = next(ledger for ledger in record.speed.ledgers if ledger.phase == "decode")
        for other in peers:
            for each in forecasts(decode, gains(record, decode, [other])):
                if each.measured is not None:
                    both = frozenset({record.cell.keys.speed, other.cell.keys.speed})
                    name = f"{record.cell.pipeline} on {record.cell.engine}: {each.setting}"
                    found.setdefault(both, (name, each.gain, each.measured))
    return sorted(found.values())


def test_gains_that_are_foretold_are_measured_within_a_tenth(told: list[Record]) -> None:
    """Of all settings that exist some are drawn by seed, those that make a step slower among them; who foretells nothing is told."""
    known = pairs(told)
    print({name: (round(foretold, 3), round(measured, 3)) for name, foretold, measured in known})
    better, worse = ([one for one in known if (one[1] > 1) is faster] for faster in (True, False))
    rng = np.random.default_rng(SEED)
    drawn = [some[i] for some in (better, worse) for i in rng.permutation(len(some))[: DRAWN // 2]]
    assert len(drawn) >= 6
    assert any(max(foretold, measured) < 0.95 for _, foretold, measured in drawn), "a setting that is clearly worse"
    assert any(abs(measured - 1) > WITHIN for _, _, measured in drawn), "that nothing changes would not do"
    assert all(abs(measured / foretold - 1) <= WITHIN for _, foretold, measured in drawn), drawn

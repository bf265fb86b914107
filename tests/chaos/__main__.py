"""`python -m tests.chaos`: throw faults at sweeps and tell what they did."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tests.chaos.campaign import KINDS, Campaign, Played
from tests.chaos.invariants import Outcome


def shares(faults: int, kinds: list[str]) -> dict[str, int]:
    """How many faults of each class: the floors of a campaign of 300, scaled, and the rest to the classes in turn."""
    floors = {kind: KINDS[kind].floor for kind in kinds}
    wanted = {kind: max(1, faults * floor // max(300, sum(floors.values()))) for kind, floor in floors.items()}
    for turn in range(max(0, faults - sum(wanted.values()))):
        wanted[kinds[turn % len(kinds)]] += 1
    return wanted


def table(played: list[Played]) -> str:
    """Fault × outcome by class, as Markdown."""
    seen = [outcome for outcome in Outcome if any(outcome in case.outcomes for case in played)]
    shown = [Outcome.OK, *(outcome for outcome in Outcome if outcome is not Outcome.OK)]
    rows = [["class", "faults", "sweeps", "launches", *(str(outcome) for outcome in shown)]]
    kinds = [kind for kind in KINDS if any(case.kind == kind for case in played)]
    for kind in [*kinds, "all"]:
        cases = [case for case in played if kind in (case.kind, "all")]
        outcomes = Counter({outcome: 0 for outcome in seen})
        for case in cases:
            for outcome in case.outcomes:
                outcomes[outcome] += len(case.thrown)
        numbers = [sum(len(case.thrown) for case in cases), len(cases), sum(case.launches for case in cases)]
        rows.append([kind, *map(str, numbers), *(str(outcomes[outcome]) for outcome in shown)])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=300, help="how many are thrown in all (300)")
    parser.add_argument("--class", dest="kinds", action="append", choices=list(KINDS), help="only this class; may be given again")
    parser.add_argument("--seed", type=int, default=16, help="of what is drawn (16)")
    parser.add_argument("--journal", type=Path, default=Path("chaos"), help="folder of the campaign; its faults.jsonl tells of each case")
    parser.add_argument("--resume", action="store_true", help="go on with the campaign in that folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="sweeps at a time (one for each core)")
    asked = parser.parse_args()
    campaign = Campaign(asked.journal.absolute(), asked.seed)
    played = campaign.run(shares(asked.faults, asked.kinds or list(KINDS)), asked.jobs, asked.resume)
    print(table(played))
    return any(case.breaches for case in played)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.chaos`: throw faults at sweeps and tell what they did."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tests.chaos.campaign import KINDS, Campaign, Played
from tests.chaos.invariants import Outcome
from tests.chaos.tables import put

FREE = ("signals", "storage", "corruption")  # among which what no floor asks for is shared out


def shares(faults: int, kinds: list[str]) -> dict[str, int]:
    """How many faults of each class: the floors of a campaign of 300, scaled, at least one, and the rest where a launch takes many."""
    wanted = {kind: max(1, faults * KINDS[kind].floor // 300) for kind in kinds}
    free = [kind for kind in FREE if kind in kinds] or kinds
    for turn in range(faults - sum(wanted.values())):
        wanted[free[turn % len(free)]] += 1
    return wanted


def by_fault(played: list[Played]) -> str:
    """Fault × outcome, a line for each that was thrown, without where and how often."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in played:
        for what in case.thrown:
            counts.setdefault((case.kind, what.partition(",")[0]), Counter()).update(case.outcomes)
    lines = [
        f"{kind:12} {what:70} {', '.join(f'{count} {name}' for name, count in found.items())}" for (kind, what), found in counts.items()
    ]
    return "\n".join(sorted(lines))


def by_class(played: list[Played]) -> str:
    """Class × outcome, as Markdown."""
    shown = list(Outcome)
    rows = [["class", "faults", "cases", "launches", *map(str, shown)]]
    for kind in [*(kind for kind in KINDS if any(case.kind == kind for case in played)), "all"]:
        cases = [case for case in played if kind in (case.kind, "all")]
        outcomes = Counter({outcome: sum(len(case.thrown) for case in cases if outcome in case.outcomes) for outcome in shown})
        numbers = [sum(len(case.thrown) for case in cases), len(cases), sum(case.launches for case in cases)]
        rows.append([kind, *map(str, numbers), *(str(outcomes[outcome]) for outcome in shown)])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=300, help="how many are thrown in all (300)")
    parser.add_argument("--class", dest="kinds", action="append", choices=list(KINDS), help="only this class; may be given again")
    parser.add_argument("--seed", type=int, default=16, help="of what is drawn (16)")
    parser.add_argument(
        "--journal", type=Path, default=Path("chaos-campaign"), help="folder of the campaign; its faults.jsonl tells of each case"
    )
    parser.add_argument("--table", type=Path, help="a Markdown file whose part `campaign` gets the table, such as docs/faults.md")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the campaign in that folder; what broke something is played again"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="sweeps at a time (one for each core)")
    asked = parser.parse_args()
    campaign = Campaign(asked.journal.absolute(), asked.seed)
    played = campaign.run(shares(asked.faults, asked.kinds or list(KINDS)), asked.jobs, asked.resume)
    print(f"{by_fault(played)}\n\n{by_class(played)}")
    if asked.table:
        command = f"`python -m tests.chaos --faults {asked.faults} --seed {asked.seed}`"
        work = sum(case.seconds for case in played) / 60
        put(asked.table, "campaign", f"{by_class(played)}\n\nMade by {command}: {work:.0f} minutes of cases, {asked.jobs} at a time.")
    return any(case.breaches for case in played)


if __name__ == "__main__":
    sys.exit(main())

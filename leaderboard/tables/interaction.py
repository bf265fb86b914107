"""Pipelines of several steps beside each step alone, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.leaderboard.compare.interaction import Joint
from slimbench.leaderboard.tables.format import decimal
from slimbench.leaderboard.tables.grids import span

READING = (
    "Perplexity over dense, in per cent above it; the interaction is that of the pipeline over the product of its steps alone, with a 95 % "
    "interval over windows: above 0 the steps hurt each other."
)


def lines(found: Sequence[Joint]) -> list[dict[str, str]]:
    """A line for each pipeline."""
    return [
        {
            "pipeline": joint.row.label,
            "steps alone": ", ".join(percent(loss.value) for loss in joint.losses),
            "expected": percent(joint.expected),
            "measured": percent(joint.loss.value),
            "interaction": span(joint.interaction),
            "told apart": joint.verdict,
        }
        for joint in found
    ]


def markdown(found: Sequence[Joint]) -> str:
    """The table."""
    made = lines(found)
    head = list(made[0]) if made else []
    rows = [head, ["---"] * len(head), *([line[key] for key in head] for line in made)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows if row)


def percent(ratio: float) -> str:
    """A ratio as the per cent above one."""
    return f"{decimal(1, signed=True)(100 * (ratio - 1))} %"

"""The continuations of a cell beside those of the reference: the prompts at which it goes furthest astray."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.harness.schema.quality import QualityResult
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.pairing import paired_continuations
from slimbench.leaderboard.tables.format import decimal, shorten

HEADER = ("Prompt", "The reference goes on", "This cell goes on", "1st divergent", "Divergent %")
_MOST = 5
_LONGEST = 300


def worst(ours: QualityResult, theirs: QualityResult | None) -> list[Sequence[str]]:
    """The prompts with the largest share of divergent tokens, at equal shares those that differ first; none that do not differ.

    Returns:
        For each a text under every heading of `HEADER`.
    """
    paired, mine, other = paired_continuations(ours, theirs), ours.generation, theirs.generation if theirs else None
    if mine is None or other is None:
        return []
    astray = [place for place, (_, apart) in enumerate(paired) if apart.divergent]
    astray.sort(key=lambda place: (-paired[place][1].divergent, paired[place][1].first, place))
    percent = decimal(0, 100)
    return [
        (
            _cut(f"{paired[place][0]}: {mine.asked.texts[place]}"),
            _cut(other.texts[place]),
            _cut(mine.texts[place]),
            str(paired[place][1].first),
            percent(paired[place][1].divergent),
        )
        for place in astray[:_MOST]
    ]


def _cut(text: str) -> str:
    return shorten(clean(text), _LONGEST)

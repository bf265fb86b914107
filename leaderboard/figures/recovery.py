"""What training gives back: perplexity over the tokens of recovery, from the pruned model on."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from slimbench.leaderboard.figures.canvas import Plot, canvas, side_legend, spread_axis
from slimbench.leaderboard.figures.drawing import INK
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.figures.measures import PERPLEXITY, TOKENS, Point, points
from slimbench.leaderboard.figures.palette import Palette
from slimbench.leaderboard.figures.scatter import corpus
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recovery(group: Group) -> Plot:
    """A line for each pruned model and each way of its recovery, beginning with the model before that recovery.

    Its colour is the model's, its marker the way's; the legend has the order in which the lines end.

    Raises:
        Unplottable: No pruned model was measured before and after a training.
    """
    by_pipeline = {row.pipeline: row for row in group.rows if row.perplexity is not None}
    series: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in group.rows:
        before, plus, last = row.pipeline.rpartition("+")
        if plus and before in by_pipeline and row.perplexity is not None and _tokens(row) > _tokens(by_pipeline[before]):
            series[before, last.partition("(")[0]].append(row)
    if not series:
        raise Unplottable("no pruned model was measured before and after a training")
    begun = {key: [by_pipeline[key[0]], *sorted(own, key=_tokens)] for key, own in series.items()}
    drawn = dict(sorted(begun.items(), key=lambda part: (-(part[1][-1].perplexity or 0.0), part[0])))
    models, ways = Palette(tuple(sorted({key[0] for key in drawn}))), Palette(tuple(sorted({key[1] for key in drawn})))
    shown = [row for own in drawn.values() for row in own]
    lines = {key: _line(own) for key, own in drawn.items()}
    hidden = left_out(group, shown + [row for row in group.rows if row.is_reference], "recovery")
    said = "Bars are 95 % intervals. Lines begin with the model before this training; the legend has the order of their ends."
    text = " ".join(filter(None, [said, hidden]))
    title = "Perplexity over the tokens of recovery"
    dense = group.reference.perplexity if group.reference else None

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 5.6)
        for (before, last), line in lines.items():
            colour, way = models.look(before).colour, ways.look(last)
            face = {"mfc": "white", "mec": colour, "mew": 1.3} if way.dashes != "-" else {"mec": "white", "mew": 0.7}
            style: dict[str, Any] = {"color": colour, "marker": way.marker, "ls": way.dashes, "ms": 6.5, **face}
            spread = [[p.y - p.low for p in line], [p.high - p.y for p in line]]
            label = shorten(f"{before} + {last}", 44)
            ax.errorbar([p.x / 1000 for p in line], [p.y for p in line], yerr=spread, lw=1.5, elinewidth=1, label=label, **style)
        if dense:
            ax.axhline(dense, color=INK, lw=1, ls=(0, (4, 2)), zorder=1, label="dense")
        spread_axis(ax, "y", [row.perplexity or 1.0 for row in shown] + ([dense] if dense else []))
        most = max(point.x for line in lines.values() for point in line) / 1000
        ax.set_xlim(-0.03 * most, 1.06 * most)
        ax.set_xlabel("tokens of training, thousands")
        ax.set_ylabel(f"{corpus(group)}{PERPLEXITY.label}", parse_math=False)
        side_legend(ax)
        return figure

    gains = [((own[-1].perplexity or 1.0) / (own[0].perplexity or 1.0) - 1, own) for own in drawn.values()]
    gain, own = min(gains, key=lambda pair: pair[0])
    tokens = f"{_line(own)[-1].x:,.0f} tokens"
    reading = f"{own[-1].label} gains most: perplexity {decimal(1, 100, signed=True)(gain)} % by {tokens}."
    return Plot(TOKENS.name, group, title, reading, text, make)


def _tokens(row: Row) -> int:
    return row.training_tokens or 0


def _line(own: list[Row]) -> list[Point]:
    """The rows at the tokens that they were trained on after the first of them."""
    after = [row.model_copy(update={"training_tokens": _tokens(row) - _tokens(own[0])}) for row in own]
    return points(after, TOKENS, PERPLEXITY)

"""The kinds of figures, and which of them the rows of a board allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from slimbench.harness.config.errors import ConfigError
from slimbench.leaderboard.figures.bars import flips, memory
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.grids import grids
from slimbench.leaderboard.figures.groups import Group, Grouping, Unplottable, by_quality, by_speed, by_suite, by_table, measured
from slimbench.leaderboard.figures.joint import joint
from slimbench.leaderboard.figures.lines import active, bits, degradation, held, removed, sparsity
from slimbench.leaderboard.figures.measures import ACCURACY, BITS, BYTES, PERPLEXITY, SPEED
from slimbench.leaderboard.figures.palette import Palette
from slimbench.leaderboard.figures.policies import drafts, stream
from slimbench.leaderboard.figures.recovery import recovery
from slimbench.leaderboard.figures.retrieval import HELD_BYTES, STEP_MS, retrieval
from slimbench.leaderboard.figures.scatter import against, divergence
from slimbench.leaderboard.figures.seeds import seeds
from slimbench.leaderboard.figures.speedups import speedups
from slimbench.leaderboard.figures.tasks import tasks
from slimbench.leaderboard.rows.row import Row
from slimbench.util.text import nearest


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        about: What it shows, in words.
        groups: Which rows it puts together.
        make: Draws a group, or raises `Unplottable`.
    """

    name: str
    about: str
    groups: Grouping
    make: Callable[[Group], Plot]


KINDS = (
    Kind("perplexity-bytes", "perplexity against the bytes of the weights", by_quality, partial(against, y=PERPLEXITY, x=BYTES)),
    Kind("perplexity-bits", "perplexity against the bits of a weight", by_quality, partial(against, y=PERPLEXITY, x=BITS)),
    Kind("perplexity-speed", "perplexity against decode speed", by_table, partial(against, y=PERPLEXITY, x=SPEED)),
    Kind("accuracy-bytes", "zero-shot accuracy against the bytes of the weights", by_quality, partial(against, y=ACCURACY, x=BYTES)),
    Kind("accuracy-bits", "zero-shot accuracy against the bits of a weight", by_quality, partial(against, y=ACCURACY, x=BITS)),
    Kind("accuracy-speed", "zero-shot accuracy against decode speed", by_table, partial(against, y=ACCURACY, x=SPEED)),
    Kind("methods-bits", "perplexity over bits, a line for each method", by_quality, bits),
    Kind("grids", "methods of equal bits on common grids", by_quality, grids),
    Kind("methods-sparsity", "perplexity over sparsity, a line for each method", by_quality, sparsity),
    Kind("methods-removed", "perplexity over the parameters removed, a line for each method", by_quality, removed),
    Kind("methods-active", "perplexity over the parameters that take part in a token", by_quality, active),
    Kind("methods-cache", "perplexity over the bytes of the cache that are held for a text", by_quality, held),
    Kind("retrieval-bytes", "facts found in long contexts over the bytes held of them", by_quality, partial(retrieval, x=HELD_BYTES)),
    Kind("retrieval-ms", "facts found in long contexts over the time of a step behind them", by_quality, partial(retrieval, x=STEP_MS)),
    Kind("stream", "perplexity along one text through one cache", by_quality, stream),
    Kind("drafts", "tokens of a pass and speed-up with drafts, beside what the passes should give", by_speed, drafts),
    Kind("recovery", "perplexity over the tokens of recovery, from the pruned model on", by_quality, recovery),
    Kind("joint", "pipelines beside their steps alone", by_quality, joint),
    Kind("degradation", "perplexity above dense over the size of the model", by_suite, degradation),
    Kind("speedup", "speed-up over batch and context, with the roofline", by_speed, partial(speedups, phase="decode")),
    Kind("prompt-speedup", "speed-up of the prompt over batch and context", by_speed, partial(speedups, phase="prefill")),
    Kind("memory", "weights, KV cache and activations", by_speed, memory),
    Kind("divergence", "KL to the dense model against perplexity", by_quality, divergence),
    Kind("flips", "answers that turned wrong and right", by_quality, flips),
    Kind("seeds", "spread of the perplexity over seeds", by_quality, seeds),
    Kind("tasks", "accuracy differences by method and task", by_quality, tasks),
)


@dataclass(frozen=True)
class Absent:
    """A figure that the rows of a group do not allow, with the reason; `rows` are those that were measured."""

    kind: str
    title: str
    reason: str
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.title}: {self.reason}"


def names() -> list[str]:
    return [kind.name for kind in KINDS]


def kind(name: str) -> Kind:
    """The kind of a name; `ConfigError` with the nearest one if there is none."""
    found = next((kind for kind in KINDS if kind.name == name), None)
    if found is None:
        raise ConfigError(f"no figure '{name}'{nearest(name, names())}")
    return found


def figures(board: Sequence[Row], only: Sequence[str] = ()) -> Iterator[Plot | Absent]:
    """Every figure that the rows allow, and for each group that allows none of a kind the reason. Nothing is drawn yet.

    Args:
        only: Names of kinds; all if none is given.
    """
    palette = Palette.of(board)
    for chosen in [kind(name) for name in only] or KINDS:
        for group in chosen.groups(board, palette):
            try:
                yield chosen.make(group)
            except Unplottable as reason:
                yield Absent(chosen.name, group.title, str(reason), sum(map(measured, group.rows)))

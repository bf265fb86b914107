"""How far the reference's own distributions move where nothing should: what a distance from it must exceed to say anything.

The same weights on the same windows, in batches of another size, and with another arithmetic. Nothing was compressed, so a Kullback-Leibler
divergence as large as this is that of rounding and of the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from slimbench.harness.config.sections.suite import BATCH_TOKENS
from slimbench.harness.measure.loaded import Scores
from slimbench.harness.measure.perplexity import OnProgress, Windows
from slimbench.harness.schema.quality import NoiseResult
from slimbench.harness.store.partial import Part

_ROWS = 64  # positions whose whole distributions are compared at once


def measure(
    model: Scores, windows: Windows, count: int, others: Mapping[str, Callable[[], Scores]], on_progress: OnProgress, part: Part
) -> list[NoiseResult]:
    """Score the first windows of a pass again, and compare whole distributions.

    Args:
        model: The reference, as it was scored.
        count: Windows at most.
        others: The same weights with another arithmetic, by name; each is opened in its turn and let go after it.
        part: Keeps each comparison.
    """
    ids = windows.ids[:count]
    size = model.batch(max(1, BATCH_TOKENS // windows.wanted.seqlen))
    turns = [(f"batches of {other}", lambda: model, other) for other in (1, 2) if other != size][:1]
    turns += [(name, opened, size) for name, opened in others.items()]
    found: list[NoiseResult] = []
    for name, opened, other_size in turns:
        on_progress(len(found), len(turns))
        kl = part.once([name, count], 1, partial(_compared, model, opened, windows, ids, (size, other_size)))
        found.append(NoiseResult(what=name, kl=kl, kl_mean=sum(kl) / len(kl)))
    return found


def divergence(logits: torch.Tensor, others: torch.Tensor) -> list[float]:
    """Mean KL(first ‖ second) in nats of each window, over the whole vocabulary.

    Args:
        logits, others: [B, T, V].
    """
    means = []
    for ours, theirs in zip(logits, others, strict=True):
        total = 0.0
        for p, q in zip(ours.split(_ROWS), theirs.to(ours.device).split(_ROWS), strict=True):
            logp, logq = (x.double().log_softmax(-1) for x in (p, q))
            total += float((logp.exp() * (logp - logq)).sum())
        means.append(total / len(ours))
    return means


def _compared(model: Scores, opened: Callable[[], Scores], windows: Windows, ids: torch.Tensor, sizes: tuple[int, int]) -> list[float]:
    other, kl = opened(), []
    for batch in ids.split(max(sizes)):
        ours, theirs = (
            torch.cat([windows.logits(one, piece) for piece in batch.split(size)]) for one, size in zip((model, other), sizes, strict=True)
        )
        kl += divergence(ours, theirs)
    return kl

"""Whether a token knows later ones: its logits must not move where only tokens behind it are others.

A policy says by which passes a text may be scored. Where whole texts go through the model at once, later tokens are there to be seen, and
a perplexity by what comes next is none. So two windows are scored again with other tokens from some place on. Where a policy decides by the
text how many rows go through a matrix, rounding moves logits a little, and once in a while a decision; so what is told is the median over
windows and places. Tokens that come one by one cannot know later ones.
"""

from __future__ import annotations

import statistics

import torch

from slimbench.harness.measure.loaded import Scores

WINDOWS = 2
_TOKENS = 512
_FEWEST = 64
_NEAR = 6
"""Positions before the changed tokens that are looked at."""
_PLACES = ((0, 7), (1, 5), (2, 3))
"""Eighths of a text behind its half, and tokens more: inside the blocks of a policy that has some."""
_ROUNDING = (0.1, 0.001)
"""Standard deviations, of logits in two bytes and in more."""


def texts(model: Scores, ids: torch.Tensor) -> torch.Tensor | None:
    """The beginnings of some windows [n, T] that are looked at; None where they are too short, or tokens come one by one."""
    length = min(_TOKENS, ids.shape[1], model.max_length)
    return ids[:WINDOWS, :length] if length >= _FEWEST and model.scoring in ("exact", "chunk", "suffix") else None


def moved(model: Scores, ids: torch.Tensor) -> tuple[float, float]:
    """By how much logits move where only tokens behind them change, in standard deviations of the logits of a position.

    Args:
        ids: As of `texts`.

    Returns:
        Of the positions just before the changed ones the most moved, the median over windows and places; and what rounding may move.
    """
    found, half, rounding = [], ids.shape[1] // 2, 0.0
    places = [half + eighths * (ids.shape[1] // 8) + more for eighths, more in _PLACES]
    for text in ids.split(model.batch(WINDOWS)):
        whole = _second_half(model, text)
        rounding = _ROUNDING[whole.dtype.itemsize > 2]
        for place in places:
            other = text.clone()
            other[:, place:] = (other[:, place:] + model.vocab_size // 2 + 1) % model.vocab_size
            before = slice(place - half - _NEAR, place - half)
            ours, theirs = (logits[:, before].float() for logits in (whole, _second_half(model, other)))
            found += ((ours - theirs).abs().mean(-1) / ours.std(-1)).amax(1).tolist()
    return statistics.median(found), rounding


def _second_half(model: Scores, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T - T // 2, V] of the second half, by the passes that the policy allows."""
    half = ids.shape[1] // 2
    if model.scoring != "suffix":
        return model.logits(ids, half)
    _, state = model.behind(ids[:, :half])
    return model.extend(ids[:, half:], state)[0]

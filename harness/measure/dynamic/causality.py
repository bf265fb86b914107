"""Whether a token knows later ones: its logits must not move where only tokens behind it are others.

A policy says by which passes a text may be scored. Where whole texts go through the model at once, later tokens are there to be seen, and a
perplexity by what comes next is none. So two windows are scored again with other tokens from some place on, at every other place with one
token again and again: what is chosen among all tokens of a text is then another choice for most of the earlier ones. Two things are told.
By how much all logits move: where a policy decides by the text how many rows go through a matrix, rounding moves them a little, and once in
a while a decision, so that is a median over windows and places, the larger one of the two kinds. And by how much the token that comes is
likelier than if it were another one: that is what a policy that looks ahead gains a token, though it may move a single logit; what rounding
moves has no direction. Tokens that come one by one cannot know later ones.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from slimbench.harness.measure.loaded import Scores

WINDOWS = 2
_TOKENS = 512
_FEWEST = 64
_NEAR = 6
"""Positions before the changed tokens that are looked at."""
_PLACES = 8
"""Of each text in its second half, from which on tokens are others: the first of a policy's blocks, their last and others."""
_ROUNDING = (0.1, 0.001)
"""Standard deviations, of logits in two bytes and in more."""
_GAIN, _SURE = 0.05, 4.0
"""Nats that a token may gain, and standard errors that they must exceed."""


@dataclass(frozen=True)
class Seen:
    """What a token knows of later ones.

    Attributes:
        moved: By how much logits move where only tokens behind them change, in standard deviations of the logits of a position: of the
            positions just before the changed ones the most moved, the median over windows and places, the larger of the two kinds.
        rounding: What rounding may move.
        gain: Nats by which the first of the changed tokens was likelier before it was changed, mean over windows and places.
        error: Standard error of that mean.
    """

    moved: float
    rounding: float
    gain: float
    error: float

    def flags(self) -> list[str]:
        """A line where tokens know later ones."""
        if self.moved > self.rounding:
            return [f"not causal: logits move by {self.moved:.0%} of their spread where only later tokens are others"]
        if self.gain > _GAIN and self.gain > _SURE * self.error:
            return [f"not causal: each token is {self.gain:.2f} nats likelier for being the one that comes"]
        return []


def texts(model: Scores, ids: torch.Tensor) -> torch.Tensor | None:
    """The beginnings of some windows [n, T] that are looked at; None where they are too short, or tokens come one by one."""
    length = min(_TOKENS, ids.shape[1], model.max_length)
    return ids[:WINDOWS, :length] if length >= _FEWEST and model.scoring in ("exact", "chunk", "suffix") else None


def look(model: Scores, ids: torch.Tensor) -> Seen:
    """See what tokens of some texts know of later ones; `ids` as of `texts`."""
    found, gains, half, rounding = (list[float](), list[float]()), list[float](), ids.shape[1] // 2, 0.0
    for text in ids.split(model.batch(WINDOWS)):
        whole = _second_half(model, text)
        rounding = _ROUNDING[whole.dtype.itemsize > 2]
        for number, place in enumerate(_places(ids.shape[1])):
            other, alike = text.clone(), number % 2
            behind = text[:, place : place + 1] if alike else text[:, place:]
            other[:, place:] = (behind + model.vocab_size // 2 + 1) % model.vocab_size
            before = slice(place - half - _NEAR, place - half)
            ours, theirs = (logits[:, before].float() for logits in (whole, _second_half(model, other)))
            found[alike].extend(((ours - theirs).abs().mean(-1) / ours.std(-1)).amax(1).tolist())
            likely, unlikely = (_logprobs(logits[:, -1], text[:, place]) for logits in (ours, theirs))
            gains += (likely - unlikely).tolist()
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return Seen(max(map(statistics.median, found)), rounding, statistics.fmean(gains), error)


def _places(length: int) -> list[int]:
    """Spread over the second half of a text of so many tokens, with no block length in common."""
    first, room = length // 2 + _NEAR + 1, length - length // 2 - _NEAR - 8
    return [first + number * room // _PLACES + 3 * number % 7 for number in range(_PLACES)]


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B] of tokens [B] by logits [B, V]."""
    return logits.log_softmax(-1).gather(-1, tokens.to(logits.device)[:, None])[:, 0]


def _second_half(model: Scores, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T - T // 2, V] of the second half, by the passes that the policy allows."""
    half = ids.shape[1] // 2
    if model.scoring != "suffix":
        return model.logits(ids, half)
    _, state = model.behind(ids[:, :half])
    return model.extend(ids[:, half:], state)[0]

"""What a model wrote: guesses that were taken, whether it is what it writes without them, or draws, and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from slimbench.harness.measure.dynamic.drawn import Drawn
from slimbench.harness.measure.generation import as_likely
from slimbench.harness.measure.loaded import Draws, Generates, Scores
from slimbench.harness.schema.work import DRAFT, WorkResult
from slimbench.methods.base import Unsupported

Passes = Sequence[tuple[int, int]]
"""Of each pass the tokens that went through it, and those that it gave."""
GRAM = 4
"""Tokens of a run that is looked for in what was written before it."""


@dataclass(frozen=True)
class Guessed:
    """What was guessed in one text, as its passes show it, whatever the draft says of itself.

    Attributes:
        passes: Of the model, behind the prompt's.
        drafted: Tokens that these checked beside the last of the text; None where the engine does not show them.
        accepted: Of these, tokens that became text: each pass gives one more than that.
    """

    passes: int
    drafted: int | None
    accepted: int

    @classmethod
    def of(cls, rows: Sequence[int] | None, gave: Sequence[int]) -> Guessed:
        """Of the rows of each pass, None where they are not shown, and the tokens that each gave."""
        return cls(len(gave), None if rows is None else sum(rows) - len(rows), sum(gave) - len(gave))


@dataclass(frozen=True)
class Held:
    """A text that was written with guesses against the one without.

    Attributes:
        equal: Tokens that are the same, place by place.
        others: Tokens that are not.
        unlikely: Of the tokens from the first other one on, those that the model would not choose behind the very text before them.
    """

    equal: int
    others: int
    unlikely: int = 0

    @property
    def by_rounding(self) -> bool:
        """It is another text, but of tokens that are hardly told apart from the likeliest: several tokens in a pass round otherwise than
        one, and what follows follows from that.
        """
        return self.others > self.unlikely == 0


def held(model: Generates, prompt: torch.Tensor, written: torch.Tensor, passes: Passes = ()) -> Held:
    """Hold what was written with guesses against what the same model, under the same other policies, writes without them.

    Args:
        prompt: Token ids, int64 [1, T].
        written: What came behind it, int64 [1, n].
        passes: By which it came (`Scores.in_passes`), where they are shown.
    """
    plain = model.unguessed(prompt, written.shape[1])
    others = written.cpu() != plain
    count = int(others.sum())
    if not count or not isinstance(model, Scores):
        return Held(written.shape[1] - count, count, count)
    first = int(others[0].nonzero()[0])
    return Held(written.shape[1] - count, count, unlikely(model, prompt, written, first, passes))


def unlikely(model: Scores, prompt: torch.Tensor, written: torch.Tensor, first: int, passes: Passes = ()) -> int:
    """How many tokens from a place of a text on the model would not choose behind what stands before each, up to rounding.

    Each is looked at token by token, as without guesses; in one pass where an engine adds no tokens to a cache. What is none of the
    likeliest then is looked at by passes of as many tokens as it was written by, which the model makes again without what guesses: some
    products round by more than two units otherwise there. An engine that computes in
    a narrower type than that of its logits rounds by more than two units of these: by as much as its distances to the likeliest are others
    where all tokens go through in one pass.

    Args:
        prompt: Token ids, int64 [1, T].
        written: What came behind it, int64 [1, n].
        first: Place in it.
        passes: As of `held`.
    """
    text, start = torch.cat([prompt.cpu(), written.cpu()], 1), prompt.shape[1] + first
    together = model.logits(text[:, :-1], start - 1)[0] if model.computes_narrower else None
    alone = _alone(model, text, start)
    chosen = text[0, start:].to(alone.device)
    near = as_likely(alone, chosen)
    if together is not None:
        below = _distances(alone, chosen)
        near |= below <= (below - _distances(together, chosen)).abs().max()
    if passes and not near.all():
        with suppress(Unsupported):
            near |= as_likely(model.in_passes(prompt, written, passes)[first:], chosen)
    return int((~near).sum())


def _alone(model: Scores, text: torch.Tensor, start: int) -> torch.Tensor:
    """As `_stepwise`; in one pass where an engine adds no tokens to a cache."""
    try:
        return _stepwise(model, text, start)
    except Unsupported:
        return model.logits(text[:, :-1], start - 1)[0]


def _before(model: Scores, prompt: torch.Tensor, written: torch.Tensor, passes: Passes) -> torch.Tensor:
    """Logits [n, V] before each token that was written, of the passes by which it came where these are known; arguments as of `held`."""
    if passes:
        with suppress(Unsupported):
            return model.in_passes(prompt, written, passes)
    return _alone(model, torch.cat([prompt.cpu(), written.cpu()], 1), prompt.shape[1])


def _stepwise(model: Scores, text: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [n, V] before each of the tokens of a text from a place on, which go through one by one."""
    logits, state = model.extend(text[:, :start])
    found = [logits[0, -1]]
    for token in text[:, start:-1].split(1, 1) if start < text.shape[1] - 1 else ():
        logits, state = model.extend(token, state)
        found.append(logits[0, -1])
    return torch.stack(found)


def _distances(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """By how much tokens [n] lie below the likeliest of logits [n, V]."""
    wide = logits.double()
    return wide.amax(-1) - wide.gather(-1, chosen[:, None])[:, 0]


def changes(texts: Sequence[Held]) -> float:
    """Share of the tokens that the model would not choose."""
    return sum(text.unlikely for text in texts) / sum(text.equal + text.others for text in texts)


def repeated(texts: Sequence[Sequence[int]], size: int = GRAM) -> float | None:
    """Share of the runs of so many tokens, in all texts, that stood in the same text before; None where no text is as long.

    Degenerate text goes round and round: guesses from the text itself are then right, and their gains are those of the loop.
    """
    again = runs = 0
    for text in texts:
        grams = [tuple(text[place : place + size]) for place in range(len(text) - size + 1)]
        runs += len(grams)
        again += len(grams) - len(set(grams))
    return again / runs if runs else None


@dataclass
class Written:
    """What came of all texts that a model went on with.

    Args:
        model: Which writes them; its guesses are looked at where it has any. What it draws, with guesses or without, is held against its
            own distribution in place of what it writes without guesses.
    """

    model: Generates
    texts: list[list[int]] = field(default_factory=list)
    guessed: list[Guessed] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    drawn: Drawn | None = field(init=False)

    def __post_init__(self) -> None:
        temperature = self.model.temperature if isinstance(self.model, Draws) else 0.0
        self.drawn = Drawn(temperature) if temperature else None

    def add(self, prompt: torch.Tensor, written: torch.Tensor, rows: Sequence[int] | None, gave: Sequence[int]) -> None:
        """Take in a text; arguments as of `held` and `Guessed.of`."""
        self.texts.append(written[0].tolist())
        known = rows is not None and len(rows) == len(gave) and all(had >= given for had, given in zip(rows, gave, strict=True))
        passes = list(zip(rows or (), gave, strict=True)) if known else []
        if DRAFT in self.model.slots:
            self.guessed.append(Guessed.of(rows, gave))
        if self.drawn:
            if isinstance(self.model, Scores):
                self.drawn.add(_before(self.model, prompt, written, passes), written[0].cpu())
        elif DRAFT in self.model.slots:
            self.held.append(held(self.model, prompt, written, passes))

    def tell(self, found: WorkResult) -> None:
        """Complete a result, and flag a text that guesses have changed."""
        found.repeated_4grams = repeated(self.texts)
        found.text_passes = [text.passes for text in self.guessed]
        found.text_drafted = [text.drafted for text in self.guessed if text.drafted is not None]
        found.text_accepted = [text.accepted for text in self.guessed]
        if self.drawn:
            found.temperature, found.drawn_p = self.drawn.temperature, self.drawn.p
            found.flags += filter(None, [self.drawn.flag])
        if not self.held:
            return
        found.equal = sum(text.equal for text in self.held) / sum(text.equal + text.others for text in self.held)
        found.parted_by_rounding = sum(text.by_rounding for text in self.held)
        if changed := changes(self.held):
            found.flags.append(f"guesses changed the text: {changed:.1%} of the tokens are none that the model would choose")

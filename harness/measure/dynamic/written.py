"""What a model under guesses wrote: guesses that were taken, whether it is what it writes without them, and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slimbench.harness.measure.generation import as_likely
from slimbench.harness.measure.loaded import Generates, Scores
from slimbench.harness.schema.work import DRAFT, WorkResult
from slimbench.methods.base import Unsupported

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
        by_rounding: The first of these is hardly told apart from the likeliest one: several tokens in a pass round otherwise than one,
            and what follows follows from that.
    """

    equal: int
    others: int
    by_rounding: bool = False


def held(model: Generates, prompt: torch.Tensor, written: torch.Tensor) -> Held:
    """Hold what was written with guesses against what the same model, under the same other policies, writes without them.

    Args:
        prompt: Token ids, int64 [1, T].
        written: What came behind it, int64 [1, n].
    """
    plain = model.unguessed(prompt, written.shape[1])
    others = written.cpu() != plain
    count = int(others.sum())
    if not count or not isinstance(model, Scores):
        return Held(written.shape[1] - count, count)
    first = int(others[0].nonzero()[0])
    return Held(written.shape[1] - count, count, decided_by_rounding(model, prompt, plain[:, :first], int(written[0, first])))


def decided_by_rounding(model: Any, prompt: torch.Tensor, before: torch.Tensor, chosen: int) -> bool:
    """Whether a token behind a prompt [1, T] and some tokens [1, n] is as good as the likeliest one, token by token as without guesses; in
    one pass where an engine adds no tokens to a cache.
    """
    try:
        logits, state = model.extend(prompt)
        for token in before.split(1, 1) if before.shape[1] else ():
            logits, state = model.extend(token, state)
    except Unsupported:
        logits = model.logits(torch.cat([prompt.cpu(), before.cpu()], 1), prompt.shape[1] + before.shape[1] - 1)
    return bool(as_likely(logits[0, -1], torch.tensor(chosen, device=logits.device)))


def changes(texts: Sequence[Held]) -> float:
    """Share of the tokens that are others without guesses, in texts that do not part by rounding."""
    return sum(text.others for text in texts if not text.by_rounding) / sum(text.equal + text.others for text in texts)


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
        model: Which writes them; its guesses are looked at where it has any.
    """

    model: Generates
    texts: list[list[int]] = field(default_factory=list)
    guessed: list[Guessed] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)

    def add(self, prompt: torch.Tensor, written: torch.Tensor, rows: Sequence[int] | None, gave: Sequence[int]) -> None:
        """Take in a text; arguments as of `held` and `Guessed.of`."""
        self.texts.append(written[0].tolist())
        if DRAFT in self.model.slots:
            self.guessed.append(Guessed.of(rows, gave))
            self.held.append(held(self.model, prompt, written))

    def tell(self, found: WorkResult) -> None:
        """Complete a result, and flag a text that guesses have changed."""
        found.repeated_4grams = repeated(self.texts)
        if not self.held:
            return
        found.text_passes = [text.passes for text in self.guessed]
        found.text_drafted = [text.drafted for text in self.guessed if text.drafted is not None]
        found.text_accepted = [text.accepted for text in self.guessed]
        found.equal = sum(text.equal for text in self.held) / sum(text.equal + text.others for text in self.held)
        found.parted_by_rounding = sum(text.by_rounding for text in self.held)
        if changed := changes(self.held):
            found.flags.append(f"guesses changed the text: {changed:.1%} of the tokens are others without them")

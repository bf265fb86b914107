"""Policies of the slot `draft`: cheap guesses at the next tokens, which the model itself then checks all at once.

After a text x, γ tokens are guessed. One pass of the model over the last token of x and the guesses tells what it would have chosen at each
place; the guesses are taken as far as they agree with that, and the model's own choice after them. So every pass gives one token at
least, and the text is the model's own greedy one: in exact arithmetic drafts change time alone. Where tokens are drawn, guesses are, and
their distribution is the model's own (`sampling`). Where the guesses come from:

    lookup    the text itself: what followed where its last tokens, at most `ngram` of them, stood for the first time before
    exit      the first `blocks` blocks of the model, its norm and its head. Their keys, values and states are taken over when the guesses
              are checked, so that these blocks run once for each token
    model     another model of the same tokens, greedily, with a cache of its own; both caches let go of what was guessed wrongly

One text at a time. Guesses never reach beyond the tokens that are wanted. Logits of a given text are those of the base. Where a policy of
attention or cache is in force, what wrong guesses left in its cache is undone: it goes back to where it was before them, and sees those
that were right again (`methods.formats.attention.operators.interface.Kept`).

Sources: speculative decoding (Leviathan et al., arXiv 2211.17192, algorithm 1), prompt lookup (Saxena, 2023), LayerSkip
(Elhoushi et al., arXiv 2404.16710, §4.3).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import BROUGHT_MODEL, Policy, Scoring, load_base

if TYPE_CHECKING:
    from slimbench.methods.formats.draft.speculation import Drafter


class DraftPolicy(Policy):
    """Guesses before each pass.

    Attributes:
        tokens: γ; 0: none, and the base is reproduced.
    """

    slot = "draft"
    tokens: int

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def max_batch(self) -> int:
        return 1

    def neutral(self) -> DraftPolicy:
        return replace(self, tokens=0)  # type: ignore[type-var]

    @abstractmethod
    def drafter(self, model: Any) -> Drafter:
        """What guesses, for one loaded model."""

    def install(self, model: Any) -> None:
        """Leaves in the model's `drafter` what guesses; raises `Unsupported` if its parts are not known."""
        model.drafter = self.drafter(model)


@dataclass(frozen=True)
class Lookup(DraftPolicy):
    """Guesses from the text itself.

    Attributes:
        tokens: γ at most.
        ngram: Tokens that are looked for at most.
    """

    kind = "lookup"

    tokens: int
    ngram: int

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.ngram < 1:
            raise ValueError(f"tokens must not be negative and ngram at least 1, not {self.tokens} and {self.ngram}")

    def check(self, shape: ModelShape) -> None:
        """Any model."""

    def drafter(self, model: Any) -> Drafter:
        from slimbench.methods.formats.draft.speculation import LookupDrafter

        return LookupDrafter(model, self.tokens, self.ngram)


@dataclass(frozen=True)
class Exit(DraftPolicy):
    """Guesses of the first blocks.

    Attributes:
        tokens: γ.
        blocks: Blocks that guess.
    """

    kind = "exit"

    tokens: int
    blocks: int

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.blocks < 1:
            raise ValueError(f"tokens must not be negative and blocks at least 1, not {self.tokens} and {self.blocks}")

    def check(self, shape: ModelShape) -> None:
        if self.blocks >= shape.num_layers:
            raise Unsupported(f"of {shape.num_layers} blocks fewer than all must guess, not {self.blocks}")

    def drafter(self, model: Any) -> Drafter:
        from slimbench.methods.formats.draft.speculation import ExitDrafter

        return ExitDrafter(model, self.tokens, self.blocks)


def check_vocabulary(draft: int, model: int) -> None:
    """Raise `Unsupported` if a model that guesses has other tokens, by their numbers, than the one that checks."""
    if draft != model:
        raise Unsupported(f"a draft must have the tokens of the model; it has {draft:,}, the model {model:,}")


@dataclass(frozen=True)
class Model(DraftPolicy):
    """Guesses of another model.

    Attributes:
        tokens: γ.
        base: Format of the other model.
        model: Its folder.
    """

    kind = "model"

    tokens: int
    base: str
    model: Path | None = field(default=None, repr=False, compare=False, metadata=BROUGHT_MODEL)

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens must not be negative, not {self.tokens}")

    def check(self, shape: ModelShape) -> None:
        """Any model."""

    def install(self, model: Any) -> None:
        """Leaves the other model in the model's `draft`, a part of it, so that whoever looks what a model holds and runs sees it too.

        Raises:
            Unsupported: The other model has other tokens.
        """
        assert self.model is not None
        model.draft = load_base(self.model, self.base, "cpu" if model.device.type == "meta" else str(model.device))
        check_vocabulary(model.draft.config.vocab_size, model.config.vocab_size)
        super().install(model)

    def drafter(self, model: Any) -> Drafter:
        from slimbench.methods.formats.draft.speculation import ModelDrafter

        return ModelDrafter(model, self.tokens, model.draft)

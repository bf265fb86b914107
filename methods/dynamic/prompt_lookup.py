"""Prompt lookup: what a text has said before is guessed to come again (A. Saxena, prompt lookup decoding, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.policy import Policy


@dataclass(frozen=True)
class PromptLookup(PolicyMethod):
    """Guesses that cost nothing (`methods.formats.draft.policy`); what they gain depends on how much a text repeats itself.

    Attributes:
        tokens: Guesses of a pass at most.
        ngram: Tokens that are looked for at most.
    """

    name = "prompt-lookup"
    slot = "draft"
    citation = Citation("Prompt lookup decoding", year=2023)

    tokens: int = 10
    ngram: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Lookup(self.tokens, self.ngram)

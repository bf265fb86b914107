"""Policies that put an attention of their own into each layer; that lies in `methods.formats.attention.operators`.

What is imported here is nothing heavy, so that a plan can check settings.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import ModelShape
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary

ALL = 1 << 30
"""More tokens than any text has."""
LEARNED = ("relu", "hedgehog")
"""Features of linear attention whose maps are fitted; those of a head differ."""
FIRST = 4
"""Tokens at the beginning of a text that SpAtten keeps."""
OBSERVED = 64
"""Queries at the end of a prompt by which SnapKV judges."""


class OperatorPolicy(Policy):
    """One operator a layer."""

    attends = True

    @property
    def chunk(self) -> int:
        """Tokens that go through the cache at once while whole texts are scored."""
        return ALL

    @abstractmethod
    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        """That of a layer, counted from 0."""

    @abstractmethod
    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it sees as it would without the policy, itself included, of the `tokens` · (`tokens` + 1) / 2 pairs
        of a text.

        Args:
            prompt: Tokens at its beginning that went through the model at once; only of some policies it changes what is seen.
        """

    def check(self, shape: ModelShape) -> None:
        """Any size; what else a model must have is seen when it is loaded."""

    def install(self, model: Any) -> None:
        """Raises as `operators.interface.install`."""
        from slimbench.methods.formats.attention.operators.interface import install

        install(model, self.operator, self.chunk, self.rolls_back)
        model.exact_keys, model.reach = self.exact_keys, self.reach


def positive(**settings: int) -> None:
    """Raise `ValueError` for the first of them that is not at least 1."""
    for name, number in settings.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")

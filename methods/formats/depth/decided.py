"""Logits that were asked of a head before the model asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Decided:
    """Of the tokens of one text those whose logits are known; the model's own call of its head is then for the others alone.

    A model hands its head what its base gave, of all tokens or of the last ones, and that very memory tells its call from any other. What
    watches the head sees the rows that are left.

    Args:
        base: Gives the states of which the head makes logits.
        head: Of the model.
    """

    def __init__(self, base: Any, head: Any) -> None:
        self.clear()
        base.register_forward_hook(self._given)
        head.register_forward_pre_hook(self._ask)
        head.register_forward_hook(self._join)

    def clear(self) -> None:
        """Know nothing: another text goes through the base."""
        self._tokens: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._states: Tensor | None = None
        self._left: Tensor | None = None

    def add(self, tokens: Tensor, logits: Tensor) -> None:
        """Keep the logits [n, V] of some tokens of the text, int64 [n], as the head gave them."""
        if len(tokens):
            self._tokens.append(tokens)
            self._logits.append(logits)

    def _given(self, _: Any, __: Any, out: Any) -> None:
        states = out.last_hidden_state
        if len(states) == 1 and self._tokens:
            self._states = states
        else:
            self.clear()

    def _ask(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._states is None or not _are_the_last(inputs[0], self._states):
            return None
        unknown = torch.ones(self._states.shape[1], dtype=torch.bool, device=self._states.device)
        unknown[torch.cat(self._tokens)] = False
        self._left = unknown[-inputs[0].shape[1] :]
        return (inputs[0][:, self._left], *inputs[1:])

    def _join(self, _: Any, __: Any, out: Tensor) -> Tensor | None:
        if self._left is None or self._states is None:
            return None
        places, first = torch.cat(self._tokens), self._states.shape[1] - len(self._left)
        made = out.new_empty(1, len(self._left), out.shape[-1])
        made[:, self._left] = out
        made[0, places[places >= first] - first] = torch.cat(self._logits)[places >= first]
        self.clear()
        return made


def _are_the_last(states: Tensor, of: Tensor) -> bool:
    """Whether states [1, n, d] are the last ones of others [1, T, d], in the same memory."""
    if states.dim() != 3 or len(states) != 1 or states.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
        return False
    ends = [each.storage_offset() + each.shape[1] * each.stride(1) for each in (states, of)]
    return states.shape[1] > 0 and states.stride() == of.stride() and ends[0] == ends[1]

"""What every measurement asks of an artefact in memory, whichever engine loaded it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from slimbench.harness.schema.evidence import Evidence

_PIECE_BYTES = (1 << 23, 1 << 28)  # of float32 logits, on a CPU and elsewhere


Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with float32 logits [n, V], their log normalisers [n] and the log-probabilities of the labels [n]."""


@dataclass
class Step:
    """A greedy step: the next token of each sequence, int64 [B, 1], and the engine's own state (its KV cache)."""

    token: torch.Tensor
    state: Any


@runtime_checkable
class Scores(Protocol):
    """It gives the logits of every position of a text."""

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor: ...


@runtime_checkable
class Generates(Protocol):
    """It writes a text after a prompt."""

    def generate(self, ids: torch.Tensor, max_new: int, stop: Collection[int] = ()) -> list[list[int]]: ...


@runtime_checkable
class Encodes(Protocol):
    """It turns texts into vectors."""

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor: ...


class Loaded(ABC):
    """An artefact in memory, whatever it can do: that is told by `Scores`, `Generates` and `Encodes`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished; nothing to do where execution is synchronous."""

    def forget(self) -> None:  # noqa: B027
        """Let go of what runs at other shapes left in memory, as far as it can be made anew; steps of earlier runs end here."""

    @abstractmethod
    def evidence(self) -> Evidence:
        """What was loaded: layers, bytes, bits, zeros, operators."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lives."""


class LoadedModel(Loaded):
    """A causal language model in memory, ready to be measured: it scores and it generates.

    Attributes:
        vocab_size: Width of the logits.
        max_length: Positions that the model was made for.
        keeps_cache: The memory of a run's KV cache stays with the model for later runs.
    """

    vocab_size: int
    max_length: int
    keeps_cache = False

    @abstractmethod
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Next-token logits [B, T - start, V] of the positions from `start`, in the model's dtype.

        Args:
            ids: Token ids, int64 [B, T]; shorter sequences padded on the right (causal, so padding changes nothing before it).
            start: First position whose logits are wanted.
        """

    @abstractmethod
    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Process tokens [B, T] through the KV cache, after those that `state` holds (None: nothing yet).

        Returns:
            Next-token logits [B, T, V] in the model's dtype, and the state that holds these tokens too.
        """

    @abstractmethod
    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        """Process a prompt [B, T] and choose the first token.

        Args:
            ids: Token ids, int64 [B, T].
            room: Tokens that will follow at most, for engines whose KV cache does not grow.
        """

    @abstractmethod
    def decode_step(self, step: Step) -> Step:
        """Process one token of each sequence through the cache and choose the next one."""

    @abstractmethod
    def cache_bytes(self, state: Any) -> int | None:
        """Bytes of a KV cache, None where the engine does not show it."""

    def generate(self, ids: torch.Tensor, max_new: int, stop: Collection[int] = ()) -> list[list[int]]:
        """The greedy continuation of each prompt [B, T]: at most `max_new` tokens, up to and with the first that is in `stop`."""
        step = self.prefill(ids, max_new)
        written: list[list[int]] = [[] for _ in ids]
        for last in range(max_new - 1, -1, -1):
            for text, token in zip(written, step.token[:, 0].tolist(), strict=True):
                if not (text and text[-1] in stop):
                    text.append(token)
            if not last or all(text[-1] in stop for text in written):
                break
            step = self.decode_step(step)
        return written

    def token_logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the tokens 1..T-1 given those before, float32 [B, T-1]."""
        return label_logprobs(self.logits(ids)[:, :-1], ids[:, 1:]).cpu()


def label_logprobs(logits: torch.Tensor, labels: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """Log-probabilities of the labels, float32 [B, T], on the device of the logits.

    The softmax is taken in float32 whatever the model's dtype, a few positions at a time: on a CPU the piece stays in
    the cache (eight times faster than one that does not), on a GPU memory stays bounded.

    Args:
        logits: [B, T, V] in the model's dtype.
        labels: int64 [B, T].
        observe: Sees each piece before it is gone: positions in the order of `labels.flatten()`.
    """
    rows = max(1, _PIECE_BYTES[logits.device.type != "cpu"] // (4 * logits.shape[2]))
    flat, targets = logits.flatten(0, 1), labels.to(logits.device).flatten()
    found = []
    for piece, target in zip(flat.split(rows), targets.split(rows), strict=True):
        scores = piece.float()
        norm = torch.logsumexp(scores, -1)
        found.append(scores.gather(1, target[:, None])[:, 0] - norm)
        if observe:
            observe(scores, norm, found[-1])
    return torch.cat(found).view(labels.shape)

"""What an engine must be able to do, so that every engine is measured by one protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.record import Evidence

_PIECE_BYTES = (1 << 23, 1 << 28)  # of float32 logits, on a CPU and elsewhere


@dataclass
class Step:
    """A greedy step: the next token of each sequence, int64 [B, 1], and the engine's own state (its KV cache)."""

    token: torch.Tensor
    state: Any


class LoadedModel(ABC):
    """An artefact in memory, ready to be measured.

    Attributes:
        vocab_size: Width of the logits.
        max_length: Positions that the model was made for.
    """

    vocab_size: int
    max_length: int

    @abstractmethod
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Next-token logits [B, T - start, V] of the positions from `start`, in the model's dtype.

        Args:
            ids: Token ids, int64 [B, T]; shorter sequences padded on the right (causal, so padding changes nothing before it).
            start: First position whose logits are wanted.
        """

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> Step:
        """Process a prompt [B, T] and choose the first token."""

    @abstractmethod
    def decode_step(self, step: Step) -> Step:
        """Process one token of each sequence through the cache and choose the next one."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished; nothing to do where execution is synchronous."""

    @abstractmethod
    def cache_bytes(self, state: Any) -> int | None:
        """Bytes of a KV cache, None where the engine does not show it."""

    @abstractmethod
    def evidence(self) -> Evidence:
        """What was loaded: layers, bytes, bits, zeros, operators."""

    def token_logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the tokens 1..T-1 given those before, float32 [B, T-1].

        The softmax is taken in float32 whatever the model's dtype, a few positions at a time: on a CPU the piece stays in
        the cache (eight times faster than one that does not), on a GPU memory stays bounded.
        """
        logits, targets = self.logits(ids)[:, :-1], ids[:, 1:].to(self.device)
        rows = max(1, _PIECE_BYTES[self.device.type != "cpu"] // (4 * logits.shape[0] * logits.shape[2]))
        parts = [
            -torch.nn.functional.cross_entropy(piece.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
            for piece, target in zip(logits.split(rows, 1), targets.split(rows, 1), strict=True)
        ]
        return torch.cat(parts, 1).cpu()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lives."""


class Engine(ABC):
    """Loads artefacts of the formats in its table.

    Args:
        loaders: Format of an artefact → dotted path of a function `(folder, device, trust_remote_code) -> model`.
    """

    def __init__(self, loaders: dict[str, str]) -> None:
        self.loaders = loaders

    @abstractmethod
    def load(self, artefact: Path, device: str, trust_remote_code: bool = False) -> LoadedModel:
        """Load an artefact from disk.

        Raises:
            methods.base.Unsupported: This engine does not load its format here.
        """

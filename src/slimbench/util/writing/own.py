"""Text that a model writes itself, for calibration and training without data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_STATE = "self-text"
_TOLD_EVERY = 32


class Writer(Protocol):
    """A model on disk, such as `methods.base.DenseModel`, and where what it has written by now is kept."""

    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def shape(self) -> Any: ...
    @property
    def checkpoints(self) -> Path | None: ...
    @property
    def progress(self) -> Callable[[float, float], None]: ...
    def load(self) -> Any: ...


def generate(dense: Writer, count: int, length: int, greedy: int, batch_size: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Token ids [count, length] in the hybrid way of LLM-QAT.

    A sequence begins with a token drawn evenly from the vocabulary (end and padding tokens left out); the next `greedy` tokens are the
    most probable ones, and all others are drawn from the model's whole distribution. The end of a text is never drawn, so that every
    sequence has its full length.

    Args:
        batch_size: Sequences written at once through one KV cache. What is written depends on it.
        seed: Of all draws.
    """
    import torch

    from slimbench.util import checkpoints as _checkpoints

    identity = _identity(dense, count, length, greedy, batch_size, seed, temperature) if dense.checkpoints else ""
    kept = _kept(dense, identity)
    pieces = list(kept.split(batch_size)) if kept is not None else []
    model = dense.load() if len(pieces) * batch_size < count else None
    for begin in range(len(pieces) * batch_size, count, batch_size):
        generator = torch.Generator(dense.device).manual_seed(seed * 1_000_003 + begin)
        size = min(batch_size, count - begin)

        def told(tokens: int, begin: int = begin, size: int = size) -> None:
            dense.progress(begin + size * tokens / length, count)

        pieces.append(_write(model, size, length, greedy, generator, temperature, told).cpu())
        dense.progress(min(begin + batch_size, count), count)
        if dense.checkpoints:
            _checkpoints.save(dense.checkpoints, _STATE, identity, {"ids": torch.cat(pieces)}, {})
    return torch.cat(pieces)


def found(dense: Writer, count: int, length: int, greedy: int, batch_size: int, seed: int, temperature: float = 1.0) -> Tensor | None:
    """What `generate` wrote before, from where it is kept; None where that is not all."""
    if dense.checkpoints is None or not (dense.checkpoints / f"{_STATE}.json").exists():
        return None
    kept = _kept(dense, _identity(dense, count, length, greedy, batch_size, seed, temperature))
    return kept if kept is not None and len(kept) == count else None


def _kept(dense: Writer, identity: str) -> Tensor | None:
    """The sequences that have been written by now."""
    from slimbench.util import checkpoints as _checkpoints

    state = _checkpoints.load(dense.checkpoints, _STATE, identity) if dense.checkpoints else None
    return state[0]["ids"] if state else None


def _identity(dense: Writer, *settings: float) -> str:
    digest = hashlib.sha256(repr((dense.dtype, dense.device, dense.shape, settings)).encode())
    for path in sorted(dense.path.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write(
    model: Any, count: int, length: int, greedy: int, generator: Any, temperature: float, told: Callable[[int], None] = lambda tokens: None
) -> Tensor:
    import torch

    ends = _ends(model)
    with torch.inference_mode():
        allowed = torch.ones(model.config.vocab_size, device=model.device)
        allowed[ends] = 0
        ids = torch.multinomial(allowed, count, replacement=True, generator=generator)[:, None]
        found, cache = [ids], None
        for position in range(1, length):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            logits[:, ends] = -torch.inf
            if position <= greedy:
                ids = logits.argmax(-1, keepdim=True)
            else:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            found.append(ids)
            if position % _TOLD_EVERY == 0:
                told(position)
    return torch.cat(found, dim=1).clone()


def _ends(model: Any) -> list[int]:
    """Ids of the tokens that end or pad a text."""
    ends: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)

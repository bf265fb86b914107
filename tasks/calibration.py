"""Calibration tokens: disjoint windows of a corpus, drawn in an order that a seed gives; or what the dense model writes itself."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from slimbench.tasks import corpora
from slimbench.tasks.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PROTOCOL_VERSION = 1
SELF = "self"
"""The source of what the dense model writes; see `util.writing.own`."""


def sample(spec: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int) -> torch.Tensor:
    """Token windows for a method that measures activations.

    The documents are tokenized without special tokens, each is ended by the end-of-sequence token if the tokenizer has
    one, and the whole is cut into disjoint windows.

    Args:
        spec: A corpus, see `tasks.corpora`.
        tokenizer: The tokenizer of the dense model.
        samples: Windows to draw, without replacement.
        length: Tokens of a window.
        seed: Gives the order of the draw; more samples of one seed begin with the fewer.

    Returns:
        Token ids, int64, shape [samples, length].

    Raises:
        DataError: The corpus is unknown, or too short for so many windows.
    """
    import numpy as np
    import torch

    ids = _tokens(corpora.load(spec).documents, tokenizer)
    available = len(ids) // length
    if available < samples:
        raise DataError(f"corpus '{spec}' gives {available} windows of {length} tokens, fewer than calibration_samples={samples}")
    chosen = np.random.default_rng(seed).permutation(available)[:samples]
    windows = np.asarray(ids[: available * length], dtype=np.int64).reshape(available, length)
    return torch.from_numpy(windows[chosen].copy())


def fingerprint(spec: str, samples: int, length: int, seed: int, writer: str | None = None) -> str:
    """16 hex digits that identify the calibration text and its sampling; needs no fetch. The tokenizer is the model's.

    Args:
        writer: What tells the dense model, and how it writes, from others.
    """
    source = [SELF, writer] if spec == SELF else corpora.fingerprint(spec)
    identity = [source, samples, length, seed, PROTOCOL_VERSION]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for document in encoded for token in (*document, *end)]

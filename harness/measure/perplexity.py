"""Perplexity under the `window` protocol: disjoint windows of one tokenization, each scored alone.

The protocol of the GPTQ, SparseGPT, Wanda and AWQ papers: documents joined by the corpus' separator, tokenized once,
cut into windows of `seqlen` tokens, the tail dropped; perplexity is exp of the mean negative log-likelihood.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.cell import digest
from harness.config import SuiteConfig
from harness.engines.base import LoadedModel
from harness.record import PerplexityResult
from tasks import assets, corpora
from tasks.errors import DataError

PROTOCOL = "window-1"
_BATCH_TOKENS = 1024


class Diverged(Exception):
    """The model gives no finite likelihood: the artefact is broken, and no number is recorded."""


def measure(model: LoadedModel, tokenizer: Any, spec: str, suite: SuiteConfig, on_progress: Callable[[int, int], None]) -> PerplexityResult:
    """Score a corpus.

    Args:
        tokenizer: The tokenizer of the source model.
        spec: Which corpus, as `tasks.corpora` names it.
        on_progress: Called with windows done and windows in all.

    Raises:
        Diverged: A likelihood is NaN or infinite.
        tasks.errors.DataError: The corpus cannot be read or has not one window.
    """
    tokens, text_hash = token_stream(spec, tokenizer)
    windows = cut(tokens, suite.seqlen, suite.windows)
    if not len(windows):
        raise DataError(f"corpus {spec} has {len(tokens)} tokens, fewer than one window of {suite.seqlen}")
    ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
    if suite.add_bos:
        ids = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], 1)
    batch = max(1, _BATCH_TOKENS // suite.seqlen)
    nll: list[float] = []
    on_progress(0, len(ids))
    for part in ids.split(batch):
        nll += (-model.token_logprobs(part).double().mean(1)).tolist()
        if not all(map(math.isfinite, nll)):
            raise Diverged(f"NaN or infinite likelihood in window {len(nll)} of {spec}")
        on_progress(len(nll), len(ids))
    perplexity = math.exp(min(sum(nll) / len(nll), 700.0))
    return PerplexityResult(
        corpus=spec if not spec.startswith("file:") else f"file:{Path(spec[5:]).name}",
        protocol=PROTOCOL,
        corpus_sha256=text_hash,
        seqlen=suite.seqlen,
        window_nll=nll,
        labels_per_window=ids.shape[1] - 1,
        perplexity=perplexity,
    )


def cut(tokens: np.ndarray, seqlen: int, limit: int | None) -> np.ndarray:
    """Disjoint windows [N, seqlen] of a token stream; with a limit, that many of them, spread evenly over the stream."""
    windows = tokens[: len(tokens) // seqlen * seqlen].reshape(-1, seqlen)
    if limit is not None and limit < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, limit).round().astype(int)]
    return windows


def token_stream(spec: str, tokenizer: Any) -> tuple[np.ndarray, str]:
    """The tokens of a whole corpus (int32) and the hash of its text; tokenized once for each tokenizer, then cached."""
    vocabulary = digest({"vocab": len(tokenizer), "sample": tokenizer.get_vocab(), "kind": type(tokenizer).__name__})
    path = assets.cache_dir() / "tokens" / f"{digest([corpora.fingerprint(spec), vocabulary])}.npy"
    if path.is_file():
        stored = np.load(path, mmap_mode="r")
        return stored, path.with_suffix(".sha256").read_text()
    corpus = corpora.load(spec)
    pieces = tokenizer([corpus.text], add_special_tokens=False, verbose=False)["input_ids"][0]
    tokens = np.asarray(pieces, dtype=np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".sha256").write_text(corpus.sha256)
    partial = path.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, tokens)
    os.replace(partial, path)
    return tokens, corpus.sha256

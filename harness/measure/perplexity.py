"""Perplexity under protocols of windows: disjoint windows of one tokenization, each scored alone.

`window` is the protocol of the GPTQ, SparseGPT, Wanda and AWQ papers: documents joined by the corpus' separator, tokenized
once, cut into windows of `seqlen` tokens, the tail dropped; perplexity is exp of the mean negative log-likelihood.
`incremental` scores the same labels, but feeds each window through the KV cache in chunks, so that a policy that acts on the
cache is in force. `llamacpp` scores the second half of each window only, as llama.cpp's perplexity tool does.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.config.sections.suite import Pass
from slimbench.harness.measure import protocols
from slimbench.harness.measure.loaded import Scores, label_logprobs
from slimbench.harness.schema.quality import PerplexityResult
from slimbench.harness.store.partial import Part
from slimbench.tasks import corpora
from slimbench.tasks.errors import DataError
from slimbench.util import checksums, files
from slimbench.util.files import cache_dir
from slimbench.util.hashing import digest, hash_file

BATCH_TOKENS = 1024
"""Tokens of the windows that are scored at once."""
_TOKENS = "tokens.npy"

OnProgress = Callable[[int, int], None]


class Diverged(Exception):
    """The model gives no finite likelihood: the artefact is broken, and no number is recorded."""


class Watcher(Protocol):
    """An observer of `label_logprobs` whose share in a batch of windows can be kept and put back."""

    seen: int

    def __call__(self, scores: torch.Tensor, norm: torch.Tensor, label: torch.Tensor) -> None: ...

    def since(self, first: int) -> dict[str, Any]:
        """What it has of the positions from `first` on, as JSON."""

    def restore(self, kept: dict[str, Any]) -> bool:
        """Put that back, as if the positions had been seen; false where that cannot be done, and nothing changes."""


class Windows:
    """The windows of one pass as token ids, and which of their tokens are labels.

    Args:
        tokenizer: The tokenizer of the source model.

    Attributes:
        ids: Token ids, int64 [windows, T].
        first: The first label of each window; all labels after it count.

    Raises:
        tasks.errors.DataError: The corpus cannot be read or has not one window.
    """

    def __init__(self, tokenizer: Any, wanted: Pass, suite: SuiteConfig) -> None:
        tokens, self.text_hash = token_stream(wanted.corpus, tokenizer)
        windows = cut(tokens, wanted.seqlen, wanted.limit)
        if not len(windows):
            raise DataError(f"corpus {wanted.corpus} has {len(tokens)} tokens, fewer than one window of {wanted.seqlen}")
        self.wanted, self.chunk = wanted, suite.chunk
        self.ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
        self.first = 1
        if wanted.protocol == "llamacpp":
            self.first = wanted.seqlen // 2 + 1
            if suite.add_bos:
                self.ids[:, 0] = tokenizer.bos_token_id
        elif suite.add_bos:
            self.ids = torch.cat([torch.full((len(self.ids), 1), tokenizer.bos_token_id), self.ids], 1)

    @property
    def labels(self) -> int:
        """Labels of each window."""
        return self.ids.shape[1] - self.first

    def logits(self, model: Scores, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, labels, V] of the positions that predict the labels.

        Raises:
            methods.base.Unsupported: The policy of the model does not allow that.
        """
        if self.wanted.protocol == "incremental":
            model.check_scoring("exact", "chunk", "step")
            parts, state = [], None
            for chunk in ids[:, :-1].split(1 if model.scoring == "step" else self.chunk, 1):
                logits, state = model.extend(chunk, state)
                parts.append(logits)
            return torch.cat(parts, 1)
        model.check_scoring("exact", "chunk")
        return model.logits(ids, self.first - 1)[:, :-1]


def measure(
    model: Scores, windows: Windows, on_progress: OnProgress, watcher: Watcher | None = None, part: Part | None = None
) -> PerplexityResult:
    """Score the windows of a pass.

    Args:
        on_progress: Called with windows done and windows in all.
        watcher: Sees the distributions at every label (see `harness.measure.divergence`).
        part: Keeps each batch; what it has of an earlier attempt is not scored again.

    Raises:
        Diverged: A likelihood is NaN or infinite.
    """
    ids, wanted, part = windows.ids, windows.wanted, part or Part()
    nll: list[float] = []

    def score(batch: torch.Tensor) -> dict[str, Any]:
        first = watcher.seen if watcher else 0
        logprobs = label_logprobs(windows.logits(model, batch), batch[:, windows.first :], watcher)
        return {"nll": (-logprobs.double().mean(1)).tolist(), "seen": watcher.since(first) if watcher else None}

    def accept(kept: dict[str, Any]) -> bool:
        return watcher.restore(kept["seen"]) if watcher else True

    on_progress(0, len(ids))
    for batch in ids.split(model.batch(max(1, BATCH_TOKENS // wanted.seqlen))):
        nll += part.once(batch.numpy().tobytes(), len(batch), partial(score, batch), accept)["nll"]
        if not all(map(math.isfinite, nll)):
            raise Diverged(f"NaN or infinite likelihood in window {len(nll)} of {wanted.corpus}")
        on_progress(len(nll), len(ids))
    return PerplexityResult(
        corpus=public_name(wanted.corpus),
        protocol=protocols.PERPLEXITY[wanted.protocol],
        corpus_sha256=windows.text_hash,
        seqlen=wanted.seqlen,
        window_nll=nll,
        labels_per_window=windows.labels,
        perplexity=math.exp(min(sum(nll) / len(nll), 700.0)),
    )


def public_name(spec: str) -> str:
    """A corpus as records name it: of a local file no folder."""
    return spec if not spec.startswith("file:") else f"file:{Path(spec[5:]).name}"


def cut(tokens: np.ndarray, seqlen: int, limit: int | None) -> np.ndarray:
    """Disjoint windows [N, seqlen] of a token stream; with a limit, that many of them, spread evenly over the stream."""
    windows = tokens[: len(tokens) // seqlen * seqlen].reshape(-1, seqlen)
    if limit is not None and limit < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, limit).round().astype(int)]
    return windows


def token_stream(spec: str, tokenizer: Any) -> tuple[np.ndarray, str]:
    """The tokens of a whole corpus (int32) and the hash of its text; tokenized once for each tokenizer, then cached."""
    folder = cache_dir() / "tokens" / digest([corpora.fingerprint(spec), tokenizer_identity(tokenizer)])
    if checksums.seal_fault(folder) is None:
        return np.load(folder / _TOKENS, mmap_mode="r"), str(checksums.facts(folder)["text_sha256"])
    corpus = corpora.load(spec)
    pieces = tokenizer([corpus.text], add_special_tokens=False, verbose=False)["input_ids"][0]
    tokens = np.asarray(pieces, dtype=np.int32)
    with checksums.sealed_folder(folder, {"text_sha256": corpus.sha256}) as unfinished:
        np.save(unfinished / _TOKENS, tokens)
    return tokens, corpus.sha256


def tokenizer_identity(tokenizer: Any) -> str:
    """Sixteen hex digits of all that turns text into tokens: the whole tokenizer (normaliser, splitting, vocabulary, merges), not its
    vocabulary alone, and the version of the library that runs it.
    """
    if getattr(tokenizer, "is_fast", False):
        whole: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        whole |= {"truncation": None, "padding": None}  # what the last call left behind
        library = "tokenizers"
    else:
        with files.scratch("tokenizer") as folder:
            whole = {Path(file).name: hash_file(Path(file)) for file in tokenizer.save_pretrained(folder) if Path(file).is_file()}
        library = "transformers"
    version = importlib.metadata.version(library)
    return digest([type(tokenizer).__name__, getattr(tokenizer, "split_special_tokens", False), library, version, whole])

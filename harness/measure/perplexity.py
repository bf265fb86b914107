"""Perplexity under protocols of windows: disjoint windows of one tokenization, each scored alone.

`window` is the protocol of the GPTQ, SparseGPT, Wanda and AWQ papers: documents joined by the corpus' separator, tokenized
once, cut into windows of `seqlen` tokens, the tail dropped; perplexity is exp of the mean negative log-likelihood.
`incremental` scores the same labels, but feeds each window through the KV cache in chunks, so that a policy that acts on the
cache is in force. `llamacpp` scores the second half of each window only, as llama.cpp's perplexity tool does. `suffix` scores the second
half too, but its first half goes through the cache at once, as a prompt does, so that a policy that acts on prompts is in force for what
follows. `stream` puts one text through one cache from its first token to its last; a window is a stretch of it. Where the text is longer
than what the model was made for, the stretches beyond are scored too, but perplexity and divergence are of those before: with positions
that it never saw in training a model says nothing of what a policy loses. `recomputed` scores the same labels of the reference in windows
of 1,024 tokens, one each 512, of each its second half: what a cache of so many tokens is held against.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.config.sections.suite import BATCH_TOKENS, RECOMPUTED, STRETCH, Pass
from slimbench.harness.measure import protocols
from slimbench.harness.measure.loaded import Generates, Scores, label_logprobs
from slimbench.harness.schema.quality import PerplexityResult
from slimbench.harness.store.partial import Part
from slimbench.tasks import corpora
from slimbench.tasks.errors import DataError
from slimbench.util import checksums, files
from slimbench.util.files import cache_dir
from slimbench.util.hashing import digest, hash_file

_STEPPED = 16
"""Times as many windows are scored at once where each pass has one token of each."""
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


class Held:
    """Bytes of the cache of one text, at each position that is scored; between two passes it is taken to grow evenly.

    Args:
        texts: That go through the model together.
    """

    def __init__(self, model: Scores, texts: int) -> None:
        self._model = model if isinstance(model, Generates) else None
        self._texts, self._last, self._found = texts, 0.0, list[np.ndarray]()

    def passed(self, state: Any, tokens: int, scored: int | None = None) -> None:
        """So many tokens of each text went through the model; the last `scored` of them, by default all, predict labels."""
        held = self._model.cache_bytes(state) if self._model else None
        if held is None:
            self._model = None
            return
        size = held / self._texts
        self._found.append(np.linspace(self._last, size, tokens + 1)[tokens + 1 - (scored or tokens) :])
        self._last = size

    def means(self, windows: int) -> list[int]:
        """Means over so many windows of equally many positions; none where the engine does not show its cache, or none was asked."""
        if self._model is None or not self._found:
            return []
        return np.concatenate(self._found).reshape(windows, -1).mean(1).round().astype(int).tolist()


class Windows:
    """The windows of one pass as token ids, and which of their tokens are labels.

    Args:
        tokenizer: The tokenizer of the source model.

    Attributes:
        ids: Token ids, int64 [windows, T]; of a stream, computed anew or not, [1, T].
        first: The first label of each row; all labels after it count.
        count: Windows.
        tokens: That go through the model.
        labels: Labels of each window.

    Raises:
        tasks.errors.DataError: The corpus cannot be read or has not one window.
    """

    def __init__(self, tokenizer: Any, wanted: Pass, suite: SuiteConfig) -> None:
        tokens, self.text_hash = token_stream(wanted.corpus, tokenizer)
        stream = wanted.is_stream
        windows = tokens[: wanted.seqlen + 1].reshape(1, -1) if stream else cut(tokens, wanted.seqlen, wanted.limit)
        if len(tokens) < wanted.seqlen + stream:
            raise DataError(f"corpus {wanted.corpus} has {len(tokens)} tokens, fewer than one window of {wanted.seqlen}")
        self.wanted, self.chunk = wanted, suite.chunk
        self.ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
        self.first = wanted.seqlen // 2 + 1 if wanted.protocol in ("llamacpp", "suffix") else 1
        if wanted.protocol == "llamacpp" and suite.add_bos:
            self.ids[:, 0] = tokenizer.bos_token_id
        elif suite.add_bos:
            self.ids = torch.cat([torch.full((len(self.ids), 1), tokenizer.bos_token_id), self.ids], 1)
        self.labels = STRETCH if stream else self.ids.shape[1] - self.first
        self.count = (self.ids.shape[1] - self.first) // self.labels * len(self.ids)
        self.tokens = (2 * self.count - 1) * STRETCH if wanted.protocol == RECOMPUTED else self.ids.numel()

    def at_once(self, model: Scores) -> int:
        """Windows that go through a model together."""
        many = _STEPPED if model.scoring == "step" else 1
        return model.batch(max(1, many * BATCH_TOKENS // self.wanted.seqlen))

    def within(self, model: Scores) -> int | None:
        """Of a stream the stretches that end within the positions that a model was made for, at least one; None where all do."""
        fitting = max(1, model.max_length // self.labels)
        return fitting if self.wanted.protocol == "stream" and fitting < self.count else None

    @property
    def prompt(self) -> int:
        """Tokens of each window that go through the model at once, before any label."""
        return self.first if self.wanted.protocol == "suffix" else 0

    def nll(self, model: Scores, ids: torch.Tensor, watcher: Watcher | None, told: Callable[[int], None]) -> tuple[list[float], list[int]]:
        """Mean negative log-likelihood of each window, in nats, and under `suffix` and `stream` the mean bytes that were held of a text.

        Args:
            ids: Some rows of `ids`.
            told: Called with windows done so far.

        Raises:
            methods.base.Unsupported: The policy of the model does not allow that.
        """
        held = Held(model, len(ids))
        if self.wanted.protocol == RECOMPUTED:
            return self._recomputed(model, ids, watcher, told), []
        if self.wanted.protocol != "stream":
            mean = label_logprobs(self.logits(model, ids, held), ids[:, self.first :], watcher).double().mean(1)
            return (-mean).tolist(), held.means(1) * len(ids)
        found, end = [], self.first + self.count * self.labels
        for logits, label in zip(self._chunks(model, ids[:, : end - 1], held), self._split(ids[:, self.first : end], model), strict=True):
            found.append(label_logprobs(logits, label, watcher))
            told(sum(part.shape[1] for part in found) // self.labels)
        return (-torch.cat(found, 1).double().view(-1, self.labels).mean(1)).tolist(), held.means(self.count)

    def logits(self, model: Scores, ids: torch.Tensor, held: Held | None = None) -> torch.Tensor:
        """Logits [B, n, V] of the positions that predict the labels, of other protocols than `stream` and `recomputed`. Raises as `nll`.

        Args:
            held: Hears what is held under `suffix`.
        """
        protocol = self.wanted.protocol
        if protocol == "incremental":
            return torch.cat(list(self._chunks(model, ids[:, :-1])), 1)
        if protocol == "suffix":
            model.check_scoring("exact", "chunk", "step", "suffix")
            held = held or Held(model, len(ids))
            logits, state = model.behind(ids[:, : self.first])
            held.passed(state, self.first, 1)
            parts, rest = [logits], ids[:, self.first : -1]
            for piece in rest.split(1 if model.scoring == "step" else max(1, rest.shape[1]), 1):
                logits, state = model.extend(piece, state)
                held.passed(state, piece.shape[1])
                parts.append(logits)
            return torch.cat(parts, 1)
        model.check_scoring("exact", "chunk")
        return model.logits(ids, self.first - 1)[:, :-1]

    def stepwise(self, model: Scores, ids: torch.Tensor) -> list[float]:
        """What `nll` gives if tokens come one by one, behind a prompt under `suffix`."""
        head = self.prompt or 1
        logits, state = model.behind(ids[:, :head])
        parts = [logits]
        for token in ids[:, head:-1].split(1, 1):
            logits, state = model.extend(token, state)
            parts.append(logits)
        found = label_logprobs(torch.cat(parts, 1)[:, self.first - head :], ids[:, self.first :])
        return (-found.double().mean(1)).tolist()

    def _recomputed(self, model: Scores, ids: torch.Tensor, watcher: Watcher | None, told: Callable[[int], None]) -> list[float]:
        """As `nll`: each label behind at least half a window of tokens that nothing was kept of, but for the first."""
        model.check_scoring("exact", "chunk")
        found, half = [], STRETCH // 2
        for begin in range(0, (self.count - 1) * STRETCH + 1, half):
            known = half if begin else 0
            logits = model.logits(ids[:, begin : begin + STRETCH], known)
            found.append(label_logprobs(logits, ids[:, begin + known + 1 : begin + STRETCH + 1], watcher))
            told(sum(part.shape[1] for part in found) // self.labels)
        return (-torch.cat(found, 1).double().view(-1, self.labels).mean(1)).tolist()

    def _chunks(self, model: Scores, ids: torch.Tensor, held: Held | None = None) -> Iterator[torch.Tensor]:
        """Logits of all positions, some after the others, through one cache."""
        model.check_scoring("exact", "chunk", "step")
        state = None
        for chunk in self._split(ids, model):
            logits, state = model.extend(chunk, state)
            if held:
                held.passed(state, chunk.shape[1])
            yield logits

    def _split(self, ids: torch.Tensor, model: Scores) -> tuple[torch.Tensor, ...]:
        """Tokens as they go through a cache."""
        return ids.split(1 if model.scoring == "step" else self.chunk, 1)


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
    nll, held = list[float](), list[int]()

    def score(batch: torch.Tensor) -> dict[str, Any]:
        first, before = watcher.seen if watcher else 0, len(nll)
        scored, taken = windows.nll(model, batch, watcher, lambda done: on_progress(before + done, windows.count))
        return {"nll": scored, "held": taken, "seen": watcher.since(first) if watcher else None}

    def accept(kept: dict[str, Any]) -> bool:
        return watcher.restore(kept["seen"]) if watcher else True

    on_progress(0, windows.count)
    for batch in ids.split(windows.at_once(model)):
        kept = part.once(batch.numpy().tobytes(), len(batch), partial(score, batch), accept)
        nll, held = nll + kept["nll"], held + kept.get("held", [])
        if not all(map(math.isfinite, nll)):
            raise Diverged(f"NaN or infinite likelihood in window {len(nll)} of {wanted.corpus}")
        on_progress(len(nll), windows.count)
    within = windows.within(model)
    headline = nll[:within]
    return PerplexityResult(
        corpus=public_name(wanted.corpus),
        protocol=protocols.PERPLEXITY[wanted.protocol],
        corpus_sha256=windows.text_hash,
        seqlen=wanted.seqlen,
        window_nll=nll,
        labels_per_window=windows.labels,
        perplexity=math.exp(min(sum(headline) / len(headline), 700.0)),
        within=within,
        held_bytes=held if len(held) == len(nll) else [],
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

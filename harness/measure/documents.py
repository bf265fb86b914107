"""Perplexity of whole documents under the `document` protocol: lm-eval's rolling log-likelihood, through lm-eval itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from slimbench.harness.config.sections.suite import Pass
from slimbench.harness.measure import protocols
from slimbench.harness.measure.loaded import Scores
from slimbench.harness.measure.perplexity import public_name
from slimbench.harness.measure.zeroshot import EngineLM
from slimbench.harness.schema.quality import DocumentResult
from slimbench.harness.store.partial import Part
from slimbench.tasks import corpora
from slimbench.util.files import cache_dir, write_atomically

_TASK = "documents"


def measure(
    model: Scores, tokenizer: Any, wanted: Pass, batch_tokens: int, on_progress: Callable[[int, int], None], part: Part | None = None
) -> tuple[DocumentResult, int]:
    """Score documents, each from its first token on.

    Args:
        part: Keeps what is scored (see `EngineLM`).

    Returns:
        The result, and the number of tokens that went through the model, padding included.

    Raises:
        tasks.errors.DataError: The corpus cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    corpus = corpora.load(wanted.corpus)
    texts = evenly([d for d in corpus.documents if d.strip()], wanted.limit)
    lm = EngineLM(model, tokenizer, batch_tokens, on_progress, part)
    out = simple_evaluate(
        model=lm,
        tasks=[task(_written(wanted.corpus, texts))],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    scores = out["results"][_TASK]
    samples = sorted(out["samples"][_TASK], key=lambda sample: sample["doc_id"])
    likelihoods = [sample["filtered_resps"][0] for sample in samples]
    words, sizes = zip(*(sample["word_perplexity"][1:] + sample["byte_perplexity"][1:] for sample in samples), strict=True)
    return DocumentResult(
        corpus=public_name(wanted.corpus),
        protocol=protocols.PERPLEXITY["document"],
        corpus_sha256=corpus.sha256,
        nll=[-float(value) for value in likelihoods],
        tokens=[len(lm.tok_encode(text)) for text in texts],
        words=list(words),
        bytes=list(sizes),
        word_perplexity=float(scores["word_perplexity,none"]),
        byte_perplexity=float(scores["byte_perplexity,none"]),
        bits_per_byte=float(scores["bits_per_byte,none"]),
    ), lm.forward_tokens


def evenly(documents: list[str], limit: int | None) -> list[str]:
    """So many documents, spread evenly; all of them without a limit."""
    if limit is None or limit >= len(documents):
        return documents
    return [documents[i] for i in np.linspace(0, len(documents) - 1, limit).round().astype(int)]


def task(file: Path) -> dict[str, Any]:
    """The lm-eval task that scores the field `text` of a JSON-lines file."""
    return {
        "task": _TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "metadata": {"version": 1},
    }


def _written(spec: str, texts: list[str]) -> Path:
    """A JSON-lines file of the documents in the cache, since lm-eval reads its documents through `datasets`."""
    path = cache_dir() / "documents" / f"{corpora.fingerprint(spec)}-{len(texts)}.jsonl"
    if not path.is_file():
        write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return path

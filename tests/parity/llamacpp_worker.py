"""Runs in the `llamacpp` environment: llama.cpp's perplexity protocol on one GGUF file, through llama.cpp's own logits.

As llama.cpp's perplexity tool: the text is tokenized by the file's own tokenizer and cut into chunks of `n_ctx`; each is
evaluated alone, and the tokens of its second half, from `n_ctx / 2 + 1` on, are scored.
Reads a JSON request on stdin, writes JSON to stdout.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    n_ctx = request["n_ctx"]
    model = llama_cpp.Llama(request["gguf"], n_ctx=n_ctx, n_batch=n_ctx, logits_all=True, verbose=False)
    if model.metadata.get("tokenizer.ggml.add_bos_token") != "false":
        raise SystemExit("this file wants a BOS token in each chunk, which is not implemented")
    tokens = np.array(model.tokenize(Path(request["text"]).read_bytes(), add_bos=False, special=False), dtype=np.int32)
    chunks = tokens[: len(tokens) // n_ctx * n_ctx].reshape(-1, n_ctx)
    chosen = np.linspace(0, len(chunks) - 1, request["chunks"]).round().astype(int)
    nll = []
    for chunk in chunks[chosen]:
        model.reset()
        model.eval(chunk.tolist())
        scores = np.asarray(model.scores[n_ctx // 2 : n_ctx - 1], dtype=np.float64)
        labels = chunk[n_ctx // 2 + 1 :]
        norm = np.logaddexp.reduce(scores, axis=1)
        nll.append(float(np.mean(norm - scores[np.arange(len(labels)), labels])))
    answer = {
        "library": f"llama-cpp-python {llama_cpp.__version__}",
        "tokens": len(tokens),
        "tokens_sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        "chunk_nll": nll,
        "perplexity": float(np.exp(np.mean(nll))),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

"""Measures llama.cpp's own perplexity of the packaged GGUF file and writes it beside this file, for the test of parity.

Run by hand: `python -m tests.parity.llamacpp`. It makes the environment `llamacpp` first, which compiles for a while.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from slimbench.harness.config import environments
from slimbench.tasks import assets, corpora

RECORD = Path(__file__).with_suffix(".json")
CORPUS = "bigbench-wikipedia"
N_CTX, CHUNKS = 512, 16


def main() -> None:
    python = environments.make("llamacpp")
    gguf, corpus = assets.fetch("smollm2-135m"), corpora.load(CORPUS)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(corpus.text, encoding="utf-8")
        request = {"gguf": str(gguf), "text": str(text), "n_ctx": N_CTX, "chunks": CHUNKS}
        worker = Path(__file__).with_name("llamacpp_worker.py")
        done = subprocess.run([str(python), str(worker)], input=json.dumps(request), capture_output=True, text=True, check=True)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"corpus": CORPUS, "corpus_sha256": corpus.sha256, "gguf": gguf.name, "gguf_sha256": digest, "n_ctx": N_CTX}
    record = facts | json.loads(done.stdout.splitlines()[-1])
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['library']}: perplexity {record['perplexity']:.4f} on {CHUNKS} chunks of {N_CTX} → {RECORD.name}")


if __name__ == "__main__":
    main()

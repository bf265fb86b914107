"""Writes beside this file which tokens of some prompts kvpress keeps on the packaged model, for the test of parity.

Run by hand: `python -m tests.parity.evictions PYTHON`, where PYTHON is one that has kvpress, which wants an older transformers than ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from slimbench.harness.config.compose import resolve
from slimbench.harness.measure import perplexity
from slimbench.harness.stages import models

RECORD = Path(__file__).with_suffix(".json")
CORPUS = "bigbench-mysteries"
PROMPTS, LENGTH, BUDGET = 3, 256, 128


def prompts(model: Path) -> list[list[int]]:
    """Token ids of the prompts."""
    stream, _ = perplexity.token_stream(CORPUS, AutoTokenizer.from_pretrained(model))
    return stream[: PROMPTS * LENGTH].reshape(PROMPTS, LENGTH).tolist()


def main() -> None:
    model = models.prepare(resolve([]).model, print)
    request = {"model": str(model), "ids": prompts(model), "budget": BUDGET}
    worker = Path(__file__).with_name("evictions_worker.py")
    done = subprocess.run([sys.argv[1], str(worker)], input=json.dumps(request), capture_output=True, text=True, check=True)
    record = {"corpus": CORPUS, "length": LENGTH, "budget": BUDGET} | json.loads(done.stdout.splitlines()[-1])
    RECORD.write_text(json.dumps(record) + "\n")
    print(f"{record['library']}: {PROMPTS} prompts of {LENGTH} tokens → {RECORD.name}")


if __name__ == "__main__":
    main()

"""Prints how much the divergence from the reference adds to the perplexity of the same windows, once the reference is cached.

Run by hand on a quiet machine: `python -m tests.bench.divergence_overhead`. It is no test: timings do not gate a merge.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure import divergence, perplexity
from slimbench.harness.measure.divergence import Comparison, Recorder
from slimbench.harness.stages import models
from slimbench.harness.stages.common import tokenizer_of

REPEATS = 4


def main() -> None:
    config = resolve(["device=cpu"])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = models.prepare(config.model, lambda phase: None)
    model = TransformersModel(load_pretrained(source, "cpu"), "cpu")
    windows = perplexity.Windows(tokenizer_of(source, config), config.suite.passes()[0], config.suite)
    key = "bench"
    if not divergence.exists(key):
        recorder = Recorder(key, len(windows.ids) * windows.labels, config.suite.top_k, model.vocab_size)
        perplexity.measure(model, windows, lambda done, total: None, recorder)
        recorder.close()
    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(REPEATS):
        for compared in (False, True) if repeat % 2 == 0 else (True, False):
            began = time.perf_counter()
            perplexity.measure(model, windows, lambda done, total: None, Comparison(key) if compared else None)
            times[compared].append(time.perf_counter() - began)
    plain, both = statistics.median(times[False]), statistics.median(times[True])
    print(f"perplexity of {len(windows.ids)} windows: {plain:.2f} s; with divergence (top {config.suite.top_k}): {both:.2f} s")
    print(f"divergence adds {both / plain - 1:.1%} (aim: at most 40 %)")


if __name__ == "__main__":
    main()

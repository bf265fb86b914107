"""Prints how much longer the quality stage takes than the bare forward passes of the same tokens plus loading the model.

Run by hand on a quiet machine: `python -m tests.bench.quality_overhead`. It is no test: timings do not gate a merge.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.stages import models
from slimbench.harness.store.store import Store
from tests.support.running import run


class _Silent:
    def stage_started(self, *_: object) -> None: ...

    def stage_event(self, *_: object) -> None: ...

    def stage_ended(self, *_: object, **__: object) -> None: ...

    def note(self, text: str) -> None: ...


def main() -> None:
    overrides = ("device=cpu", "speed.grid=[{batch: 1, prompt: 8, new_tokens: 3}]", "speed.budget_s=1")
    cell = make_cell(resolve(overrides), overrides)
    calls: list[tuple[torch.Size, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Store(Path(folder)), _Silent())
        run(runner, cell)  # fills the caches: model, tokens, task files
        again = make_cell(resolve([*overrides, "on_existing=all"]), overrides)
        record = run(runner, again)[1]
        runner.close()
    from slimbench.harness.config.targets import locate
    from slimbench.harness.measure import perplexity, zeroshot
    from slimbench.harness.stages.common import tokenizer_of

    torch.set_num_threads(cell.config.device.threads or 1)
    source = models.prepare(cell.config.model, lambda phase: None)
    began = time.perf_counter()
    engine = locate(cell.config.engine.target)(loaders=cell.config.engine.loaders)
    from slimbench.harness.store import artefact

    model: LoadedModel = engine.load(artefact.location(cell.identity.keys.compress), "cpu")
    load = time.perf_counter() - began
    plain = model.logits

    def remembering(ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        calls.append((ids.shape, start))
        return plain(ids, start)

    model.logits = remembering  # type: ignore[method-assign]
    tokenizer = tokenizer_of(source, cell.config)
    for wanted in cell.config.suite.passes():
        perplexity.measure(model, perplexity.Windows(tokenizer, wanted, cell.config.suite), lambda done, total: None)
    zeroshot.measure(model, tokenizer, cell.config.suite, lambda done, total: None)
    began = time.perf_counter()
    for shape, start in calls:
        plain(torch.zeros(shape, dtype=torch.int64), start)
    forward = time.perf_counter() - began
    print(f"quality stage {record.wall_seconds:.1f} s; forward passes {forward:.1f} s + load {load:.1f} s")
    print(f"ratio {record.wall_seconds / (forward + load):.3f} (aim: at most 1.15)")


if __name__ == "__main__":
    main()

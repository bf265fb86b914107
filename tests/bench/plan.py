"""How long planning takes: 500 cells over a results folder of 10,000 records, composing included.

`python -m tests.bench.plan [CELLS] [RECORDS]` prints the seconds of each part.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from slimbench.harness.launch import sweep
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.estimates import Estimates
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store, dump
from tests.support.board_records import Spec, records

METHODS = ("rtn-4bit", "gptq", "awq", "rtn-8bit", "nf4")


def main(cells: int = 500, existing: int = 10_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        (template, *_) = records(Spec("filler"))
        for index in range(existing):
            path = results / f"model-{index % 50}" / f"method-{index % 200}" / f"{Stage.COMPRESS.value}-{index:012x}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dump(template))
        seeds = ",".join(str(seed) for seed in range(cells // len(METHODS)))
        overrides = [f"method={','.join(METHODS)}", f"seed={seeds}", f"results={results}"]
        began = time.perf_counter()
        plan = sweep.plan(overrides, several=True)
        planned = time.perf_counter()
        plans.read(plans.write(plan, results))
        written = time.perf_counter()
        ledger = Ledger(plan, Store(results))
        waiting = list(ledger.open())
        looked = time.perf_counter()
        Estimates(Store(results)).total(plan, waiting)
        ended = time.perf_counter()
    print(f"{len(plan.cells)} cells, {len(plan.tasks)} tasks, {existing} records")
    print(f"composing and planning {planned - began:.2f} s, writing and reading the plan {written - planned:.2f} s")
    print(f"looking up records {looked - written:.2f} s, estimating {ended - looked:.2f} s, together {ended - began:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""How long planning takes: 500 cells over a results folder of 10,000 records, composing included.

`python -m tests.bench.plan [CELLS] [RECORDS]` prints the processor seconds of each part, which other work on the machine does not lengthen.
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
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, dump
from tests.support.board_records import Spec, records

METHODS = ("rtn-4bit", "gptq", "awq", "rtn-8bit", "nf4")


def main(cells: int = 500, existing: int = 10_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        templates = {record.stage: record for record in records(Spec("filler"))}
        seeds = ",".join(str(seed) for seed in range(cells // len(METHODS)))
        overrides = [f"method={','.join(METHODS)}", f"seed={seeds}", f"results={results}"]
        plan = sweep.plan(overrides, several=True)
        own = [(plan.cells[task.cell], task.stage) for task in plan.tasks[: len(plan.tasks) // 2]]
        for cell, stage in own:  # half of what is planned is recorded
            update = {"cell": cell.identity, "key": cell.identity.keys.of(stage), "hardware": cell.hardware(stage)}
            _put(Store(results).path(cell.identity, stage, cell.hardware(stage)), templates[stage].model_copy(update=update))
        for index in range(existing - len(own)):
            name = f"{Stage.COMPRESS.value}-{index:012x}-other.json"
            _put(results / f"model-{index % 50}" / f"method-{index % 200}" / name, templates[Stage.COMPRESS])
        began = time.process_time()
        plan = sweep.plan(overrides, several=True)
        planned = time.process_time()
        plans.read(plans.write(plan, results))
        written = time.process_time()
        ledger = Ledger(plan, Store(results))
        waiting = list(ledger.open())
        looked = time.process_time()
        Estimates(Store(results)).total(plan, waiting)
        ended = time.process_time()
    print(f"{len(plan.cells)} cells, {len(plan.tasks)} tasks, {existing} records, {len(waiting)} tasks to run")
    print(f"composing and planning {planned - began:.2f} s, writing and reading the plan {written - planned:.2f} s")
    print(f"looking up records {looked - written:.2f} s, estimating {ended - looked:.2f} s, together {ended - began:.2f} s")


def _put(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dump(record))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

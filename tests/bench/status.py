"""How long `slimbench status` takes over a plan with 10,000 records of usual size, as a process from its start to its end.

`python -m tests.bench.status [RECORDS]` prints the seconds on the clock and of the processor, of which the latter are not lengthened by
other work on the machine: for records that the plan's own launch made, and for records that were there before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbench.harness.launch import sweep
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from tests.support.board_records import Spec, records

METHODS = ("rtn-4bit", "gptq", "awq", "rtn-8bit", "nf4")


@dataclass(frozen=True)
class Answer:
    """What `slimbench status --json` said of the plan, and what that took in seconds."""

    facts: dict[str, Any]
    clock: float
    processor: float


def fill(results: Path, count: int, before: bool) -> Path:
    """Write a plan with so many tasks at least, and records for the first of them; returns the plan's file.

    Args:
        before: The records were there before the plan was made.
    """
    store, templates = Store(results), {record.stage: record for record in records(Spec("template"))}
    seeds = ",".join(str(seed) for seed in range(-(-count // (3 * (len(METHODS) + 1)))))
    plan = sweep.plan([f"method={','.join(METHODS)}", f"seed={seeds}", "device=cpu", f"results={results}"], several=True)
    origin, started = store.claim(), "2020-01-01T00:00:00+00:00" if before else "2099-01-01T00:00:00+00:00"
    texts: dict[Stage, str] = {}
    for task in plan.tasks[:count]:
        cell = plan.cells[task.cell]
        if task.stage not in texts:  # the first one by the store, for what records share; the others by their text, as 10,000 are many
            update = {"origin": origin, "started": started, "hardware": cell.hardware(task.stage)}
            templates[task.stage] = templates[task.stage].model_copy(update=update)
            texts[task.stage] = store.put(_of(cell, task.stage, templates[task.stage])).read_text()
        path = store.path(cell.identity, task.stage, cell.hardware(task.stage))
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = {"key": cell.identity.keys.of(task.stage), "cell": cell.identity.model_dump(mode="json", exclude_none=True)}
        path.write_text(json.dumps(json.loads(texts[task.stage]) | stated, indent=1, ensure_ascii=False))
    return plans.write(plan, results)


def ask(plan: Path) -> Answer:
    """Ask for the status of a plan, in a process of its own."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began, used = time.monotonic(), spent()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slimbench", "status", str(plan), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return Answer(json.loads(done.stdout)[0], time.monotonic() - began, spent() - used)


def main(count: int = 10_000) -> None:
    for before in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            answer = ask(fill(Path(folder) / "results", count, before))
        made = "before the plan" if before else "by its launch"
        print(f"{answer.facts['done']} of {answer.facts['tasks']} tasks done, recorded {made}: {answer.clock:.2f} s", end="")
        print(f" on the clock, {answer.processor:.2f} s of the processor")


def _of(cell: plans.PlannedCell, stage: Stage, template: Record) -> Record:
    return template.model_copy(update={"cell": cell.identity, "key": cell.identity.keys.of(stage)})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

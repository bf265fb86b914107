"""`slimbench worker` whose stages only take their time: `python -m tests.support.stub_worker PLAN SECONDS [NAMES…]`.

Locks, records and waiting for others are the real ones. The record of a stage says that the stage was stood in for.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from slimbench.harness.launch.drain import drain
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.run.worker import Outcome
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Failure


class Stub(Runner):
    """Sleeps in place of each stage."""

    seconds = 0.0

    def _outcome(self, cell: Cell, stage: Stage) -> Outcome:
        time.sleep(self.seconds)
        return Outcome(Status.UNSUPPORTED, "test", self.seconds, failure=Failure(type="Stub", message="stood in for"))


def main(plan: str, seconds: str, *names: str) -> None:
    Stub.seconds = float(seconds)
    drain(Path(plan), names or None, Console(stderr=True, quiet=True), runner=Stub)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Tasks for whoever runs `slimbench worker`: the plan is written, and what becomes of it is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimbench.harness.launch.watch import watch
from slimbench.harness.run.planning.plan import FOLDER, Plan, PlannedCell
from slimbench.harness.run.runner import Listener
from slimbench.harness.store.store import Store


@dataclass
class WorkersLauncher:
    """Starts nothing. Attributes as of `SlurmLauncher`; after `seconds` the wait ends, not the work."""

    listener: Listener
    seconds: float | None = None
    on_done: Callable[[PlannedCell], None] = lambda cell: None
    detach: bool = False

    @staticmethod
    def check(plan: Plan) -> None:
        """Any plan will do."""

    def launch(self, plan: Plan, store: Store) -> None:
        """As of `Launcher.launch`."""
        self.listener.note(f"to be run by any number of `slimbench worker {store.root / FOLDER / plan.id}.json`")
        if not self.detach:
            watch(plan, store, self.listener, self.on_done, lambda: None, self.seconds)

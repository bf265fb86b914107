"""What a launcher is: it brings the tasks of a plan to where they fit. What came of them stands in the store."""

from __future__ import annotations

from typing import Protocol

from slimbench.harness.run.planning.plan import Plan
from slimbench.harness.store.store import Store


class Launcher(Protocol):
    """Executes plans.

    A task is run when all that stands in its `after` has ended, on a machine that has what its `needs` say. What is recorded is
    skipped, and what another process is doing is left to it.
    """

    @staticmethod
    def check(plan: Plan) -> None:
        """Look at a plan before it is written.

        Raises:
            harness.config.errors.ConfigError: The launcher cannot run it as it is told to.
        """

    def launch(self, plan: Plan, store: Store) -> None:
        """Return when nothing is left to do, or when the launcher was told to stop at a stage boundary.

        Raises:
            harness.store.store.StoreError: The results folder cannot be written.
        """

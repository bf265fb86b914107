"""From overrides to a plan, and from a plan to its launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config import compose
from slimbench.harness.config.errors import ConfigError

if TYPE_CHECKING:
    from slimbench.harness.launch.local import LocalLauncher
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.plan import Plan, PlannedCell
    from slimbench.harness.run.runner import Listener


def plan(overrides: Sequence[str], several: bool) -> Plan:
    """The plan of the cell that the overrides name, or of each cell of a sweep. Every one is validated; nothing is run or written.

    Raises:
        ConfigError: The first mistake in any of them, what the launcher lacks, or a results folder that cannot be written.
    """
    jobs = compose.jobs(overrides) if several else [(list(overrides), compose.resolve(overrides))]
    from slimbench.harness.run.cell import make_cell
    from slimbench.harness.run.planning.obstacles import require_extras, require_sense
    from slimbench.harness.run.planning.plan import make_plan

    cells = [make_cell(config, tuple(job)) for job, config in jobs]
    for cell in cells:
        require_extras(cell)
        require_sense(cell)
    _require_writable(Path(cells[0].config.results))
    found = make_plan(cells)
    if found.launcher.is_local:
        _launcher(found.launcher.name).check(found)
    else:
        _require_own_code(found)
    return found


def launch(
    plan: Plan,
    results: Path,
    listener: Listener,
    seconds: float | None = None,
    on_done: Callable[[PlannedCell], None] = lambda cell: None,
) -> Ledger:
    """Write a plan into its results folder, run what is open of it, and tell what it has come to.

    Args:
        seconds: No stage is started after these.
        on_done: Told of each cell whose stages have all ended.

    Raises:
        StoreError: The results folder cannot be written.
    """
    from slimbench.harness.run.planning import plan as plans
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.store.store import Store

    path, store = plans.write(plan, results), Store(results)
    if not plan.launcher.is_local:
        raise ConfigError(f"launcher={plan.launcher.name} does not submit yet; `slimbench worker {path}` runs the plan where it is started")
    plan = plans.read(path)
    _launcher(plan.launcher.name)(listener, seconds, on_done).launch(plan, store)
    return Ledger(plan, store)


def _launcher(name: str) -> type[LocalLauncher]:
    """The launcher of a name."""
    from slimbench.harness.launch.local import LocalLauncher

    return {"local": LocalLauncher}[name]


def _require_own_code(plan: Plan) -> None:
    """Raise `ConfigError` unless other machines find what a plan names: methods and engines by their names, in the folders of choices."""
    from slimbench.harness.run.trust import Distrusted, require_own_code

    for cell in plan.cells:
        try:
            require_own_code(cell.config, trusted=True)
        except Distrusted as error:
            raise ConfigError(f"{error}; a choice of your own goes into a folder that SLIMBENCH_CONF names") from error


def _require_writable(results: Path) -> None:
    """Raise `ConfigError` if no record could be written."""
    folder = next(folder for folder in (results, *results.absolute().parents) if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"results={results}: cannot write into {folder}: permission denied")

"""From overrides to a plan, and from a plan to its launch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.harness.config import compose
from slimbench.harness.config.errors import ConfigError

if TYPE_CHECKING:
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.plan import Plan, PlannedCell
    from slimbench.harness.run.runner import Listener

_LAUNCHERS = {
    "local": ("local", "LocalLauncher"),
    "slurm": ("slurm", "SlurmLauncher"),
    "ray": ("ray", "RayLauncher"),
    "workers": ("workers", "WorkersLauncher"),
}


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
    detach: bool = False,
) -> Ledger:
    """Write a plan into its results folder, run what is open of it, and tell what it has come to.

    Args:
        seconds: No stage is started after these.
        on_done: Told of each cell whose stages have all ended.
        detach: Leave the stages to the jobs that are submitted, and do not wait.

    Raises:
        ConfigError: The launcher cannot run it, or no host may be called and something that is needed is not in a cache.
        HubError: The hub does not tell the commit of a model.
        StoreError: The results folder cannot be written.
    """
    from slimbench.harness.run import hub
    from slimbench.harness.run.planning import plan as plans
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.store.store import Store

    if detach and plan.launcher.is_local:
        raise ConfigError("--detach: launcher=local runs the stages in this process; give launcher=slurm, ray or workers")
    kind = _launcher(plan.launcher.name)
    kind.check(plan)
    store = Store(results)
    require_supplies(Ledger(plan, store))
    hub.require_commits(cell.config for cell in plan.cells)
    plan = plans.read(_under_way(plan, results) or plans.write(plan, results))
    where = {} if plan.launcher.is_local else {"detach": detach}
    kind(listener, seconds, on_done, **where).launch(plan, store)
    return Ledger(plan, store)


def _under_way(plan: Plan, results: Path) -> Path | None:
    """The file of the same plan whose jobs wait or run: what they have recorded under it is not asked for anew."""
    from slimbench.harness.launch import jobs
    from slimbench.harness.run.planning import plan as plans

    path = results / plans.FOLDER / f"{plan.id}.json"
    try:
        is_it = plan.launcher.name == "slurm" and path.is_file() and jobs.queue(plan) and plans.read(path).id == plan.id
    except (jobs.Unanswered, ConfigError):
        return None
    return path if is_it else None


def require_supplies(ledger: Ledger) -> None:
    """Raise `ConfigError` if no host may be called, and something that is to be run needs what is not in a cache."""
    from slimbench.harness.run.planning import supplies

    supplies.require(ledger.plan.cells[task.cell].config for task in ledger.open() if not task.refusal)


def _launcher(name: str) -> Any:
    """The class of the launcher of a name; that of another is not imported."""
    module, cls = _LAUNCHERS[name]
    return getattr(importlib.import_module(f"slimbench.harness.launch.{module}"), cls)


def _require_own_code(plan: Plan) -> None:
    """Raise `ConfigError` unless other machines find what a plan names: methods and engines by their names, in the folders of choices."""
    from slimbench.harness.run.trust import Distrusted, require_own_code

    try:
        require_own_code((cell.config for cell in plan.cells), trusted=True)
    except Distrusted as error:
        raise ConfigError(f"{error}; a choice of your own goes into a folder that SLIMBENCH_CONF names") from error


def _require_writable(results: Path) -> None:
    """Raise `ConfigError` if no record could be written."""
    folder = next(folder for folder in (results, *results.absolute().parents) if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"results={results}: cannot write into {folder}: permission denied")

"""Tasks of a plan file, run on this machine: what a job of a cluster does, and whoever else lends a hand by `slimbench worker`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch.local import LocalLauncher
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.run.planning.plan import Plan, PlannedCell
from slimbench.harness.run.planning.progress import ProgressDisplay
from slimbench.harness.run.runner import Runner
from slimbench.harness.store.store import Store

if TYPE_CHECKING:
    from rich.console import Console


def drain(
    path: Path,
    names: Collection[str] | None,
    console: Console,
    seconds: float | None = None,
    trusted: bool = False,
    expected: str = "",
    on_done: Callable[[PlannedCell], None] = lambda cell: None,
    runner: Callable[..., Runner] = Runner,
) -> Ledger:
    """Run what is open of some tasks and of what they stand on; what others are at is looked at again until it has ended.

    Args:
        path: `RESULTS/plans/<id>.json`; its records go to RESULTS.
        names: Of the tasks; None for all.
        console: Where the progress is shown.
        seconds: No stage is started after these.
        trusted: Allow code that models and folders of tasks of the plan bring along.
        expected: Id of the plan that must be in the file, if it is given.
        on_done: Told of each cell that was asked for and of which nothing is left to do.
        runner: Makes the runner of a slot.

    Returns:
        What has come of the tasks, those that they stand on included.

    Raises:
        ConfigError: The file is no plan, not one of this installation, or asks for trust.
        StoreError: The results folder cannot be written.
    """
    plan, store = plans.read_safely(path, trusted), Store(path.parent.parent)
    if expected not in ("", plan.id):
        raise ConfigError(f"{path} holds another plan than {expected}, which is to be run")
    share = plan if names is None else plan.only(with_predecessors(plan, names))
    _require_own_keys(share)
    whole = Ledger(plan, store)
    of_plan = {id(mine): planned for mine, planned in zip(share.cells, plan.cells, strict=True)}

    def tell(cell: PlannedCell) -> None:
        planned = of_plan[id(cell)]
        if cell.stages and all(whole.ending(task) for task in plan.of(planned)):
            on_done(planned)

    with ProgressDisplay(share, store, console) as display:
        LocalLauncher(display, seconds, tell, runner).launch(share, store)
    return Ledger(share, store)


def with_predecessors(plan: Plan, names: Collection[str]) -> set[str]:
    """The tasks of some names, and all that must have ended before them."""
    found: set[str] = set()
    waiting = [name for name in names if name in plan.by_name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [before for before in plan.by_name[name].after if before in plan.by_name]
    return found


def matching(plan: Plan, pattern: str) -> set[str]:
    """The names of tasks that a pattern such as `speed-*` takes.

    Raises:
        ConfigError: There is none.
    """
    found = {task.name for task in plan.tasks if fnmatch(task.name, pattern)}
    if not found:
        raise ConfigError(f"no task of the plan is called '{pattern}'; they are called {plan.tasks[0].name} and the like")
    return found


def _require_own_keys(plan: Plan) -> None:
    """Raise `ConfigError` unless this installation gives the cells the keys that the plan has for them."""
    for cell in plan.cells:
        if cell.stages and make_cell(cell.config).identity.keys != cell.identity.keys:
            raise ConfigError(
                f"{cell.label} has other keys here than in the plan, which was made by slimbench {plan.versions.slimbench} or with other"
                " files; give the command again that made it"
            )

"""Tasks on this machine: worker slots that each take the next task that is ready, with a CUDA card each."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch.signals import Stopped
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.run.planning.plan import Plan, PlannedCell, Task
from slimbench.harness.run.runner import Listener, Runner
from slimbench.harness.run.worker import Closed
from slimbench.harness.schema.identity import Reason, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store

_LOOK_AGAIN_S = 1.0
_TURN_S = 1.0
_STOP_S = 20.0  # for what runs to be recorded
_IN_A_ROW = 4
_OF_ALL = {Reason.DISK: "the disk", Reason.NETWORK: "the network", Reason.HUB: "the hub"}
"""What fails for every task alike: after `_IN_A_ROW` failures of it with nothing else between, no further task would do better."""


@dataclass
class LocalLauncher:
    """Runs a plan in worker slots, a thread and a worker process each. More slots than one need as many cards.

    Attributes:
        listener: Who is told what happens.
        seconds: No stage is started after these; None for no limit.
        on_done: Called in the launching thread for each cell that was asked for when all its stages have ended.
        runner: Makes the runner of a slot.
    """

    listener: Listener
    seconds: float | None = None
    on_done: Callable[[PlannedCell], None] = lambda cell: None
    runner: Callable[..., Runner] = field(default=Runner)

    @staticmethod
    def check(plan: Plan) -> None:
        """Raise `ConfigError` if there are fewer cards than slots."""
        _cards(plan)

    def launch(self, plan: Plan, store: Store) -> None:
        """As of `Launcher.launch`.

        At a signal (`harness.launch.signals`) or Ctrl+C what runs is ended and recorded.

        Raises:
            ConfigError: There are fewer cards than slots.
            Stopped: At a signal, when all slots have ended.
        """
        cards = _cards(plan)
        runners = [self.runner(store, self.listener, plan.created, card) for card in cards]
        work = _Work(plan, store, self.listener, len(runners), self.seconds)
        threads = [threading.Thread(target=work.drain, args=(runner, index == 0)) for index, runner in enumerate(runners)]
        try:
            for thread in threads:
                thread.start()
            while (event := work.event()) is not None:
                if isinstance(event, BaseException):
                    raise event
                self.on_done(event)
        except (Stopped, KeyboardInterrupt):
            work.stop()
            for runner in runners:
                runner.interrupt()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(_STOP_S)
            raise
        finally:
            work.stop()
            for runner in runners:
                runner.close()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


class _Work:
    """The tasks of a plan as the slots share them out among each other."""

    def __init__(self, plan: Plan, store: Store, listener: Listener, slots: int, seconds: float | None) -> None:
        self.plan, self.listener, self._slots = plan, listener, slots
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.ledger = Ledger(plan, store)
        self.events: SimpleQueue[PlannedCell | BaseException | None] = SimpleQueue()
        self._turn = threading.Condition()
        self._running: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._held: set[str] = set()
        self._attempts: Counter[str] = Counter()
        self._told: set[int] = set()
        self._failing: tuple[Reason | None, int] = None, 0
        self._stopped = False

    def event(self) -> PlannedCell | BaseException | None:
        """The next event. It is waited for in turns: what interrupts this thread without a signal, as Ray does, is seen between two."""
        while True:
            with suppress(Empty):
                return self.events.get(timeout=_TURN_S)

    def stop(self) -> None:
        """Hand out no more tasks."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def drain(self, runner: Runner, takes_cpu: bool) -> None:
        """What a slot does: task after task until none is left. The end, or what went wrong, is an event."""
        try:
            while (task := self._next(takes_cpu)) is not None:
                self._run(runner, task)
        except Closed:
            pass
        except BaseException as error:
            self.stop()
            self.events.put(error)
        finally:
            runner.close()
            with self._turn:
                self._slots -= 1
                if not self._slots:
                    self.events.put(None)

    def _run(self, runner: Runner, task: Task) -> None:
        cell = self.plan.cells[task.cell]
        record = None
        try:
            record = runner.attempt(cell.cell, task.stage)
        finally:
            with self._turn:
                self._running.discard(task.name)
                if record is None:
                    if task.name not in self._held:
                        self.listener.note(f"{cell.label} {task.stage}: another process is at it; looked at again later")
                    self._held.add(task.name)
                    self._not_before[task.name] = time.monotonic() + _LOOK_AGAIN_S
                else:
                    self._count(record)
                    if record.status is Status.TRANSIENT:
                        self._attempts[task.name] += 1
                        self._not_before[task.name] = time.monotonic() + self._attempts[task.name] * cell.config.limits.retry_pause_s
                self._turn.notify_all()

    def _count(self, record: Record) -> None:
        """Hand out no more tasks where what all of them need has failed several times in a row."""
        reason = record.failure.reason if record.status is Status.TRANSIENT and record.failure else None
        before, times = self._failing
        self._failing = reason, times + 1 if reason is before else 1
        if reason in _OF_ALL and self._failing[1] >= _IN_A_ROW and not self._stopped:
            self._stopped = True
            self.listener.note(
                f"{_OF_ALL[reason]} failed {_IN_A_ROW} times in a row: no further stage is started; the same command goes on"
            )

    def _next(self, takes_cpu: bool) -> Task | None:
        """The first task that is ready and nobody is at; None when there will be none."""
        with self._turn:
            while not self._stopped and time.monotonic() < self._deadline:
                waiting = self._within_reach()
                self._tell()
                if not waiting:
                    return None
                for task in waiting:
                    if self._is_free(task, takes_cpu) and self.ledger.is_ready(task):
                        self._running.add(task.name)
                        return task
                self._turn.wait(_LOOK_AGAIN_S / 2)
            return None

    def _within_reach(self) -> list[Task]:
        """The open tasks, without those that were cut off as often as is allowed and what waits for them."""
        left: set[str] = set()
        for task in self.plan.tasks:
            given_up = self._attempts[task.name] > self.plan.cells[task.cell].config.limits.retries
            if self.ledger.ending(task) is None and (given_up or not left.isdisjoint(task.after)):
                left.add(task.name)
        return [task for task in self.ledger.open() if task.name not in left]

    def _is_free(self, task: Task, takes_cpu: bool) -> bool:
        if task.name in self._running or (task.needs.device == "cpu" and not takes_cpu):
            return False
        return time.monotonic() >= self._not_before.get(task.name, 0.0)

    def _tell(self) -> None:
        """Put the cells whose tasks have all ended, each once."""
        for index, cell in enumerate(self.plan.cells):
            if index not in self._told and all(self.ledger.ending(task) for task in self.plan.of(cell)):
                self._told.add(index)
                if cell.asked:
                    self.events.put(cell)


def _cards(plan: Plan) -> list[int | None]:
    """The first card of each slot; None leaves it to the cell."""
    if (slots := plan.launcher.slots) == 1:
        return [None]
    first = min((cell.config.device.index for cell in plan.cells if cell.config.device.name == "cuda"), default=None)
    if first is None:
        raise ConfigError(f"launcher.slots={slots}: stages on a CPU would disturb each other's times; give launcher.slots=1")
    each = max(cell.config.device.cards for cell in plan.cells)
    if (cards := len(hardware().gpus)) < first + slots * each:
        of_each = f" of device.cards={each}" if each > 1 else ""
        there = f"this machine has {cards} CUDA cards, of which device.index={first} is the first"
        raise ConfigError(f"launcher.slots={slots}{of_each}: {there}")
    return list(range(first, first + slots * each, each))

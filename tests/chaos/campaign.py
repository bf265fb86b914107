"""A campaign: cases are drawn from a seed, played, judged and told, until so many faults of each class have been thrown."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType

from tests.chaos import concurrency, corruption, faults, surroundings
from tests.chaos.invariants import Breach, Calm, Outcome, of_end, of_launch
from tests.chaos.scene import Fault, Scene
from tests.chaos.shim import build
from tests.support.caches import with_kernels
from tests.support.hub_server import HubServer
from tests.support.tiny import save_text, save_tiny, tiny_overrides

TRAINED = (
    "method=omniquant stages=[quality] method.omniquant.steps=4 method.omniquant.group_size=32 "
    "calibration=file:{folder}/learned.txt calibration_samples=4 calibration_length=32"
)
QUALITY, SPEED = "method=rtn-4bit,brood stages=[quality]", "method=rtn-4bit stages=[quality,speed]"
FROM_HUB = f"{QUALITY} model.source=hf:{surroundings.HUB_MODEL} model.revision=main"
WITH_CLOCK, WITH_MEMORY = f"limits.wall_s={surroundings.WALL_S}", f"limits.memory_gb={surroundings.MEMORY_GB}"
_LAUNCHES = 16  # in which faults are thrown into one case, at most
_FINISHING = 4  # launches of the undisturbed command after them, at most
_BARREN = 10  # cases of a class in a row in which nothing could be thrown, after which it is given up
_MISSES = 3  # launches in a row in which nothing was thrown, after which what is left is not thrown


@dataclass(frozen=True)
class Kind:
    """A class of faults.

    Attributes:
        draw: Draws one fault for a sweep of these words.
        floor: Of 300 faults, at least so many.
        together: Faults thrown into one sweep.
        sweeps: The overrides of the sweeps that it is thrown into, one of them at a time.
        resumed: The sweep has been run to its end before, and its folders are copied.
        hub: The model lies on a hub, which is on this machine.
    """

    draw: Callable[[random.Random, str], Fault]
    floor: int
    together: int = 5
    sweeps: tuple[str, ...] = (QUALITY, SPEED)
    resumed: bool = False
    hub: bool = False


KINDS = {
    "signals": Kind(faults.signals, 50),
    "descendants": Kind(faults.descendants, 15, 4, (QUALITY,)),
    "storage": Kind(faults.storage, 60, 6, (QUALITY, SPEED, TRAINED)),
    "corruption": Kind(corruption.corruption, 30, 4, (QUALITY,), resumed=True),
    "concurrency": Kind(concurrency.concurrency, 30, 3, (QUALITY,)),
    "time": Kind(surroundings.clock, 10, 3, (f"{QUALITY} {WITH_CLOCK}",)),
    "network": Kind(surroundings.network, 15, 3, (FROM_HUB,), hub=True),
    "memory": Kind(surroundings.memory, 10, 2, (f"{QUALITY} {WITH_MEMORY}",)),
}


@dataclass
class Played:
    """A case that has been played.

    Attributes:
        thrown: What was thrown, in order.
        classes: Of what was thrown.
        launches: Of the command in all.
    """

    kind: str
    number: int
    thrown: list[str]
    breaches: list[Breach]
    launches: int
    seconds: float
    codes: list[list[int | None]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    @property
    def outcomes(self) -> list[Outcome]:
        return sorted({breach.outcome for breach in self.breaches}) or [Outcome.OK]

    def line(self) -> str:
        told = self.__dict__ | {"breaches": [[breach.outcome, breach.what] for breach in self.breaches]}
        return json.dumps(told, ensure_ascii=False)

    @classmethod
    def read(cls, line: str) -> Played:
        told = json.loads(line)
        return cls(**told | {"breaches": [Breach(Outcome(outcome), what) for outcome, what in told["breaches"]]})


def _print(line: str) -> None:
    print(line, flush=True)


class Campaign:
    """A seeded campaign in a folder of its own.

    Args:
        folder: Calm sweeps, the folders of cases while they are played, those that broke something, and `faults.jsonl`.
        seed: What is drawn depends on it, on the class and on the number of the case.
        say: Told one line after each case.
        kinds: The classes by name.
    """

    def __init__(
        self, folder: Path, seed: int, say: Callable[[str], None] = _print, kinds: Mapping[str, Kind] = MappingProxyType(KINDS)
    ) -> None:
        self.folder, self.seed, self.say, self.kinds = folder, seed, say, kinds
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "faults.jsonl"
        self.shim = build(folder)
        self.words = _model(folder)
        self._calm: dict[str, Calm] = {}
        self._turn = Lock()

    def run(self, wanted: dict[str, int], jobs: int, resume: bool = False) -> list[Played]:
        """Play cases until so many faults of each class have been thrown.

        Args:
            jobs: Cases at a time.
            resume: Count what the folder's `faults.jsonl` tells of, and go on after it; cases that broke something are played again.
        """
        if not resume:
            self._begin()
        played = [case for case in map(Played.read, self.log.read_text().splitlines()) if not case.breaches] if self.log.exists() else []
        self.log.write_text("".join(case.line() + "\n" for case in played))
        began, before = time.monotonic(), sum(len(case.thrown) for case in played)
        counts = {kind: sum(len(case.thrown) for case in played if case.kind == kind) for kind in wanted}
        taken = {kind: {case.number for case in played if case.kind == kind} for kind in wanted}
        barren = dict.fromkeys(wanted, 0)
        flying: dict[Future[Played], tuple[str, int]] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                expected = {kind: counts[kind] + sum(n for k, n in flying.values() if k == kind) for kind in wanted}
                lacking = [kind for kind in wanted if expected[kind] < wanted[kind] and barren[kind] < _BARREN]
                if lacking and len(flying) < jobs:
                    kind = min(lacking, key=lambda kind: expected[kind] / wanted[kind])
                    size = min(self.kinds[kind].together, wanted[kind] - expected[kind])
                    number = next(number for number in itertools.count() if number not in taken[kind])
                    taken[kind].add(number)
                    flying[pool.submit(self.play, kind, number, size)] = kind, size
                    continue
                if not flying:
                    return played
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    kind, _ = flying.pop(future)
                    case = future.result()
                    played.append(case)
                    counts[kind] += len(case.thrown)
                    barren[kind] = 0 if case.thrown else barren[kind] + 1
                    with self.log.open("a") as stream:
                        stream.write(case.line() + "\n")
                    self._tell(case, sum(counts.values()), sum(wanted.values()), began, before)

    def _begin(self) -> None:
        """Remove what a campaign before has left in the folder, but for the model."""
        self.log.unlink(missing_ok=True)
        self._calm.clear()
        for path in self.folder.iterdir():
            if path.is_dir() and path.name.partition("-")[0] in ("calm", *self.kinds):
                shutil.rmtree(path)

    def _tell(self, case: Played, done: int, wanted: int, began: float, before: int) -> None:
        spent = time.monotonic() - began
        left = spent / max(done - before, 1) * max(wanted - done, 0)
        outcome = ", ".join(case.outcomes)
        self.say(
            f"{done:3d}/{wanted} about {left / 60:.0f} min left  {case.kind} {case.number}: {outcome}  "
            f"({len(case.thrown)} faults, {case.launches} launches, {case.seconds:.0f} s)"
        )
        if case.breaches:
            self.say(f"      thrown: {'; '.join(case.thrown)}; exit codes {case.codes}")
        for breach in case.breaches:
            self.say(f"      {breach.outcome}: {breach.what}")

    def play(self, kind: str, number: int, size: int) -> Played:
        """Play one case: throw its faults, give the same command until it is done, and judge.

        Args:
            size: Faults to be thrown.
        """
        dice = random.Random(f"{self.seed}-{kind}-{number}")
        words = dice.choice(self.kinds[kind].sweeps)
        calm = self.calm(words, self.kinds[kind].hub)
        began, breaches, thrown, codes = time.monotonic(), [], [], []
        root = self.folder / f"{kind}-{number}"
        left = [self.kinds[kind].draw(dice, words) for _ in range(size)]
        misses, complete = 0, False
        with self._scene(root, words, self.kinds[kind].hub, self._calm_folder(words) if self.kinds[kind].resumed else None) as scene:
            while left and misses < _MISSES and len(codes) < _LAUNCHES:
                launch = scene.launch(left)
                left = [fault for fault in left if fault not in launch.thrown]
                thrown += launch.thrown
                misses = 0 if launch.thrown else misses + 1
                codes.append(launch.codes)
                breaches += of_launch(scene, launch, calm, thrown)
                if all(code == 0 for code in launch.codes):
                    break  # all is recorded: what was not thrown has no moment any more
            for _ in range(_FINISHING):
                launch = scene.launch([])
                codes.append(launch.codes)
                breaches += of_launch(scene, launch, calm, thrown)
                if complete := all(code == 0 for code in launch.codes):
                    break
            breaches += of_end(scene, calm, complete)
        if not breaches:
            shutil.rmtree(root)
        seconds = round(time.monotonic() - began, 1)
        told, classes = [fault.what for fault in thrown], sorted({fault.kind for fault in thrown})
        return Played(kind, number, told, list(dict.fromkeys(breaches)), len(codes), seconds, codes, classes)

    @contextmanager
    def _scene(self, root: Path, words: str, hub: bool, of: Path | None = None) -> Iterator[Scene]:
        """A scene with a cache that is empty but for kernels, or a copy of another's folders, whose processes are gone afterwards."""
        with HubServer() if hub else nullcontext() as server:
            if server:
                server.add("models", surroundings.HUB_MODEL, self.folder / "model")
            scene = Scene(root, self.shim, [*self.words, *words.format(folder=self.folder).split()], of, server)
            if of is None:
                with_kernels(scene.cache)
            with scene.ended():
                yield scene

    def calm(self, words: str, hub: bool = False) -> Calm:
        """What a sweep gives where nothing is thrown; run once, as limits change nothing of it."""
        words = _unlimited(words)
        with self._turn:
            if words not in self._calm:
                folder = self._calm_folder(words)
                if not (folder / "done").exists():
                    with self._scene(folder, words, hub) as scene:
                        launch = scene.launch([])
                    if launch.codes != [0]:
                        raise RuntimeError(f"the calm sweep ended with {launch.codes}: {launch.said[0][-2000:]}")
                    (folder / "done").touch()
                self._calm[words] = Calm.of(folder / "results")
            return self._calm[words]

    def _calm_folder(self, words: str) -> Path:
        return self.folder / f"calm-{random.Random(_unlimited(words)).randrange(1 << 32):08x}"


def _unlimited(words: str) -> str:
    return " ".join(word for word in words.split() if not word.startswith("limits."))


def _model(folder: Path) -> list[str]:
    """Write the tiny model and its text unless they are there; the overrides that name them."""
    model, corpus = folder / "model", folder / "text.txt"
    if not corpus.exists():
        save_tiny(model)
        save_text(corpus)
        (folder / "learned.txt").write_text(
            " ".join(f"Number {i} comes before number {i + 1}; that is what is learned." for i in range(100))
        )
    return tiny_overrides(model, corpus)

"""Several commands at once: on one results folder or on one cache, in another order, in another pid namespace, without `flock`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

from tests.chaos.moments import moment
from tests.chaos.scene import Fault, Scene

_REVERSED = "method=brood,rtn-4bit"
_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def _twin(scene: Scene) -> None:
    scene.start()


def _reversed(scene: Scene) -> None:
    scene.start(_REVERSED)


def _own_cache(scene: Scene) -> None:
    scene.start(environment={"SLIMBENCH_CACHE": str(scene.cache.with_name("other-cache"))})


def _namespace(scene: Scene) -> None:
    """The same host name, and process ids that mean something else."""
    scene.start(wrapper=_NAMESPACE)


def _other_results(scene: Scene) -> None:
    """On the same cache; these records have to be whole in the end, too."""
    scene.places.append(scene.root / f"results-{len(scene.places)}")
    scene.start(f"results={scene.places[-1]}")


_SWEEPS: dict[str, Callable[[Scene], None]] = {
    "a second sweep": _twin,
    "a sweep in another order": _reversed,
    "a sweep with a cache of its own": _own_cache,
    "a sweep in another pid namespace": _namespace,
    "a sweep into other results": _other_results,
}
_MEANWHILE: dict[str, Callable[[Scene], object]] = {
    "the artefacts removed": lambda scene: shutil.rmtree(scene.cache / "objects", ignore_errors=True),
    "all of the cache removed": lambda scene: [
        shutil.rmtree(path, ignore_errors=True) for path in scene.cache.iterdir() if path.is_dir() and not path.is_symlink()
    ],
    "records checked": lambda scene: scene.command("records", "check", "--results", str(scene.results)),
    "status asked": lambda scene: scene.command("status", str(scene.results)),
    "a board built": lambda scene: scene.command(
        "board", "build", "--results", str(scene.results), "--out", str(scene.root / "board-out"), "--no-figures"
    ),
    "a second sweep, late": _twin,
}


def concurrency(dice: random.Random, words: str) -> Fault:
    """Another command from the start, or something done while a stage is at a certain point."""
    if dice.random() < 0.6:
        name = dice.choice(sorted(_SWEEPS))
        without = dice.random() < 0.25
        start = _SWEEPS[name]

        def beside(scene: Scene) -> None:
            if without:
                scene.board.set_flock(False)
            start(scene)

        return Fault("concurrency", f"{name}{', no flock' if without else ''}", beside=beside)
    name = dice.choice(sorted(_MEANWHILE))
    place, rule = moment(dice, words, stages_only=True)
    do = _MEANWHILE[name]
    return Fault("concurrency", f"{name}, {place}", rule, lambda scene, pid: do(scene) and None)

"""Fixtures of all tests that ask for them, one of each for a session: a cache, a tiny model and its text, a runner with its worker."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimbench.harness.run.runner import Runner
from slimbench.harness.store.store import Store
from tests.support.caches import with_kernels
from tests.support.running import Listener
from tests.support.tiny import save_text, save_tiny, tiny_overrides


@contextlib.contextmanager
def isolated_cache(folder: Path) -> Iterator[Path]:
    """A cache of the tests' own, but for compiled kernels; what uses it asks no network, and waits for no stage of another test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMBENCH_CACHE", str(with_kernels(folder / "cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SLIMBENCH_TURNS", str(folder / "turns"))
        yield folder / "cache"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with isolated_cache(tmp_path_factory.mktemp("own")) as folder:
        yield folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with random weights and a tokenizer of one token a byte."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some thousand characters."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    save_text(file)
    return file


@pytest.fixture(scope="session")
def overrides(tiny: Path, text: Path) -> list[str]:
    """Overrides that make a cell of the tiny model: seconds on any machine."""
    return tiny_overrides(tiny, text)


@pytest.fixture(scope="session")
def quick_collections() -> Iterator[None]:
    """auto-round collects garbage again and again; over all that is imported by now each collection took a second."""
    with contextlib.suppress(ImportError):
        import auto_round  # noqa: F401
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of modules that tests and workers import from."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ["PYTHONPATH"]]))
        yield folder


@pytest.fixture(scope="session")
def shared(modules: Path) -> Iterator[Runner]:
    """One runner, and so one worker, for all tests of a process: starting it imports torch."""
    runner = Runner(Store(Path("unused")), Listener())
    yield runner
    runner.close()


@pytest.fixture
def runner(shared: Runner, tmp_path: Path) -> Runner:
    shared.store, shared.listener = Store(tmp_path / "results"), Listener()
    return shared

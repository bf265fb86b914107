"""Fixtures of the integration tests: the real packaged model, and the user's cache."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.caches import with_kernels
from tests.support.fixtures import isolated_cache
from tests.support.paths import SLIMBENCH

os.environ.setdefault("OMP_NUM_THREADS", "1")  # other work may run beside them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for one module: those that come after it, in any order, find the user's again, where the real model is."""
    with isolated_cache(tmp_path_factory.mktemp("own")) as folder:
        yield folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of smollm2-135m in bf16 safetensors."""
    from slimbench.harness.config.compose import resolve
    from slimbench.harness.stages.models import prepare

    return prepare(resolve([]).model, lambda phase: None)


@dataclass(frozen=True)
class Sweep:
    """A sweep of the tiny model from the command line: cells of each kind, one of them a pipeline.

    Attributes:
        overrides: What makes the model tiny.
        undisturbed: Folder of its records where nothing came between; only to be read.
    """

    overrides: list[str]
    undisturbed: Path

    PIPELINES = ("dense", "rtn-4bit", "magnitude+rtn-8bit", "magnitude", "int8-dynamic")
    STAGES = 3 * len(PIPELINES)

    @property
    def command(self) -> list[str]:
        """All but where results go."""
        return [*SLIMBENCH, "sweep", *self.overrides, "method=dense,rtn-4bit,[magnitude,rtn-8bit],magnitude,int8-dynamic"]


@pytest.fixture(scope="session")
def sweep(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep that has been run once."""
    folder = tmp_path_factory.mktemp("sweep")
    made = Sweep(overrides, folder / "results")
    environment = os.environ | {"SLIMBENCH_CACHE": str(with_kernels(folder / "cache")), "HF_HUB_OFFLINE": "1"}
    command = [*made.command, f"results={made.undisturbed}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return made

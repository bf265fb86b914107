"""What holds for all tests: processes that they start find the tests' own modules, and slimbench has one import name."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.support.small_caches import sitecustomize  # noqa: F401  # before anything that reads the sizes of caches

# isort: split
from slimbench.harness.measure import hardware
from tests.support.modules import second_names
from tests.support.paths import ROOT, SMALL_CACHES

pytest_plugins = ["tests.support.fixtures"]

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SMALL_CACHES), str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module", autouse=True)
def loaded_libraries_stay() -> None:
    """The collections of garbage that tests ask for need not go through what is loaded by now, which stays to the end."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is freed at exit is no leak that a library would report."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_import_name() -> Iterator[None]:
    """After the last test no module of slimbench has been imported by the name of a folder at the top, where it would be another module."""
    yield
    assert hardware._CACHES == SMALL_CACHES, "sizes of caches are not those of the tests"
    assert not second_names(), "imported without `slimbench.`"

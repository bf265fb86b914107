"""Unit tests have a cache of their own and share the cores; Triton runs in its interpreter."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores with each other


def _import_triton_for_its_interpreter() -> None:
    """Triton decides when it is imported how its own functions run; a library that imports it first must not decide for the tests."""
    if importlib.util.find_spec("triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            import triton.language  # noqa: F401


_import_triton_for_its_interpreter()


@pytest.fixture(scope="session", autouse=True)
def own_cache(cache: Path) -> None:
    """No test reads or fills the user's cache."""

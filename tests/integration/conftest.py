"""Fixtures of the integration tests: the real packaged model, and the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.conftest import overrides, text, tiny

__all__ = ["overrides", "text", "tiny"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of smollm2-135m in bf16 safetensors."""
    from slimbench.harness.config.compose import resolve
    from slimbench.harness.stages.models import prepare

    return prepare(resolve([]).model, lambda phase: None)

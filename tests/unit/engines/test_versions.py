"""What is read from an engine's source is what its class says."""

from __future__ import annotations

import pytest

from slimbench.harness.config import engines
from slimbench.harness.config.targets import locate


@pytest.mark.parametrize("target", sorted({engine.target for engine in engines.catalogue()}))
def test_the_version_read_from_the_source_is_the_class_own(target: str) -> None:
    assert vars(locate(target))["version"] == engines.version(target)

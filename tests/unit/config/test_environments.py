"""Environments on demand: known ones, mistakes, and what identifies one. Making one is an integration test."""

from __future__ import annotations

import pytest

from slimbench.harness.config import environments
from slimbench.harness.config.environments import Environment
from slimbench.harness.config.errors import ConfigError


def test_known_environments_pin_what_they_install() -> None:
    for item in environments.catalogue().values():
        assert item.description
        assert any("==" in requirement for requirement in item.requirements)
        assert not item.is_made, "the cache of the tests is empty"


def test_an_unknown_one_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no environment 'lamacpp'; did you mean 'llamacpp'"):
        environments.get("lamacpp")


def test_the_folder_follows_the_requirements() -> None:
    one, other = (Environment("x", "", [f"pip=={version}"]) for version in (1, 2))
    assert one.folder != other.folder
    assert one.folder == Environment("x", "other words", one.requirements).folder
    assert one.folder != Environment("x", "", one.requirements, absent=("wheel",)).folder

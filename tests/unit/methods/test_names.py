"""Each shipped class has a name and a version of its own: they stand in keys in place of where its file lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from slimbench.harness.config import engines
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import StepConfig
from slimbench.harness.config.sources import shipped, shipped_method
from slimbench.harness.config.targets import locate
from slimbench.harness.schema.former import legacy_keys
from slimbench.methods.quantization.weight.rtn import RTN

FROZEN: dict[str, Any] = json.loads(legacy_keys.DATA.read_text(encoding="utf-8"))
CLASSES = {shipped_method(choice)["_target_"] for choice in shipped("method")}


def test_every_shipped_class_states_its_own_name_and_no_two_share_one() -> None:
    own = {target: vars(locate(target)).get("name") for target in CLASSES}
    assert None not in own.values()
    assert len(set(own.values())) == len(CLASSES)
    assert all(locate(target).version >= 1 for target in CLASSES)


def test_classes_that_have_records_keep_the_names_that_stand_in_them() -> None:
    names = {locate(target).__name__ + " " + locate(target).name for target in CLASSES}
    frozen = {target.rpartition(".")[2] + " " + name for target, name in FROZEN["methods"].items()}
    assert frozen <= names


@dataclass(frozen=True)
class _Nameless(RTN):
    """A class that would pass for the one that it is derived from."""


def test_a_class_without_a_name_of_its_own_is_refused() -> None:
    step = StepConfig(name="mine", target=f"{__name__}._Nameless")
    with pytest.raises(ConfigError, match=r"method 'mine': .*_Nameless has no name of its own"):
        build_method(step)


def test_engines_that_have_records_of_old_keys_are_still_the_classes_that_stand_in_them() -> None:
    frozen = {(name, target.rpartition(".")[2]) for target, names in FROZEN["engines"].items() for name in names}
    assert frozen <= {(name, engines.get(name).target.rpartition(".")[2]) for name in shipped("engine")}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("slimbench.harness.engines.nowhere.Engine", "no module"),
        ("slimbench.harness.engines.base.Nothing", "no such class"),
        ("slimbench.harness.engines.base.Engine", "states no version"),
    ],
)
def test_an_engine_without_a_version_is_refused_in_one_line(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engines.version(target)

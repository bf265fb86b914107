"""What a task key depends on: names, versions and settings; no path, no hardware, nothing that is absent."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from slimbench.harness.store import keys
from slimbench.harness.store.keys import Parts, model_part, present, speed_part, suite_part

SUITE = {
    "name": "quick",
    "seqlen": 512,
    "windows": 8,
    "limit": None,
    "corpus": ["words"],
    "include_path": None,
    "tasks": [],
    "batch_tokens": 9,
}
PARTS = Parts(
    model=model_part("asset:tiny", "c0ffee", None, "bfloat16", None),
    pipeline=[{"name": "rtn", "version": 1, "settings": {"bits": 4, "head_bits": None}}],
    calibration=None,
    seed=0,
    compress_device="cpu",
    engine={"name": "transformers", "version": 1},
    device="cpu",
    suite=suite_part(SUITE, ["text"], None, {"window": "window-1"}),
    speed=speed_part({"name": "quick", "grid": [{"batch": 1}], "largest_batch": None}, 1),
)
FROZEN = {"compress": "38dbbd84c6333f25", "quality": "22825bfe53adb969", "speed": "4bee3c5618e7e78f"}
STAGES = ("compress", "quality", "speed")


def moved(**change: Any) -> set[str]:
    """The stages whose keys are others after a change."""
    was, now = PARTS.keys(), dataclasses.replace(PARTS, **change).keys()
    return {stage for stage in STAGES if getattr(was, stage) != getattr(now, stage)}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"pipeline": [{"name": "gptq", "version": 1, "settings": {"bits": 4}}]}, set(STAGES)),
        ({"pipeline": [{"name": "rtn", "version": 2, "settings": {"bits": 4}}]}, set(STAGES)),
        ({"pipeline": [{"name": "rtn", "version": 1, "settings": {"bits": 3}}]}, set(STAGES)),
        ({"model": model_part("asset:tiny", "decaf", None, "bfloat16", None)}, set(STAGES)),
        ({"model": model_part("asset:tiny", "c0ffee", None, "float32", None)}, set(STAGES)),
        ({"model": model_part("asset:tiny", "c0ffee", None, "bfloat16", None, code=True)}, set(STAGES)),
        ({"model": model_part("asset:tiny", "c0ffee", None, "bfloat16", None, converter=2)}, set(STAGES)),
        ({"calibration": "news"}, set(STAGES)),
        ({"seed": 1}, set(STAGES)),
        ({"compress_device": "cuda"}, set(STAGES)),
        ({"engine": {"name": "transformers", "version": 2}}, {"quality", "speed"}),
        ({"engine": {"name": "compiled", "version": 1}}, {"quality", "speed"}),
        ({"device": "cuda"}, {"quality", "speed"}),
        ({"suite": suite_part(SUITE, ["text"], None, {"window": "window-2"})}, {"quality"}),
        ({"suite": suite_part(SUITE, ["other"], None, {"window": "window-1"})}, {"quality"}),
        ({"suite": suite_part(SUITE, ["text"], "tasks", {"window": "window-1"})}, {"quality"}),
        ({"speed": speed_part({"name": "quick", "grid": [{"batch": 1}], "largest_batch": None}, 2)}, {"speed"}),
        ({"threads": 2}, {"speed"}),
    ],
)
def test_a_key_follows_what_its_stage_depends_on(change: dict[str, Any], stages: set[str]) -> None:
    assert moved(**change) == stages


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": [{"name": "rtn", "version": 1, "settings": {"bits": 4}}]},
        {"pipeline": [{"name": "rtn", "version": 1, "settings": {"bits": 4, "head_bits": None, "joined_later": None}}]},
        {"model": model_part("asset:renamed", "c0ffee", "main", "bfloat16", None)},
        {"model": model_part("asset:tiny", "c0ffee", None, "bfloat16", None, converter=1)},
        {"suite": suite_part(SUITE | {"name": "other", "batch_tokens": 1}, ["text"], None, {"window": "window-1"})},
        {"suite": suite_part(SUITE | {"prompts": None}, ["text"], None, {"window": "window-1"})},
        {"speed": speed_part({"name": "other", "grid": [{"batch": 1}], "joined_later": None}, 1)},
    ],
)
def test_what_is_absent_or_only_a_name_moves_no_key(change: dict[str, Any]) -> None:
    assert moved(**change) == set()


def test_a_new_part_leaves_the_keys_of_cells_without_it() -> None:
    assert present(model=1, recipe=None, teacher=None) == present(model=1) != present(model=1, recipe="a")


def test_keys_of_today_stay_those_of_tomorrow() -> None:
    """Frozen: where this fails, every record would have to be migrated."""
    assert PARTS.keys().model_dump() == FROZEN


def test_no_hardware_is_known_here() -> None:
    assert "hardware" not in {name for name, _ in inspect.getmembers(keys)} and "cores" not in inspect.getsource(keys)

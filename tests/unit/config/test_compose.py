"""Composing: sweeps multiply, cells share nothing, 500 cells take a second or two; `contract/test_hydra.py` holds the values."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from slimbench.harness.config import compose
from slimbench.harness.config.sources import CONF_DIR, read_yaml, shipped
from tests.support.own_conf import own, own_conf

__all__ = ["own", "own_conf"]


def test_what_an_experiment_sweeps_over_and_the_command_line_are_multiplied(own: None) -> None:
    found = [
        job for job, _ in compose.jobs(["experiment=own", "seed=5", "limits.wall_s=1,2", "~method.magnitude", "settings.group_size=null"])
    ]
    assert len(found) == 4 and all("seed=5" in job for job in found)
    assert [(job[1], job[3]) for job in found] == [
        (f"suite.seqlen={n}", f"limits.wall_s={s}") for n, s in itertools.product((16, 32), (1, 2))
    ]


def test_a_cell_shares_no_container_with_another(own: None) -> None:
    first, second = (config for _, config in compose.jobs(["method=rtn-4bit", "method.rtn-4bit.bits=3,8"]))
    assert (first.pipeline[0].settings["bits"], second.pipeline[0].settings["bits"]) == (3, 8)
    assert first.pipeline[0].settings["group_size"] == second.pipeline[0].settings["group_size"] == 64


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sequence[str]]]:
    """The overrides of every composition that Hydra makes."""
    calls: list[Sequence[str]] = []
    original = compose._hydra_compose

    def counting(overrides: Sequence[str], **kwargs: Any) -> Any:
        calls.append(overrides)
        return original(overrides, **kwargs)

    monkeypatch.setattr(compose, "_hydra_compose", counting)
    yield calls


def test_500_cells_are_one_composition(counted: list[Sequence[str]]) -> None:
    methods, models = "dense,awq,gptq,hqq,rtn-4bit,rtn-3bit,nf4,fp4,bcq,kmeans-3bit", "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b"
    began = time.process_time()
    found = compose.jobs([f"method={methods}", f"model={models}", "suite.windows=1,2,3,4,5", "calibration_seed=0,1"])
    spent = time.process_time() - began
    assert len(found) == 500 and len(counted) == 1
    assert spent < 5  # about 1 s on an idle core; Hydra alone takes 35 s
    assert {(c.pipeline[0].name, c.model.name, c.suite.windows, c.calibration.seed) for _, c in found} == set(
        itertools.product(methods.split(","), models.split(","), range(1, 6), range(2))
    )


def test_no_name_of_a_choice_of_ones_own_can_be_the_empty_one() -> None:
    for group in read_yaml(CONF_DIR / "config.yaml")["defaults"]:
        for name in group if isinstance(group, dict) else ():
            assert compose._EMPTY not in shipped(name)

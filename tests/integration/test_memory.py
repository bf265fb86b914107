"""The memory split and the largest batch, on real allocations of this process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure import memory
from slimbench.harness.measure.capacity import largest_batch
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.loaded import Step
from slimbench.harness.measure.memory import measure, peak_of
from slimbench.harness.schema.speed import MemoryResult
from tests.support.tiny import save_model
from tests.unit.measure.test_latency import Clock, Simulated

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture(scope="module")
def model(tiny: Path) -> TransformersModel:
    return TransformersModel(load_pretrained(tiny, "cpu"), "cpu")


def test_the_split_adds_up(model: TransformersModel) -> None:
    config, weights = model.module.config, sum(p.nbytes for p in model.module.parameters())
    split = measure(model, SpeedPoint(batch=2, prompt=64, new_tokens=8), weights)
    assert split.weight_bytes == weights
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 2 * (64 + 7)
    assert split.kv_cache_bytes == cache, "keys and values, layers, heads, width, float32, sequences, positions"
    assert split.process_peak_bytes >= split.process_bytes > weights
    assert split.device_used_bytes is split.reserved_bytes is split.device_process_bytes is None


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model takes its steps as they are, so that no compiler's memory is measured."""
    monkeypatch.setattr(CompiledModel, "_compiled_step", lambda self: self._next)


def _eager_and_compiled(folder: Path) -> list[MemoryResult]:
    CompiledModel._compiled_step = lambda self: self._next  # type: ignore[method-assign]
    compiled = CompiledModel(save_model(folder, num_hidden_layers=24).load(), "cpu")
    point = SpeedPoint(batch=4, prompt=1000, new_tokens=2)
    compiled.prefill(prompts(compiled, point), room=point.new_tokens)
    splits = []
    for model in (TransformersModel(compiled.module, "cpu"), compiled):
        memory.give_back()
        splits.append(measure(model, point, 0))
    return splits


@pytest.mark.skipif(not memory._reset_peak(), reason="the system keeps no peak that can be reset")
def test_a_cache_that_stays_with_the_model_is_not_taken_off_the_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold in ("MMAP", "TRIM"):  # blocks are given back one by one, so that peaks are those of needs, not of a heap with holes
        monkeypatch.setenv(f"MALLOC_{threshold}_THRESHOLD_", "65536")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # as a stage: what earlier tests let go of would hide needs
        eager, kept = fresh.submit(_eager_and_compiled, tmp_path).result()
    assert eager.activation_bytes and eager.kv_cache_bytes and kept.kv_cache_bytes
    assert min(eager.kv_cache_bytes, kept.kv_cache_bytes) > 0.7 * eager.activation_bytes, "taken off twice, little would be left"
    assert 0.8 < kept.activation_bytes / eager.activation_bytes < 1.2


def test_caches_of_earlier_tries_are_gone_when_a_larger_batch_is_tried(tiny: Path, uncompiled: None) -> None:
    compiled = CompiledModel(load_pretrained(tiny, "cpu"), "cpu")
    seen = []

    def next_token(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        seen.append(len(compiled._states))
        return torch.zeros(len(ids), 1, dtype=torch.int64)

    compiled._next = next_token  # type: ignore[method-assign]
    assert largest_batch(compiled, SpeedPoint(batch=1, prompt=8, new_tokens=4), 8, 100 * 2**30, 60).batch == 8
    assert set(seen) == {1} and not compiled._states


@pytest.mark.skipif(not memory._reset_peak(), reason="the system keeps no peak that can be reset")
def test_the_peak_is_that_of_the_work_alone() -> None:
    large = torch.ones(100 * MB, dtype=torch.uint8)
    del large
    peak = peak_of([CPU], lambda: len(torch.ones(32 * MB, dtype=torch.uint8)))
    assert peak.result == 32 * MB
    assert peak.highest is not None and 30 * MB < peak.highest - peak.before < 48 * MB


class Hungry(Simulated):
    """Takes `each` megabytes for each sequence, and refuses more than `most` of them."""

    most = 10**9
    each = 8

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if len(ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Step(torch.zeros(len(ids), 1, dtype=torch.int64), torch.ones(self.each * len(ids) * MB, dtype=torch.uint8))

    def decode_step(self, step: Step) -> Step:
        return step


class Relieved(Hungry):
    """Lets go of something else after its batch of four."""

    ballast: torch.Tensor | None = None

    def decode_step(self, step: Step) -> Step:
        if len(step.token) == 4:
            self.ballast = None
        return step


def hungry(most: int = 10**9) -> Any:
    made = Hungry(Clock(), np.random.default_rng(0), 1.0, 0.0, 0.0)
    made.most = most
    return made


def test_the_largest_batch_ends_at_the_cap_memory_or_time(model: TransformersModel) -> None:
    point = SpeedPoint(batch=1, prompt=8, new_tokens=4)
    room = 100 * 2**30
    assert largest_batch(model, point, 5, room, 60).model_dump(include={"batch", "limited_by"}) == {"batch": 5, "limited_by": "cap"}
    refused = largest_batch(hungry(8), point, 64, room, 60)
    assert (refused.batch, refused.limited_by) == (8, "memory")
    assert refused.bytes_per_sequence == pytest.approx(8 * MB, rel=0.2)
    assert largest_batch(hungry(0), point, 64, room, 60).batch == 0
    late = largest_batch(hungry(), point, 64, room, 0.0)
    assert (late.batch, late.limited_by, late.bytes_per_sequence) == (1, "budget", None)


def test_memory_that_others_let_go_is_no_saving_of_a_batch() -> None:
    model: Any = Relieved(Clock(), np.random.default_rng(0), 1.0, 0.0, 0.0)
    model.ballast = torch.ones(32 * MB, dtype=torch.uint8)
    found = largest_batch(model, SpeedPoint(batch=1, prompt=8, new_tokens=4), 8, 100 * 2**30, 60)
    assert model.ballast is None and found.bytes_per_sequence == pytest.approx(8 * MB, rel=0.2)


class Scattered(Hungry):
    """Leaves in the heap, after each batch, what it needs no more: pieces between others that stay."""

    def __init__(self, *simulated: Any) -> None:
        super().__init__(*simulated)
        self.kept: list[torch.Tensor] = []

    def decode_step(self, step: Step) -> Step:
        pieces = [torch.ones(MB // 32, dtype=torch.uint8) for _ in range(32 * 320)]  # too small to be mapped one by one
        self.kept.append(pieces[-1])
        return step


def test_a_batch_that_would_not_fit_on_a_cpu_is_foreseen() -> None:
    memory.give_back()
    model = hungry()
    model.each = 32  # the kernel's counts of pages may lag by tens of megabytes
    room = int((memory.resident_bytes() + 1440 * MB) / 0.9)
    found = largest_batch(model, SpeedPoint(batch=1, prompt=8, new_tokens=4), 1024, room, 60)
    assert (found.batch, found.limited_by) == (32, "memory"), "1,024 MB fit, 2,048 MB would not"


def test_what_the_heap_keeps_for_later_leaves_room_for_a_batch() -> None:
    memory.give_back()
    model: Any = Scattered(Clock(), np.random.default_rng(0), 1.0, 0.0, 0.0)
    room = int((memory.resident_bytes() + 720 * MB) / 0.9)
    found = largest_batch(model, SpeedPoint(batch=1, prompt=8, new_tokens=4), 32, room, 60)
    assert (found.batch, found.limited_by) == (32, "cap"), "576 MB fit: 256 for the batch, 320 of scattered pieces"

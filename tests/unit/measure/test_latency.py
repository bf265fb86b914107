"""The speed protocol: order of runs, when repetition stops, what is dropped, and that its intervals keep their promise."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import SpeedConfig, SpeedPoint
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure.latency import Instruments, Throttled, combined, first_call, half_widths, measure_point, order, precise
from slimbench.harness.measure.loaded import LoadedModel, Step
from slimbench.harness.measure.soundness import flags
from slimbench.harness.measure.timer import Timer, WallTimer
from slimbench.harness.schema.former.migrations import migrate
from slimbench.harness.schema.generation import TimedTokens
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import GpuState, Probe, Samples, SpeedPointResult
from slimbench.harness.stats.intervals import median_interval
from slimbench.harness.stats.speedups import paired_speedup
from slimbench.harness.store.keys import speed_part
from slimbench.leaderboard.flags.kinds import Kind, kind
from tests.support.paths import RECORDS

POINT = SpeedPoint(batch=1, prompt=4, new_tokens=2)


class Clock(Timer):
    """A clock that only simulated work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self, wait: Any = None) -> float:
        return self.now

    def milliseconds(self, start: float, end: float) -> float:
        return end - start


class Simulated(LoadedModel):
    """A model whose runs take log-normal times around known medians, now and then with an outlier."""

    vocab_size, max_length, device = 16, 64, torch.device("cpu")

    def __init__(self, clock: Clock, rng: np.random.Generator, decode_ms: float, sigma: float, outliers: float) -> None:
        self.clock, self.rng, self.decode_ms, self.sigma, self.outliers = clock, rng, decode_ms, sigma, outliers

    def _take(self, median_ms: float) -> Step:
        slow = 1 + self.rng.exponential(0.5) if self.rng.random() < self.outliers else 1.0
        self.clock.now += median_ms * self.rng.lognormal(0, self.sigma) * slow
        return Step(torch.zeros(1, 1, dtype=torch.int64), None)

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        return self._take(100.0)

    def decode_step(self, step: Step) -> Step:
        return self._take(self.decode_ms)

    def synchronize(self) -> None: ...

    def cache_bytes(self, state: Any) -> int:
        return 1000

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        raise NotImplementedError

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        raise NotImplementedError

    def evidence(self) -> Any:
        raise NotImplementedError


class StillMachine:
    """A probe of a machine that never changes."""

    def restart(self) -> None: ...

    def read(self) -> Probe:
        return Probe(copy_gbs=20.0, matmul_gflops=100.0, seconds=0.0)


class Card:
    """A card that is throttled at the given samples."""

    def __init__(self, *hot: int) -> None:
        self.hot, self.samples = hot, 0

    def sample(self) -> GpuState:
        self.samples += 1
        return GpuState(sm_mhz=1500, slowdowns=["thermal slowdown by the hardware"] if self.samples in self.hot else [])


def config(**fields: Any) -> SpeedConfig:
    return SpeedConfig(name="test", grid=[POINT], **fields)


def simulated(clock: Clock, card: Any = None) -> Instruments:
    return Instruments(clock, StillMachine(), no_meter="none", card=card)  # type: ignore[arg-type]


def simulate(seed: int, sigma: float, outliers: float, **fields: Any) -> Any:
    clock, rng = Clock(), np.random.default_rng(seed)
    models = [Simulated(clock, rng, ms, sigma, outliers) for ms in (10.0, 20.0)]
    return measure_point(*models, POINT, config(budget_s=1e6, **fields), simulated(clock), lambda f: None)  # type: ignore[misc]


def test_runs_alternate_so_that_linear_and_bent_drift_cancel() -> None:
    first = [order(repeat, 2)[0] for repeat in range(16)]
    assert "".join("AB"[i] for i in first) == "ABBABAABBAABABBA"
    for power in (0, 1, 2):
        at = [(repeat + slot / 2) ** power for repeat in range(16) for slot in range(2)]
        who = [i for repeat in range(16) for i in order(repeat, 2)]
        a, b = (sum(t for t, w in zip(at, who, strict=True) if w == model) for model in (0, 1))
        assert a == pytest.approx(b)
    assert order(5, 1) == [0]


def test_repetition_ends_at_the_target_after_whole_blocks() -> None:
    result = simulate(0, sigma=0.001, outliers=0.0)
    assert result.stopped == "target"
    assert len(result.candidate.decode_ms) == len(result.reference.decode_ms) == 8
    assert set(result.half_widths) == {"decode", "prefill", "reference_decode", "speedup"}
    assert precise(result.half_widths, 0.03)


def test_repetition_ends_at_the_maximum_and_says_how_precise_it_got() -> None:
    result = simulate(0, sigma=0.2, outliers=0.0, max_repeats=12)
    assert (result.stopped, len(result.candidate.decode_ms)) == ("max_repeats", 12)
    assert result.half_widths["decode"] > 0.03
    low, high = median_interval(result.candidate.decode_ms)
    middle = statistics.median(result.candidate.decode_ms)
    assert result.half_widths["decode"] == pytest.approx(max(high - middle, middle - low) / middle)


def test_five_samples_have_no_interval_and_never_reach_a_target() -> None:
    five = Samples(prefill_ms=[1.0] * 5, decode_ms=[1.0] * 5)
    assert half_widths(five, five) == {"decode": None, "prefill": None, "reference_decode": None, "speedup": None}
    assert not precise(half_widths(five), 0.5)


@pytest.mark.parametrize(("sigma", "outliers"), [(0.01, 0.0), (0.02, 0.05)])
def test_stopping_when_intervals_look_narrow_keeps_their_coverage(sigma: float, outliers: float) -> None:
    slow = 1 + np.random.default_rng(1).exponential(0.5, 400_000)
    draws = np.random.default_rng(0).lognormal(0, sigma, 400_000)
    middle = float(np.median(np.where(np.random.default_rng(2).random(400_000) < outliers, draws * slow, draws)))
    held, stopped = [], set()
    for seed in range(100):
        result = simulate(seed, sigma, outliers)
        stopped.add(result.stopped)
        intervals = [
            (10 * middle, median_interval(result.candidate.decode_ms)),
            (20 * middle, median_interval(result.reference.decode_ms)),
            (100 * middle, median_interval(result.candidate.prefill_ms)),
            (2.0, paired_speedup(result.candidate.decode_ms, result.reference.decode_ms)[1:]),
        ]
        held.append([low <= truth <= high for truth, (low, high) in intervals])
    assert stopped == {"target"}
    assert np.mean(held) >= 0.93
    assert np.mean(held, axis=0).min() >= 0.90


def test_a_throttled_run_is_dropped_with_its_partner_and_counted() -> None:
    clock, rng = Clock(), np.random.default_rng(0)
    models = [Simulated(clock, rng, ms, 0.001, 0.0) for ms in (10.0, 20.0)]
    warmups = 2
    card = Card(warmups + 2, warmups + 5, warmups + 6)  # a reference run of the first pair, both runs of the third
    result = measure_point(*models, POINT, config(max_repeats=12), simulated(clock, card), lambda f: None)  # type: ignore[misc]
    assert result.dropped == 2
    assert result.candidate.decode_ms and len(result.candidate.decode_ms) == len(result.reference.decode_ms)  # type: ignore[union-attr]
    assert len(result.gpu) == 2 * (len(result.candidate.decode_ms) + 2)
    with pytest.raises(Throttled, match=r"all 4 repeats: thermal slowdown"):
        measure_point(*models, POINT, config(max_repeats=4), simulated(clock, Card(*range(100))), lambda f: None)  # type: ignore[misc]


class Wandering(Simulated):
    """A model that chooses another token in every so-manieth run."""

    def __init__(self, clock: Clock, every: int = 0) -> None:
        super().__init__(clock, np.random.default_rng(0), 10.0, 0.001, 0.0)
        self.every, self.runs = every, 0

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        self.runs += 1
        return super().prefill(ids, room)

    def decode_step(self, step: Step) -> Step:
        other = bool(self.every) and self.runs % self.every == 0
        return Step(super().decode_step(step).token + other, None)


def test_timed_tokens_are_hashed_counted_and_held_against_the_reference() -> None:
    def point(every: int) -> SpeedPointResult:
        clock = Clock()
        models, wanted = (Wandering(clock, every), Wandering(clock)), config(min_repeats=8, max_repeats=8, warmup=1)
        return measure_point(*models, POINT, wanted, simulated(clock), lambda f: None)

    steady, wandering = point(0), point(3)
    same, other = (hashlib.sha256(np.array([[0, last]], "<i8").tobytes()).hexdigest() for last in (0, 1))
    assert steady.tokens == TimedTokens(candidate={same: 8}, reference={same: 8}, equal=1.0)
    assert wandering.tokens and wandering.tokens.reference == {same: 8}
    assert set(wandering.tokens.candidate) == {same, other} and sum(wandering.tokens.candidate.values()) == 8
    assert wandering.tokens.equal == pytest.approx(1 - wandering.tokens.candidate[other] / 8 / POINT.new_tokens)
    both = combined([steady, wandering], 0.03)
    assert both.tokens and both.tokens.candidate == {same: 8 + wandering.tokens.candidate[same], other: wandering.tokens.candidate[other]}
    assert both.tokens.reference == {same: 16} and both.tokens.equal == pytest.approx((1 + wandering.tokens.equal) / 2)
    assert SpeedPointResult.model_validate_json(both.model_dump_json()).tokens == both.tokens
    assert flags(steady, [], is_reference=False) == []
    (told,) = flags(both, [], is_reference=False)
    assert told == "the timed tokens differ from run to run: 2 continuations in 16 runs (1×4+2)" and kind(told) is Kind.NOTE


def test_a_real_model_is_measured_against_itself(tiny: Path) -> None:
    model = TransformersModel(load_pretrained(tiny, "cpu"), "cpu")
    point = SpeedPoint(batch=2, prompt=8, new_tokens=4)
    told: list[float] = []
    instruments = Instruments(WallTimer(), StillMachine(), no_meter="no counter")  # type: ignore[arg-type]
    first = first_call(model, point)
    result = measure_point(model, model, point, config(max_repeats=8, budget_s=20), instruments, told.append, first)
    assert first > 0 and result.first_call_ms == first
    assert result.reference is not None
    ratio, low, high = paired_speedup(result.candidate.decode_ms, result.reference.decode_ms)
    assert low <= ratio <= high and 0.3 < ratio < 3
    heads, width, layers = model.module.config.num_key_value_heads, model.module.config.head_dim, model.module.config.num_hidden_layers
    assert result.kv_cache_bytes == 2 * layers * heads * width * 4 * 2 * (8 + 2), "halfway: prompt and half of the new tokens"
    assert result.energy is not None and (result.energy.joules_per_token, result.energy.reason) == (None, "no counter")
    assert told and told == sorted(told)
    assert result.tokens and result.tokens.candidate == result.tokens.reference and result.tokens.equal == 1
    ids = torch.randint(0, model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = np.array(model.generate(ids, 4), "<i8")
    assert list(result.tokens.candidate) == [hashlib.sha256(expected.tobytes()).hexdigest()], "the tokens of the loop that was timed"


def test_lists_in_a_grid_stand_for_their_product() -> None:
    grid = resolve(["speed.grid=[{batch: 2}, {batch: [1, 4], prompt: 8, new_tokens: [3, 5]}]"]).speed.grid
    points = [(p.batch, p.prompt, p.new_tokens) for p in grid]
    assert points == [(2, 128, 32), (1, 8, 3), (1, 8, 5), (4, 8, 3), (4, 8, 5)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("[{batch: [], prompt: 8}]", "speed.grid: the list of 'batch' is empty; give at least one number"),
        ("[]", "speed.grid: list should have at least 1 item"),
        ("[{batch: [1, 0]}]", "speed.grid.1.batch: input should be greater than or equal to 1, not 0"),
        ("[{bach: 2}]", "unknown key 'speed.grid.0.bach'; did you mean 'batch'?"),
    ],
)
def test_a_grid_that_is_wrong_is_one_clear_line(grid: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([f"speed.grid={grid}"])
    assert str(caught.value).startswith(message)


def test_the_protocol_is_part_of_the_key_but_its_name_is_not() -> None:
    base, flushed = resolve([]).speed, resolve(["speed.flush_cache=true"]).speed
    assert speed_part(base.model_dump(), 2) != speed_part(flushed.model_dump(), 2)


def test_speed_records_of_schema_1_are_read() -> None:
    old = RECORDS / "speed-schema-1.json"
    record = Record.model_validate(migrate(json.loads(old.read_text())))
    assert record.schema_version == 1 and record.speed and record.speed.points
    assert all(point.tokens is None for point in record.speed.points)
    for point in record.speed.points:
        assert point.first_call_ms and point.probes and point.probes[0].matmul_gflops is None

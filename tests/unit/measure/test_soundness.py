"""The roofline and the flags of speed figures."""

from __future__ import annotations

import pytest

from slimbench.harness.measure.soundness import flags, judge, roofline, touched_by, weights_read
from slimbench.harness.schema.evidence import Evidence, LayerEvidence
from slimbench.harness.schema.speed import MemoryResult, Probe, Samples, SpeedPointResult, SpeedResult
from slimbench.harness.schema.work import WorkResult

CACHE = 32 * 2**20


def layer(role: str, size: int, name: str = "Linear") -> LayerEvidence:
    return LayerEvidence(layer=name, role=role, count=1, parameters=size, bytes=size, dtypes={}, bits_per_weight=8.0)


def evidence(*layers: LayerEvidence) -> Evidence:
    return Evidence(weight_bytes=sum(x.bytes for x in layers), parameters=1, layers=list(layers))


TIED = evidence(layer("linear", 200_000_000), layer("embedding", 50_000_000), layer("other", 1_000_000), layer("head", 0))
UNTIED = evidence(layer("linear", 200_000_000), layer("embedding", 50_000_000), layer("head", 50_000_000))


def point(decode_ms: float = 50.0, reference_ms: float | None = None, probes: tuple[float, ...] = (10.0, 10.0)) -> SpeedPointResult:
    def samples(ms: float) -> Samples:
        return Samples(prefill_ms=[ms] * 8, decode_ms=[ms * (1 + 0.001 * i) for i in range(-4, 4)])

    return SpeedPointResult(
        batch=1,
        prompt=128,
        new_tokens=17,
        candidate=samples(decode_ms),
        reference=samples(reference_ms) if reference_ms else None,
        probes=[Probe(copy_gbs=gbs, read_gbs=1.3 * gbs, matmul_gflops=10 * gbs) for gbs in probes],
        stopped="target",
        kv_cache_bytes=9_000_000,
    )


def test_the_bound_is_the_bytes_that_must_be_read_over_the_bandwidth_of_reads() -> None:
    found = roofline(point(50.0), TIED, copy_gbs=7.0, read_gbs=10.0, cache_size=CACHE)
    assert found.bandwidth == "read"
    assert (found.weight_bytes, found.cache_bytes) == (251_000_000, 9_000_000), "a tied embedding is read as the head"
    assert found.bound_ms == pytest.approx(26.0)
    assert found.fraction == pytest.approx(0.52, rel=0.01)
    assert roofline(point(), UNTIED, 7.0, 10.0, CACHE).weight_bytes == 250_000_000, "only rows of the embedding are read"


def test_where_there_is_no_bound_there_is_a_reason() -> None:
    small = roofline(point(), evidence(layer("linear", 1000)), 7.0, 10.0, CACHE)
    experts = roofline(point(), evidence(layer("linear", 10**9), layer("other", 10**9, "MixtralExperts")), 7.0, 10.0, CACHE)
    hidden = roofline(point().model_copy(update={"kv_cache_bytes": None}), TIED, 7.0, 10.0, CACHE)
    assert small.fraction is experts.fraction is hidden.fraction is None
    assert "fit into" in (small.reason or "") and "experts" in (experts.reason or "") and "KV cache" in (hidden.reason or "")


def test_more_than_the_bandwidth_is_a_defect() -> None:
    measured = point(20.0)
    measured.roofline = roofline(measured, TIED, 7.0, 10.0, CACHE)
    assert flags(measured, [], False) == ["roofline: 130% of the measured read bandwidth: a defect of the measurement (1×128+17)"]
    measured.roofline = roofline(measured, TIED, 7.0, 13.1, CACHE)
    assert flags(measured, [], False) == [], "faster than a copy, and no faster than reads can be"


def test_a_reference_that_differs_from_itself_is_flagged() -> None:
    assert flags(point(50.0, 52.0), [], True) == ["A/A: the reference differs from itself by 4.0%; the machine was not steady (1×128+17)"]
    assert flags(point(50.0, 52.0), [], False) == [], "a method may be faster"
    assert flags(point(50.0, 50.0), [], True) == []


def test_drift_and_load_are_flagged() -> None:
    assert flags(point(probes=(10.0, 10.9)), [], False) == []
    copies = point(probes=(10.0, 20.0))
    for probe in copies.probes:
        probe.matmul_gflops = 100.0
    assert flags(copies, [], False) == [], "the copy bandwidth says nothing of decode times"
    drifted = flags(point(probes=(10.0, 12.0, 10.0)), ["other load: 1.0 cores busy beside the measurement"], False)
    assert drifted == [
        "other load: 1.0 cores busy beside the measurement (1×128+17)",
        "the machine's matrix product changed by 20% (1×128+17)",
    ]


def test_a_result_is_judged_by_the_best_bandwidth_of_all_its_points() -> None:
    points = [point(probes=(9.0,)), point(probes=(10.0,))]
    points[0].load, points[1].load = {"other_cores": 0.5}, {"other_cores": 0.1}
    memory = MemoryResult(weight_bytes=1, process_bytes=1, process_peak_bytes=1)
    result = SpeedResult(points=points, memory=memory, evidence=TIED, copy_bandwidth_gbs=0.0)
    judge(result, [["busy"], []], CACHE, is_reference=False)
    assert (result.copy_bandwidth_gbs, result.read_bandwidth_gbs) == (10.0, 13.0)
    assert [p.roofline.bound_ms for p in points if p.roofline] == pytest.approx([20.0, 20.0])
    assert (result.load, result.flags) == ({"other_cores": 0.5}, ["busy (1×128+17)"])


def test_points_of_an_earlier_version_keep_the_bandwidth_of_copies_as_their_roof() -> None:
    old = point()
    for probe in old.probes:
        probe.read_gbs = None
    result = SpeedResult(points=[old], evidence=TIED)
    judge(result, [[]], CACHE, is_reference=False)
    assert result.read_bandwidth_gbs is None and old.roofline is not None
    assert (old.roofline.bandwidth, old.roofline.bound_ms) == ("copy", pytest.approx(26.0))


def test_the_head_of_a_draft_does_not_untie_that_of_the_model() -> None:
    drafted = evidence(*TIED.layers, layer("head", 13_000_000, "PackedLinear"), layer("linear", 60_000_000, "PackedLinear"))
    assert weights_read(drafted) == weights_read(TIED) + 73_000_000
    assert weights_read(evidence(layer("linear", 1000), layer("embedding", 500))) == 1500, "without a head it is the embedding"


DRAFTED = WorkResult(
    slots=["draft"],
    tokens=10,
    prompts=1,
    passes=4,
    calls={"4": 4.0},
    part_bytes={"draft": 60_000_000, "model": 200_000_000},
    read_bytes={"draft": 720_000_000, "model": 800_000_000},
    draft_passes=12,
    cache_bytes=10_000_000,
    draft_cache_bytes=4_000_000,
)


def test_model_and_draft_are_read_each_by_its_own_calls() -> None:
    """Four passes of one and twelve of the other gave ten tokens; sixteen of both together would be another thing."""
    touched = touched_by(DRAFTED, CACHE)
    assert touched.weight_bytes == (4 * 200_000_000 + 12 * 60_000_000) // 10
    assert touched.cache == pytest.approx((4 * 0.6 + 12 * 0.4) / 10)
    result = SpeedResult(points=[point(60.0)], evidence=TIED, work=DRAFTED)
    judge(result, [[]], CACHE, is_reference=False, counted=True)
    (measured,) = result.points
    assert measured.roofline and measured.roofline.weight_bytes == 152_000_000 and measured.roofline.cache_bytes == 6_480_000
    assert measured.roofline.bound_ms == pytest.approx(158_480_000 / 13.0 / 1e6)


def test_a_draft_that_stays_in_the_last_level_cache_is_read_once_a_pass() -> None:
    assert touched_by(DRAFTED, 64_000_000).weight_bytes == (4 * 200_000_000 + 4 * 60_000_000) // 10


def test_of_a_cache_that_is_read_in_part_the_bound_is_that_part() -> None:
    pages = WorkResult(
        slots=["attention"], tokens=10, prompts=1, passes=10, calls={"1": 10.0}, cache_bytes=9_000_000, cache_read_bytes=1_000_000
    )
    result = SpeedResult(points=[point(50.0), point(50.0)], evidence=TIED, work=pages)
    judge(result, [[], []], CACHE, is_reference=False, counted=True)
    first, second = (found.roofline for found in result.points)
    assert first and (first.weight_bytes, first.cache_bytes) == (251_000_000, 1_000_000)
    assert second and second.bound_ms is None and "was not counted" in (second.reason or ""), "at another prompt it reads otherwise"
    linear = pages.model_copy(update={"cache_read_bytes": None})
    assert touched_by(linear, CACHE).cache_bytes is None and touched_by(linear, CACHE).cache == 1.0, "a state is read whole"


def test_where_bytes_were_not_counted_the_share_of_the_calls_tells_them() -> None:
    passes = WorkResult(slots=["draft"], tokens=10, prompts=1, passes=4, calls={"4": 4.0})
    touched = touched_by(passes, CACHE)
    assert (touched.weights, touched.cache, touched.weight_bytes) == (0.4, 0.4, None)
    assert touched_by(None, CACHE).weights is None

"""Memory estimated before a run: against the peaks of the committed records, and as what refuses a stage that cannot fit."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.measure import hardware as machine
from slimbench.harness.run import cell as cells
from slimbench.harness.run import trust
from slimbench.harness.run.planning import memory, obstacles
from slimbench.harness.run.planning.memory import MARGIN
from slimbench.harness.run.planning.plan import Plan, make_plan
from slimbench.harness.schema.hardware import Gpu
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.stages import models
from slimbench.harness.store.store import Store
from slimbench.methods.base import ModelShape
from tests.support.paths import ROOT
from tests.support.running import cell

GB = 10**9
SMOLLM2_135M = ModelShape("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, tied_embeddings=True)
CLOSE = {
    ("quality", "transformers"): 60,
    ("speed", "transformers"): 50,
    ("compress", "transformers"): 38,
    ("speed", "compiled"): 8,
}
"""Kinds of stages and how many of their records at least are within the margin, above and below."""


@pytest.fixture(scope="module")
def deviations() -> dict[tuple[str, str], list[float]]:
    """Estimate over measured peak, less one, of each trusted record by stage and engine. The processor of these has 32 MiB of cache.

    Where another cell had left the artefact of the first steps, both are of the steps that ran.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for record in Store(ROOT / "results").scan()[0]:
        if record.status is Status.OK and record.hardware.label.startswith("AMD EPYC") and record.peak_memory_bytes:
            need = _estimate(record)
            if need and need.trusted:
                found.setdefault((record.stage.value, record.cell.engine), []).append(need.bytes / record.peak_memory_bytes - 1)
    return found


def _estimate(record: Record) -> memory.Estimate | None:
    config = trust.configuration(record.config, trusted=True)
    device = config.device.model_copy(update={"name": "cpu", "compress": "cpu"})
    shape = models.known_shape(config.model) if config.model.is_random else SMOLLM2_135M
    ran = config.pipeline[len(record.compress.reused_steps) if record.compress else 0 :]
    methods = [build_method(step) for step in ran]
    return memory.estimate(config.model_copy(update={"device": device, "pipeline": ran}), methods, record.stage, shape)


def test_no_trusted_estimate_is_above_what_was_measured_by_more_than_the_margin(deviations: dict[tuple[str, str], list[float]]) -> None:
    assert sum(map(len, deviations.values())) > 200
    assert max(deviation for found in deviations.values() for deviation in found) <= MARGIN


@pytest.mark.parametrize(("kind", "least"), CLOSE.items(), ids=map(" ".join, CLOSE))
def test_estimates_of_these_stages_are_close(kind: tuple[str, str], least: int, deviations: dict[tuple[str, str], list[float]]) -> None:
    close = [deviation for deviation in deviations[kind] if abs(deviation) <= MARGIN]
    assert len(close) >= least and len(close) >= 0.7 * len(deviations[kind])


def hold(monkeypatch: pytest.MonkeyPatch, host_gb: float, cards: int = 0, card_gb: float = 0) -> None:
    """Make planning believe in a machine of so much memory and such cards, and of a last-level cache of 32 MiB, which probes copy past."""
    gpu = Gpu(name="card", memory_bytes=int(card_gb * GB), driver="1", compute_capability="9.0")
    own = replace(machine.hardware(), gpus=[gpu] * cards, memory_bytes=int(host_gb * GB), caches={"L3": 32 << 20})
    for module in (cells, memory, obstacles):
        monkeypatch.setattr(module, "hardware", lambda: own)
    monkeypatch.setattr(memory, "available_memory", lambda: int(host_gb * GB))


def plan_of(overrides: list[str], *more: str) -> Plan:
    free = ("model", "device", "suite", "speed")
    return make_plan([cell([o for o in overrides if not o.startswith(free)], "suite.corpus=bigbench-wikipedia", "suite.tasks=[]", *more)])


def refusals(plan: Plan, pipeline: str) -> dict[Stage, str]:
    return {task.stage: task.refusal for task in plan.tasks if plan.cells[task.cell].identity.pipeline == pipeline and task.refusal}


def test_what_cannot_fit_is_refused_in_a_second_in_one_line(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=32)
    began = time.monotonic()
    plan = plan_of(overrides, "model=random-8b", "device=cpu", "engine=transformers", "speed.grid=[{batch: 64, prompt: 4096}]")
    assert time.monotonic() - began < 5
    (reason,) = refusals(plan, "dense").values()
    assert reason.startswith("speed of random-8b needs about 83 GB (") and "KV cache 35 GB" in reason
    assert reason.endswith("there are 30 GB; what would help: a smaller grid or engine=offload") and "\n" not in reason


def test_what_fits_beside_the_process_is_not_refused(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=3)
    few = ("device=cpu", "speed=quick", "model=random-360m")
    assert not refusals(plan_of(overrides, *few), "dense")
    hold(monkeypatch, host_gb=1)
    assert "needs about 1.5 GB" in refusals(plan_of(overrides, *few), "dense")[Stage.SPEED]


def test_a_stream_holds_the_cache_of_what_keeps_all_of_it(overrides: list[str]) -> None:
    def needed(method: str, protocol: str) -> memory.Estimate:
        asked = ("model=smollm2-135m", "device=cpu", f"suite.protocols=[{protocol}]", "suite.tasks=[]")
        config = cell([*overrides, f"method={method}"], *asked).config
        methods = [build_method(step) for step in config.pipeline]
        found = memory.estimate(config, methods, Stage.QUALITY, SMOLLM2_135M)
        assert found
        return found

    token = 2 * 30 * 3 * 64 * 4  # keys and values in float32
    assert needed("dense", "stream@16384").cache == 16_384 * token == 16 * needed("dense", "stream@1024").cache
    assert needed("streaming-llm", "stream@16384").cache == needed("dense", "window@2048").cache == 0
    assert needed("dense", "stream@16384").work == needed("dense", "window@1024").work, "its stretches are scored one by one"


def test_a_method_that_trains_is_refused_for_its_weights_alone(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("device=cpu", "model=smollm2-1.7b-hub", "method=qat-int4", "stages=[]")
    hold(monkeypatch, host_gb=3.7)
    assert not refusals(plan_of(overrides, *few), "qat-int4")
    hold(monkeypatch, host_gb=3.5)
    assert "compress of smollm2-1.7b-hub needs at least 3.4 GB" in refusals(plan_of(overrides, *few), "qat-int4")[Stage.COMPRESS]


def test_weights_larger_than_the_card_run_through_offload(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=512, cards=1, card_gb=24)
    model = ("model=llama2-70b", "device=cuda", "speed=quick")
    assert not refusals(plan_of(overrides, *model, "engine=offload"), "dense")
    eager = refusals(plan_of(overrides, *model, "engine=transformers"), "dense")
    assert set(eager) == {Stage.QUALITY, Stage.SPEED}
    assert eager[Stage.QUALITY].endswith("(weights 138 GB), there are 24 GB; what would help: device.cards=8 or engine=offload")
    hold(monkeypatch, host_gb=64, cards=1, card_gb=24)
    away = refusals(plan_of(overrides, *model, "engine=offload"), "dense")
    assert "keeps 138 GB of weights in host memory" in away[Stage.QUALITY]


def test_weights_larger_than_memory_run_through_offload_from_disk(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=16)
    assert not refusals(plan_of(overrides, "model=llama2-70b", "device=cpu", "speed=quick", "engine=offload"), "dense")
    assert refusals(plan_of(overrides, "model=llama2-70b", "device=cpu", "speed=quick", "engine=transformers"), "dense")


def test_a_compressed_model_fits_where_its_reference_does_not(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compressed on the CPU, and measured on the card without the reference."""
    hold(monkeypatch, host_gb=512, cards=1, card_gb=80)
    plan = plan_of(overrides, "model=llama2-70b", "device=cuda", "device.compress=cpu", "speed=quick", "method=rtn-4bit")
    assert not refusals(plan, "rtn-4bit") and set(refusals(plan, "dense")) == {Stage.QUALITY, Stage.SPEED}
    whole = plan_of(overrides, "model=llama2-70b", "device=cuda", "speed=quick", "method=rtn-4bit")
    assert refusals(whole, "rtn-4bit")[Stage.COMPRESS].endswith("device.compress=cpu would take host memory")


def test_an_engine_that_takes_more_than_the_model_is_not_refused_by_an_estimate(overrides: list[str]) -> None:
    for engine, trusted in (("openvino", False), ("transformers", True)):
        config = cell(overrides, "model=random-1.7b", "device=cpu", f"engine={engine}").config
        need = memory.estimate(config, (), Stage.SPEED, models.known_shape(config.model))
        assert need and need.trusted is trusted


def test_tasks_tell_launchers_what_they_take(overrides: list[str]) -> None:
    plan = plan_of(overrides, "model=random-360m", "device=cpu", "speed=quick", "method=rtn-4bit")
    sizes = {(plan.cells[task.cell].identity.pipeline, task.stage): task.needs.memory_bytes or 0 for task in plan.tasks}
    assert sizes["rtn-4bit", Stage.SPEED] > sizes["dense", Stage.SPEED] > 0.36e9 * 2


@pytest.mark.parametrize(
    ("cards", "card_gb", "asked", "candidate", "reference"),
    [
        (8, 80, 4, set(), set()),
        (8, 80, 2, {Stage.SPEED}, set()),
        (8, 80, 1, set(), {Stage.QUALITY, Stage.SPEED}),
        (1, 24, 1, {Stage.QUALITY, Stage.SPEED}, set()),
    ],
    ids=["four of eight", "two of eight", "one of eight", "a small one"],
)
@pytest.mark.parametrize("model", ["llama2-70b", "llama3-70b", "llama3.1-70b"])
def test_a_model_of_70_billion_plans_onto_the_cards_that_hold_it(
    model: str,
    cards: int,
    card_gb: float,
    asked: int,
    candidate: set[Stage],
    reference: set[Stage],
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4-bit weights of 35 GB, and in `speed` a reference of 138 to 141 GB beside them, which do not share two cards of 80 GB.

    One card holds the 4-bit model but not its reference, without which it is measured there; where nothing can be measured no
    reference is planned.
    """
    hold(monkeypatch, host_gb=512, cards=cards, card_gb=card_gb)
    monkeypatch.setattr(obstacles.engines, "missing", lambda engine: None)
    words = (f"model={model}", "device=cuda", "device.compress=cpu", "speed=quick", "engine=vllm", "method=rtn-4bit")
    plan = plan_of(overrides, *words, f"device.cards={asked}")
    assert set(refusals(plan, "rtn-4bit")) == candidate and set(refusals(plan, "dense")) == reference
    helped = {reason.partition("what would help: ")[2] for reason in refusals(plan, "dense").values()}
    assert helped <= {"device.cards=2 or engine=offload"}


def test_cards_that_are_not_there_are_one_line(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=64, cards=1, card_gb=24)
    with pytest.raises(ConfigError, match=r"device.index=0 device.cards=8: this machine has 1 CUDA cards, numbered from 0"):
        plan_of(overrides, "model=llama2-70b", "device.cards=8")
    hold(monkeypatch, host_gb=64)
    (reason, *others) = refusals(plan_of(overrides, "model=llama2-70b", "device.cards=8"), "dense").values()
    assert reason == "device=cuda, but this machine has no CUDA card that torch can use" and not any("\n" in line for line in others)
    with pytest.raises(ConfigError, match=r"device.cards=8: with device=cpu there are no cards"):
        plan_of(overrides, "model=llama2-70b", "device=cpu", "device.cards=8")


def test_formats_that_an_engine_keeps_on_one_card_are_refused(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=512, cards=8, card_gb=80)
    found = refusals(
        plan_of(overrides, "model=llama2-70b", "device=cuda", "device.cards=4", "method=rtn-4bit", "device.compress=cpu"), "rtn-4bit"
    )
    assert found[Stage.QUALITY] == "engine transformers spreads no packed over several cards; vllm would"


def test_cards_stand_in_keys_and_hardware_of_what_is_spread_alone(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, host_gb=512, cards=8, card_gb=80)
    one, same, two = (cell(overrides, "device=cuda", *more) for more in ([], ["device.cards=1"], ["device.cards=2"]))
    assert one.identity.keys == same.identity.keys
    assert one.identity.keys.compress == two.identity.keys.compress
    assert one.identity.keys.quality != two.identity.keys.quality and one.identity.keys.speed != two.identity.keys.speed
    assert one.hardware(Stage.COMPRESS) == two.hardware(Stage.COMPRESS)
    assert one.hardware(Stage.SPEED).label == "card" and two.hardware(Stage.SPEED).label == "2 × card"
    assert one.hardware(Stage.SPEED).fingerprint != two.hardware(Stage.SPEED).fingerprint


@pytest.mark.parametrize(("size_gb", "cards"), [(None, 1), (10, 1), (75, 1), (78, 2), (140, 2), (160, 4), (700, 16)])
def test_cards_for_a_task(size_gb: float | None, cards: int) -> None:
    assert memory.cards_for(size_gb and int(size_gb * GB), 80 * GB) == cards

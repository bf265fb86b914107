"""The time that counted calls should take, by the times of the parts, against the time that a text takes: on a clock that hooks move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import passes, work
from slimbench.harness.measure.dynamic.hooks import counted
from slimbench.harness.measure.timer import Timer
from slimbench.harness.schema.speed import SpeedResult
from slimbench.leaderboard.rows.results.work import predicted_ms, token_ms
from slimbench.methods.formats.draft.policy import Exit, Lookup
from slimbench.methods.formats.draft.speculation import ModelDrafter
from tests.support.policies import sharp

BLOCKS, VOCABULARY, ROWS = 6, 64, [1, 2, 3, 4]
POINT = SpeedPoint(batch=1, prompt=24, new_tokens=33)


class Virtual(Timer):
    """Moved by calls of blocks and heads alone."""

    def __init__(self) -> None:
        self.now, self.pace = 0.0, 1.0

    def mark(self, wait: Callable[[], None] = lambda: None) -> float:
        return self.now

    def milliseconds(self, start: float, end: float) -> float:
        return end - start

    def costs(self, layer: Any, call: float, row: float) -> None:
        """A call of a layer takes so long, and each of its rows so much more."""

        def pass_time(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
            rows = inputs[0].numel() // inputs[0].shape[-1]
            self.now += self.pace * (call + row * rows) if rows else 0.0

        layer.register_forward_hook(pass_time)


@pytest.fixture(scope="module")
def base() -> Any:
    return sharp(num_hidden_layers=BLOCKS, vocab_size=VOCABULARY)


def looping() -> Tensor:
    again = torch.tensor([[5, 6, 7, 8]]).repeat(1, 6)
    return torch.cat([again, torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))])


def with_draft(model: Any) -> None:
    model.draft = copy.deepcopy(model)
    model.draft.model.layers, model.draft.config.num_hidden_layers = model.draft.model.layers[:3], 3
    model.drafter = ModelDrafter(model, 3, model.draft)


DRAFTS = {"lookup": Lookup(3, 2).install, "exit": Exit(3, 2).install, "model": with_draft}


def timed(base: Any, install: Callable[[Any], None], late: float = 10.0) -> tuple[TransformersModel, Virtual]:
    """A model under a draft whose first two blocks take 10 a call, the others `late`, its head 6, and blocks of a draft model 2."""
    model, clock = copy.deepcopy(base), Virtual()
    install(model)
    for place, block in enumerate(model.model.layers):
        clock.costs(block, 10.0 if place < 2 else late, 1.0)
    clock.costs(model.lm_head, 6.0, 0.5)
    for block in model.draft.model.layers if hasattr(model, "draft") else ():
        clock.costs(block, 2.0, 0.1)
    loaded = TransformersModel(model, "cpu")
    loaded.slots = ["draft"]
    return loaded, clock


def written(model: TransformersModel, clock: Virtual) -> float:
    """Time of a token behind the prompts, the prompts' own pass apart."""
    taken, tokens = 0.0, 0
    for text in looping().split(1):
        step = model.prefill(text, POINT.new_tokens)
        start = clock.now
        for _ in range(POINT.new_tokens - 1):
            step = model.decode_step(step)
        taken, tokens = taken + clock.now - start, tokens + POINT.new_tokens - 1
    return taken / tokens


@pytest.mark.parametrize("late", [10.0, 1.0])
@pytest.mark.parametrize("kind", DRAFTS)
def test_the_calls_of_the_parts_take_the_time_of_the_text(base: Any, kind: str, late: float) -> None:
    model, clock = timed(base, DRAFTS[kind], late)
    result = SpeedResult(points=[])
    passes.tell(result, [passes.time_passes(model, None, POINT, ROWS, clock)])
    found = work.measure(model, looping(), None, lambda *_: None, POINT.new_tokens)
    wanted = written(model, clock)
    assert found.passes and found.passes < found.tokens
    assert token_ms(found, result) == pytest.approx(wanted, rel=0.02)
    if kind == "lookup":
        assert found.part_calls == {} == result.parts_ms
        assert token_ms(found, result) == predicted_ms(found.calls, result.rows_ms, found.tokens)
    else:
        assert found.part_calls.keys() - {"model"} == result.parts_ms.keys()
        assert token_ms(found, result.model_copy(update={"parts_ms": {}})) is None, "a part whose time is not known"


def test_a_draft_model_is_not_charged_as_a_pass_of_the_model(base: Any) -> None:
    model, clock = timed(base, with_draft)
    result = SpeedResult(points=[])
    passes.tell(result, [passes.time_passes(model, None, POINT, ROWS, clock)])
    assert result.parts_ms == {"draft": {"1": pytest.approx(3 * 2.1), "2": pytest.approx(3 * 2.2)}} and result.rows_ms["1"] == 6 * 11 + 6.5


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_machine_that_is_slower_in_some_processes_moves_no_prediction(base: Any, kind: str) -> None:
    """The reference's step is timed in turns with all of them; here it takes its 36 or, in two of three processes, as much longer."""
    model, clock = timed(base, DRAFTS[kind])
    reference = copy.deepcopy(base)
    for block in reference.model.layers:
        clock.costs(block, 6.0, 0.0)
    other = TransformersModel(reference, "cpu")

    def shares(paces: list[float]) -> SpeedResult:
        result, taken = SpeedResult(points=[]), []
        for clock.pace in paces:
            taken.append(passes.time_passes(model, other, POINT, ROWS, clock, repeats=3))
        passes.tell(result, taken)
        return result

    even, uneven = shares([1.0, 1.0, 1.0]), shares([1.0, 1.5, 1.5])
    assert even.reference_row_ms == pytest.approx(36) and uneven.reference_row_ms == pytest.approx(54)
    assert even.rows_ms.keys() == {str(count) for count in ROWS} and even.parts_ms.keys() == uneven.parts_ms.keys()
    for one, two in zip((even.rows_ms, *even.parts_ms.values()), (uneven.rows_ms, *uneven.parts_ms.values()), strict=True):
        assert {count: 1.5 * taken for count, taken in one.items()} == pytest.approx(two)


def test_calls_by_part_are_those_of_the_definition(base: Any) -> None:
    model, _ = timed(base, DRAFTS["exit"])
    found = work.measure(model, looping(), None, lambda *_: None, POINT.new_tokens)
    rows = {int(size): count for size, count in found.pass_rows.items()}
    checked = sum(size * count for size, count in rows.items())
    assert found.passes and found.part_calls["early"] == {"1": checked}, "each token runs the first blocks alone"
    assert found.part_calls["late"] == {str(size): count for size, count in rows.items()}
    guessed = checked - found.passes
    heads = {size: count + (guessed if size == 1 else 0) for size, count in ({1: 0} | rows).items()}
    assert found.part_calls["head"] == {str(size): count for size, count in sorted(heads.items())}
    assert set(found.calls) == {str(size) for size in heads}


def test_a_rehearsal_is_what_guessing_and_checking_runs(base: Any) -> None:
    model, _ = timed(base, DRAFTS["exit"])
    with torch.inference_mode(), counted(model.module) as count:
        for part, rows, call in model.module.drafter.rehearse(looping()[:1], [4]):
            before = {name: sum(calls.values()) for name, calls in count.calls.items()}
            call()
            after = {name: sum(calls.values()) for name, calls in count.calls.items()}
            assert {name for name in after if after[name] != before.get(name)} == {part}
            assert part == "late" or rows in count.calls[part]
    assert count.passes == [24, 4] and count.calls["early"].keys() == {24, 1}

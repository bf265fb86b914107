"""Texts that are gone on with while speed is measured: what is drawn, who times what, and passes of several tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slimbench.harness.config.schema import PromptsConfig, SpeedConfig, SpeedPoint
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure.dynamic.passes import time_passes
from slimbench.harness.measure.dynamic.texts import drawn, untimed
from slimbench.harness.measure.latency import Instruments, combined, measure_point
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.measure.soundness import flags
from slimbench.harness.measure.timer import WallTimer
from slimbench.harness.store.keys import speed_part
from slimbench.tasks.errors import DataError
from tests.support import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, 4000).astype(np.int32)
POINT = SpeedPoint(batch=1, prompt=16, new_tokens=4)


def test_prompts_are_stretches_of_the_text_without_overlap_and_shared_out_over_processes() -> None:
    config = PromptsConfig(corpus="x", count=9)
    parts = [drawn(TOKENS, POINT, config, process, 3) for process in range(3)]
    assert [list(part.ids) for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    everything = drawn(TOKENS, POINT, config).ids
    starts = []
    for ids in everything.values():
        assert ids.shape == (1, 16)
        starts += [place for place in range(0, 4000, 16) if (TOKENS[place : place + 16] == ids[0].numpy()).all()]
    assert len(set(starts)) == 9
    assert all(torch.equal(part.ids[number], everything[number]) for part in parts for number in part.ids)
    assert len({part.told.sha256 for part in parts if part.told}) == 1
    other = drawn(TOKENS, POINT, PromptsConfig(corpus="x", count=9, seed=1))
    assert other.told and parts[0].told and other.told.sha256 != parts[0].told.sha256


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than 300 prompts of 16"):
        drawn(TOKENS, POINT, PromptsConfig(corpus="x", count=300))


def test_keys_of_protocols_without_texts_are_as_they_were() -> None:
    plain = SpeedConfig(name="a", grid=[POINT])
    assert not {"prompts", "rows"} & set(speed_part(plain.model_dump(), 2))
    texts = SpeedConfig(name="a", grid=[POINT], prompts=PromptsConfig(corpus="x"))
    assert speed_part(texts.model_dump(), 2) != speed_part(plain.model_dump(), 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    dense = tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")
    return TransformersModel(load_pretrained(dense.path), "cpu")


def test_each_prompt_is_timed_next_to_the_reference_and_the_record_says_which(model: LoadedModel) -> None:
    asked: list[Any] = []
    inner = model.prefill

    def prefill(ids: torch.Tensor, room: int = 32) -> Any:
        asked.append(tuple(ids[0].tolist()))
        return inner(ids, room)

    protocol = SpeedConfig(name="t", grid=[POINT], warmup=0, min_repeats=2, max_repeats=12, prompts=PromptsConfig(corpus="x", count=6))
    parts = []
    model.prefill = prefill  # type: ignore[method-assign]
    try:
        for process in range(2):
            texts = drawn(TOKENS, POINT, PromptsConfig(corpus="x", count=6, repeats=2), process, 2)
            instruments = Instruments.of(model.device)
            asked.clear()
            parts.append(measure_point(model, model, POINT, protocol, instruments, lambda _: None, texts=texts))
            runs = asked[-2 * len(parts[-1].candidate.decode_ms) :]
            pairs = list(zip(runs[::2], runs[1::2], strict=True))
            assert all(first == second for first, second in pairs), "candidate and reference went on with the same text"
            wanted = [tuple(texts.ids[number][0].tolist()) for number in parts[-1].prompt_of_pairs]
            assert [first for first, _ in pairs] == wanted
            assert parts[-1].prompt_of_pairs[:6] == [process, process, 2 + process, 2 + process, 4 + process, 4 + process]
    finally:
        del model.prefill  # type: ignore[method-assign]
    whole = combined(parts, 0.03)
    assert whole.prompts and whole.prompts.count == 6 and whole.prompt_of_pairs == [*parts[0].prompt_of_pairs, *parts[1].prompt_of_pairs]
    assert len(whole.prompt_of_pairs) == len(whole.candidate.decode_ms) == sum(whole.processes)
    assert set(whole.half_widths) == {"repeats"} and whole.half_widths["repeats"] is not None
    assert untimed([whole]) == []
    part = whole.model_copy(update={"prompts": whole.prompts.model_copy(update={"pairs": [0, 1, 1, 4]})})
    assert untimed([part]) == ["speed of 3 of 6 texts: the time was over (1×16+4)"]
    assert whole.tokens and len(whole.tokens.candidate) <= 6
    assert not any("timed tokens differ" in line for line in flags(whole, [], False))


def test_passes_of_several_tokens_are_timed_in_turn(model: LoadedModel) -> None:
    seen: list[int] = []
    inner = model.extend

    def extend(ids: torch.Tensor, state: Any = None) -> Any:
        seen.append(ids.shape[1])
        return inner(ids, state)

    model.extend = extend  # type: ignore[method-assign]
    try:
        found = time_passes(model, None, POINT, [1, 3, 9], WallTimer(), repeats=4)
    finally:
        del model.extend  # type: ignore[method-assign]
    assert seen == [16, 1, 3, 9] * 5, "behind the same prompt each time"
    assert list(found) == ["model"] and list(found["model"]) == ["1", "3", "9"], "no reference, and no draft"
    assert all(len(taken) == 4 and min(taken) > 0 for taken in found["model"].values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"prompts": {"corpus": "x", "count": 24, "repeats": 2}, "max_repeats": 40},
            "max_repeats=40 ends before 24 prompts have 2 repeats each",
        ),
        ({"prompts": {"corpus": "x", "count": 4}, "processes": 3}, "3 processes need at least 6 prompts, not 4"),
    ],
)
def test_protocols_that_cannot_time_all_texts_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SpeedConfig(name="t", grid=[POINT], **changes)

"""What a policy says of itself is kept to: how its texts are scored, and how many sequences run at once."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import latency, perplexity
from slimbench.harness.measure.dynamic import work
from slimbench.harness.measure.zeroshot import EngineLM
from slimbench.harness.run.identity import keys
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stages import common, compress, models, quality, speed
from slimbench.harness.stages.common import Again, tokenizer_of
from slimbench.harness.store.partial import Journal, Part
from slimbench.leaderboard.flags.kinds import Figure, spoiling
from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Unsupported
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.policy import Policy, Scoring
from slimbench.methods.quantization.cache.kv_cache import KVInt
from slimbench.methods.work import Work
from tests.support import tiny
from tests.unit.measure.test_lies import Silent, step_overrides

CALLS: list[tuple[int, int]] = []
"""Batch and length of each call of the module under a `Planted` policy."""


@dataclass(frozen=True)
class Planted(Policy):
    """Changes nothing, and sees every call."""

    slot, kind = "attention", "planted"

    scoring: Scoring = "exact"
    max_batch: int | None = None

    def neutral(self) -> Policy:
        return self

    def check(self, shape: Any) -> None: ...

    def install(self, model: Any) -> None:
        def forward(input_ids: Any, **settings: Any) -> Any:
            CALLS.append(tuple(input_ids.shape))
            return inner(input_ids, **settings)

        inner, model.forward = model.forward, forward


@dataclass(frozen=True)
class Under(Method):
    """A dense model under a `Planted` policy."""

    name, family, produces = "under", "test", "policy"
    citation = Citation("none", 2024)

    scoring: str = "exact"
    max_batch: int | None = None

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        policies.save(Planted(self.scoring, self.max_batch), dense, out)  # type: ignore[arg-type]
        return Claim("policy")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies._KINDS, ("attention", "planted"), f"{__name__}.Planted")
    monkeypatch.setattr(quality, "_count_work", lambda *_: None)  # its calls are not those of a protocol
    monkeypatch.setattr(quality, "_causal_flags", lambda *_: [])


def run(overrides: list[str], stage: Any, settings: str, *more: str) -> Any:
    """The result of a stage under a policy; what its calls were is in `CALLS`."""
    key = f"under-{settings}".replace("=", "-").replace(",", "-")
    config = resolve([*overrides, *step_overrides([f"{__name__}.Under({settings})"]), *more])
    compress.run(config, key, Silent())
    CALLS.clear()
    return stage.run(config, key, None, Silent())


@pytest.mark.parametrize("scoring", ["exact", "chunk"])
def test_whole_windows_are_scored_where_the_policy_allows_it(overrides: list[str], scoring: str) -> None:
    measured: QualityResult = run(overrides, quality, f"scoring={scoring}")
    assert len(measured.perplexity) == 1
    assert max(CALLS) == (6, 64), "all windows in one pass"


@pytest.mark.parametrize("scoring", ["step", "suffix", "none"])
def test_whole_windows_are_refused_where_the_policy_does_not(overrides: list[str], scoring: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        run(overrides, quality, f"scoring={scoring}")
    assert str(refusal.value) == f"this protocol scores texts by exact or chunk; the policy allows {scoring}"
    assert all(length < 64 for _, length in CALLS), "nothing was scored"


def test_step_by_step_a_window_goes_through_the_cache_token_by_token(overrides: list[str]) -> None:
    through = "suite.protocols=[incremental]"
    exact = run(overrides, quality, "scoring=exact", through)
    assert max(length for _, length in CALLS) > 8
    step = run(overrides, quality, "scoring=step", through)
    assert {length for _, length in CALLS} == {1, 8}, "eight are the prompt of the evidence"
    assert CALLS.count((6, 1)) == 63
    assert step.perplexity[0].perplexity == pytest.approx(exact.perplexity[0].perplexity, rel=1e-4)
    with pytest.raises(Unsupported, match="by exact or chunk or step; the policy allows suffix"):
        run(overrides, quality, "scoring=suffix", through)


def test_batches_of_windows_are_cut(overrides: list[str]) -> None:
    whole = run(overrides, quality, "max_batch=null")
    cut = run(overrides, quality, "max_batch=4")
    assert [call for call in CALLS if call[1] == 64] == [(4, 64), (2, 64)]
    assert cut.perplexity[0].window_nll == pytest.approx(whole.perplexity[0].window_nll, rel=1e-5)


def test_batches_of_tasks_are_cut_and_refused(tmp_path: Path) -> None:
    def answers(scoring: str, max_batch: int | None) -> list[tuple[float, bool]]:
        out = tmp_path / f"{scoring}-{max_batch}"
        out.mkdir()
        policies.save(Planted(scoring, max_batch), dense, out)  # type: ignore[arg-type]
        model = TransformersModel(policies.load(out), "cpu")
        CALLS.clear()
        return EngineLM(model, None, 1024, lambda done, total: None)._loglikelihood_tokens(requests)

    dense = tiny.save_model(tmp_path / "dense", "float32")
    requests: list[Any] = [(None, [3, index], [5, 7]) for index in range(10, 17)]
    whole = answers("exact", None)
    assert CALLS == [(7, 3)]
    cut = answers("chunk", 3)
    assert CALLS == [(3, 3), (3, 3), (1, 3)]
    assert [score for score, _ in cut] == pytest.approx([score for score, _ in whole], rel=1e-5)
    with pytest.raises(Unsupported, match="the policy allows step"):
        answers("step", None)


def test_points_of_larger_batches_are_unsupported(overrides: list[str]) -> None:
    def grid(*batches: int) -> str:
        return f"speed.grid=[{', '.join(f'{{batch: {batch}, prompt: 8, new_tokens: 4}}' for batch in batches)}]"

    measured = run(overrides, speed, "max_batch=2", grid(1, 4, 2), "speed.largest_batch=8", "speed.budget_s=60")
    assert [point.batch for point in measured.points] == [1, 2]
    assert "unsupported: 4×8+4, the policy runs at most 2 at once" in measured.flags
    assert measured.largest_batch.batch == 2 == max(batch for batch, _ in CALLS)
    with pytest.raises(Unsupported, match="runs at most 2 sequences at once, the headline has 4"):
        run(overrides, speed, "max_batch=2", grid(4, 1))


def test_the_strictest_of_several_policies_holds(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense")
    policies.save(Planted("step", 4), dense, tmp_path)
    described = json.loads((tmp_path / "policy.json").read_text())
    described["slots"]["cache"] = {"kind": "quantized"} | asdict(KVInt().policy())
    (tmp_path / "policy.json").write_text(json.dumps(described))
    model = TransformersModel(policies.load(tmp_path), "cpu")
    assert (model.scoring, model.max_batch, KVInt().policy().scoring) == ("step", 4, "exact")


def test_behind_a_prompt_what_follows_is_scored_as_the_policy_allows(overrides: list[str]) -> None:
    through = "suite.protocols=[suffix]"
    whole = run(overrides, quality, "scoring=exact", "suite.protocols=[llamacpp]").perplexity[0]
    for scoring, calls in (("exact", {(6, 33), (6, 30)}), ("suffix", {(6, 33), (6, 30)}), ("step", {(6, 33), (6, 1)})):
        found = run(overrides, quality, f"scoring={scoring}", through).perplexity[0]
        assert {call for call in CALLS if call[0] == 6} == calls, "the prompt at once, then the rest"
        assert found.labels_per_window == 31 == whole.labels_per_window
        assert found.window_nll == pytest.approx(whole.window_nll, rel=1e-5), "without a policy it is llama.cpp's protocol"
        assert found.protocol == "suffix-1"
    with pytest.raises(Unsupported, match="the policy allows none"):
        run(overrides, quality, "scoring=none", through)


EVICTION = "slimbench.methods.compact.cache_eviction"


def behind_prompts(overrides: list[str], name: str, *more: str) -> Any:
    """The first perplexity of a method of evictions, or of none, on windows of 256 tokens behind prompts of 129."""
    steps = [f"{EVICTION}.{name}" if name else "slimbench.methods.dense.Dense"]
    config = resolve([*overrides, *step_overrides(steps), "suite.protocols=[suffix]", "suite.seqlen=256", *more])
    key = f"behind-{name}".replace("(", "-").replace(")", "").replace("=", "-").replace(",", "-")
    compress.run(config, key, Silent())
    return quality.run(config, key, None, Silent()).perplexity[0]


def test_what_is_held_while_texts_are_scored_is_the_mean_over_what_is_scored(overrides: list[str]) -> None:
    """Of 127 positions the first is the end of the prompt; what SnapKV left of it is the least that it ever holds."""
    dense = behind_prompts(overrides, "")
    token = dense.held_bytes[0] / (129 + 63)
    assert len(dense.held_bytes) == len(dense.window_nll) > 1 and len(set(dense.held_bytes)) == 1
    for name, tokens in (("SnapKV(budget=80)", 80 + 63), ("TOVA(budget=80)", 80), ("SnapKV(budget=129)", 129 + 63)):
        found = behind_prompts(overrides, name)
        assert found.held_bytes[0] == pytest.approx(tokens * token, rel=1e-3)
        assert (found.exact_keys == 1) == (tokens == 129 + 63), "all of the prompt stayed: the policy did nothing"
    assert dense.exact_keys is None


def test_of_prompts_only_the_last_position_is_asked_for_and_gives_what_it_gave(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32")
    model, ids = TransformersModel(dense.load(), "cpu"), tiny.tokens(samples=3, length=40).ids
    wanted, _ = model.extend(ids)
    rows: list[int] = []
    model.module.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    found, state = model.behind(ids)
    assert rows == [1] and found.shape[1] == 1 and found.untyped_storage().nbytes() == found.numel() * 4
    assert float((found - wanted[:, -1:]).abs().max()) <= 1e-5
    after = [model.extend(ids[:, :5], each)[0] for each in (state, model.extend(ids)[1])]
    assert float((after[0] - after[1]).abs().max()) <= 1e-5


def test_a_stream_goes_through_one_cache_and_is_told_in_stretches(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    exact = run(overrides, quality, "scoring=exact", "suite.protocols=[stream]", "suite.seqlen=128").perplexity[0]
    through = [length for batch, length in CALLS if batch == 1 and length > 8]
    assert exact.protocol == "stream-2" and exact.labels_per_window == 32 and len(exact.window_nll) == 4
    assert sum(through[:2]) == 128, "all of it, in pieces, before anything else"
    step = run(overrides, quality, "scoring=step", "suite.protocols=[stream]", "suite.seqlen=128").perplexity[0]
    assert step.window_nll == pytest.approx(exact.window_nll, rel=1e-4)
    whole = run(overrides, quality, "scoring=exact", "suite.protocols=[window]", "suite.seqlen=129", "suite.windows=1").perplexity[0]
    assert sum(exact.window_nll) / 4 == pytest.approx(whole.window_nll[0], rel=1e-4), "one text of 128 labels"
    with pytest.raises(Unsupported, match="the policy allows suffix"):
        run(overrides, quality, "scoring=suffix", "suite.protocols=[stream]", "suite.seqlen=128")


STREAMING = "slimbench.methods.compact.streaming_llm.StreamingLLM"


def test_stretches_beyond_what_a_model_was_made_for_do_not_count(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def made_for(self: Any, module: Any, device: str) -> None:
        init(self, module, device)
        self.max_length = 64

    init = TransformersModel.__init__
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    monkeypatch.setattr(TransformersModel, "__init__", made_for)
    more = ["suite.protocols=[stream]", "suite.seqlen=128"]
    told = "2 of 4 stretches lie beyond the 64 positions that the model was made for; perplexity and divergence are of the others"
    for name, step, flags in (
        ("stream-dense", "slimbench.methods.dense.Dense", [told]),
        ("stream-short", f"{STREAMING}(budget=63)", []),
        ("stream-long", f"{STREAMING}(budget=64)", [told]),
        ("stream-evicted", f"{EVICTION}.Knorm(budget=20,skip_layers=0)", [told]),
    ):
        config = resolve([*overrides, *step_overrides([step]), *more])
        compress.run(config, name, Silent())
        found = quality.run(config, name, "stream-dense", Silent())
        head = found.perplexity[0]
        assert [flag for flag in found.flags if "stretches" in flag] == flags, "positions of a window count in its cache"
        assert len(head.window_nll) == len(head.held_bytes) == 4 and head.within == 2 and head.scored == head.window_nll[:2]
        assert head.perplexity == pytest.approx(math.exp(sum(head.window_nll[:2]) / 2))
        if name != "stream-dense":
            assert head.divergence and len(head.divergence.kl) == len(head.divergence.top1_agreement) == 2
            assert head.divergence.kl_mean == pytest.approx(sum(head.divergence.kl) / 2)
            assert 0 < head.divergence.exact_positions <= 64


def test_what_is_computed_anew_are_the_labels_of_the_stream_behind_half_a_window(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the reference alone: a policy that is scored token by token has the suite too, and is not refused by it."""
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    steps = ["slimbench.methods.dense.Dense"], [f"{EVICTION}.TOVA(budget=8)"]
    dense, other = (
        resolve([*overrides, *step_overrides(step), "suite.protocols=[stream,recomputed]", "suite.seqlen=128"]) for step in steps
    )
    compress.run(dense, "anew-dense", Silent())
    found = quality.run(dense, "anew-dense", "anew-dense", Silent())
    stream, anew = found.perplexity
    assert (anew.protocol, anew.labels_per_window, len(anew.window_nll)) == ("recomputed-1", 32, 4) and anew.held_bytes == []
    source = models.prepare(dense.model, lambda _: None)
    ids = perplexity.Windows(tokenizer_of(source, dense), dense.suite.passes()[1], dense.suite).ids
    model, wanted = common.load(dense, "anew-dense", Silent())[0], []
    for label in range(1, 129):
        begin = 0 if label <= 32 else (label - 1) // 16 * 16 - 16
        scores = model.logits(ids[:, begin:label], label - begin - 1).float().log_softmax(-1)  # type: ignore[attr-defined]
        wanted.append(-float(scores[0, 0, ids[0, label]]))
    assert anew.window_nll == pytest.approx([sum(wanted[32 * k : 32 * k + 32]) / 32 for k in range(4)], rel=1e-4)
    assert anew.window_nll[0] == pytest.approx(stream.window_nll[0], rel=1e-4) and anew.window_nll[2] != stream.window_nll[2]
    assert found.forward_tokens == 129 + 7 * 32
    compress.run(other, "anew-tova", Silent())
    measured = quality.run(other, "anew-tova", "anew-dense", Silent())
    assert [part.protocol for part in measured.perplexity] == ["stream-2"] and measured.perplexity[0].divergence is not None


def test_what_is_of_the_reference_alone_is_no_headline(overrides: list[str]) -> None:
    for protocols, told in (("[recomputed,stream]", "put 'stream' before it"), ("[stream,recomputed@1000]", "multiple of 1,024")):
        with pytest.raises(ConfigError, match=told):
            resolve([*overrides, f"suite.protocols={protocols}"])


def test_a_stream_as_long_as_the_model_allows_counts_whole(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    found = run(overrides, quality, "scoring=exact", "suite.protocols=[stream]", "suite.seqlen=128")
    assert found.perplexity[0].within is None and not [flag for flag in found.flags if "stretches" in flag]


def test_work_is_counted_and_some_windows_are_scored_token_by_token(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    steps = step_overrides(["slimbench.methods.compact.streaming_llm.StreamingLLM(budget=12,sinks=2)"])
    config = resolve([*overrides, *steps])
    compress.run(config, "streaming-work", Silent())
    measured = quality.run(config, "streaming-work", None, Silent())
    assert measured.work and measured.work.prompts == 6 and measured.work.prompt_tokens == 64
    assert measured.work.cache_tokens and measured.work.cache_tokens.mean == 13
    assert measured.work.stepwise_gap is not None and abs(measured.work.stepwise_gap) < 1e-3
    assert measured.work.flags == []
    assert measured.evidence and "claims less work a token, which nothing has measured" not in measured.evidence.flags
    assert {"work"} <= set(measured.seconds)


@pytest.mark.parametrize(("longest", "texts", "tokens"), [(16, 8, 16), (50, 2, 50), (2048, 1, 129)])
def test_work_under_a_stream_is_of_several_texts(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, longest: int, texts: int, tokens: int
) -> None:
    """Eight at most, of equal length, one behind the other in the text: a spread over a single one would say little."""
    monkeypatch.undo()
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    monkeypatch.setattr(quality, "_WORK_TOKENS", longest)
    more = ["suite.protocols=[stream]", "suite.seqlen=128"]
    config = resolve([*overrides, *step_overrides([f"{STREAMING}(budget=12,sinks=2)"]), *more])
    compress.run(config, "stream-work", Silent())
    counted = quality.run(config, "stream-work", None, Silent()).work
    assert counted and (counted.prompts, counted.prompt_tokens, counted.flags) == (texts, tokens, [])
    assert counted.tokens == texts * (work.NEW_TOKENS - 1) and counted.stepwise_gap is None


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize(("apart", "windows"), [(0.0, 2), (0.004, 2), (0.006, 16), (-0.006, 16)])
def test_where_two_windows_differ_token_by_token_more_are_scored_so(tmp_path: Path, most: int | None, apart: float, windows: int) -> None:
    """Two at a time, where so many run at once."""

    def stepwise(model: Any, ids: Any) -> list[float]:
        assert len(ids) <= (most or 2)
        return [float(row[0]) + apart * (float(row[0]) < 2) for row in ids]

    model = TransformersModel(tiny.save_model(tmp_path / "dense", "float32").load(), "cpu")
    model.max_batch, model.slots = most, ["depth"]
    ids = torch.arange(20)[:, None].expand(20, 8)
    part: Any = SimpleNamespace(ids=ids, labels=7, wanted=SimpleNamespace(protocol="window"), stepwise=stepwise)
    whole = [float(row) for row in range(20)]
    told = list[tuple[int, int]]()
    found = quality._one_by_one(model, part, whole, Part(), lambda *seen: told.append(seen))
    assert told[-1] == (windows, windows)
    assert len(found) == windows and found[2:] == whole[2:windows]
    assert quality._gap(found, whole) == pytest.approx(math.expm1(2 * apart / windows))


def test_windows_that_were_scored_token_by_token_before_an_interruption_are_not_scored_again() -> None:
    asked = list[int]()

    def stepwise(model: Any, ids: Any) -> list[float]:
        asked.extend(int(row[0]) for row in ids)
        if 6 in asked and len(asked) < 10:
            raise KeyboardInterrupt
        return [1.0 for _ in ids]

    part: Any = SimpleNamespace(ids=torch.arange(20)[:, None].expand(20, 8), stepwise=stepwise)
    model: Any = SimpleNamespace(batch=lambda wanted: wanted)
    given = model, part, [0.0] * 20
    with pytest.raises(KeyboardInterrupt):
        quality._one_by_one(*given, Part("p", "windows", Journal("one by one", {})), lambda *_: None)
    assert quality._one_by_one(*given, Part("p", "windows", Journal("one by one", {})), lambda *_: None) == [1.0] * 16
    assert asked == [*range(8), *range(6, 16)]


def test_what_differs_token_by_token_is_told_with_its_interval(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that keeps less of a text that comes token by token."""
    monkeypatch.undo()
    inner = quality._one_by_one
    monkeypatch.setattr(quality, "_one_by_one", lambda *given: [value + 0.1 for value in inner(*given)])
    steps = step_overrides(["slimbench.methods.compact.streaming_llm.StreamingLLM(budget=12,sinks=2)"])
    compress.run(resolve([*overrides, *steps]), "streaming-apart", Silent())
    measured = quality.run(resolve([*overrides, *steps]), "streaming-apart", None, Silent())
    assert measured.work and measured.work.stepwise_gap == pytest.approx(math.expm1(0.1), abs=1e-3)
    (flag,) = measured.work.flags
    assert re.fullmatch(r"perplexity token by token differs by \+10\.\d% over 2 windows \(.+ to .+\)", flag)


LOOKUP = "slimbench.methods.dynamic.prompt_lookup.PromptLookup(tokens=3)"
TEXTS = ["speed.grid=[{batch: 1, prompt: 12, new_tokens: 6}]", "speed.processes=3", "speed.min_repeats=2", "speed.max_repeats=12"]


def test_two_policies_go_through_the_stages_as_one_artefact(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    window = "slimbench.methods.compact.streaming_llm.StreamingLLM(budget=12,sinks=2)"
    both, one = (resolve([*overrides, *step_overrides(steps)]) for steps in ([window, LOOKUP], [window]))
    first = compress.run(one, "window-alone", Silent())
    made = compress.run(both, "window-and-guesses", Silent(), ["window-alone"])
    assert made.claim == first.claim and made.claim.work == Work(cache_tokens=12) and len(made.reused_steps) == 1
    measured = quality.run(both, "window-and-guesses", None, Silent())
    alone = quality.run(one, "window-alone", None, Silent())
    assert measured.work and alone.work and measured.work.slots == ["cache", "draft"]
    assert measured.work.flags == alone.work.flags == [] and measured.work.cache_bytes == alone.work.cache_bytes
    assert measured.perplexity[0].window_nll == pytest.approx(alone.perplexity[0].window_nll, rel=1e-5)


def test_texts_are_shared_out_over_processes_and_their_work_is_counted_once(overrides: list[str], tmp_path: Path) -> None:
    """Three processes in turn, cut off and begun again between them: each text is timed in one of them, and all of them are counted."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + number * number % 23) for number in range(3000)))
    more = [*TEXTS, f"+speed.prompts={{corpus: 'file:{text}', count: 6, repeats: 2}}", "+speed.rows=[1,4]", "speed.budget_s=60"]
    config = resolve([*overrides, *step_overrides([LOOKUP]), *more])
    compress.run(config, "looked-up", Silent())
    turns = 1
    while turns < 9:
        try:
            measured = speed.run(config, "looked-up", None, Silent(), Journal("looked-up-speed", {}))
            break
        except Again:
            turns += 1
    (point,) = measured.points
    assert turns == 3 == len(point.processes) and point.prompts and point.prompts.count == 6
    shares = [set(point.prompts.pairs[sum(point.processes[:n]) : sum(point.processes[: n + 1])]) for n in range(3)]
    assert shares == [{0, 3}, {1, 4}, {2, 5}], "each process has its own texts"
    assert measured.work and measured.work.slots == ["draft"] and measured.work.prompts == 6 and measured.work.tokens == 6 * 5
    assert sum(int(given) * count for given, count in measured.work.pass_tokens.items()) == 30
    assert set(measured.rows_ms) == {"1", "4"} and not any("random prompts" in flag or "texts:" in flag for flag in measured.flags)
    assert point.roofline and (point.roofline.weight_bytes > 0 or point.roofline.reason)


def test_work_is_that_of_the_texts_that_were_timed(overrides: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + number * number % 23) for number in range(3000)))
    more = [*TEXTS, f"+speed.prompts={{corpus: 'file:{text}', count: 6, repeats: 2}}", "speed.processes=1", "speed.budget_s=0.000001"]
    config = resolve([*overrides, *step_overrides([LOOKUP]), *more])
    compress.run(config, "hardly-timed", Silent())
    measured = speed.run(config, "hardly-timed", None, Silent())
    (point,) = measured.points
    assert point.prompts and set(point.prompts.pairs) == {0} and "speed of 1 of 6 texts: the time was over (1×12+6)" in measured.flags
    assert measured.work and measured.work.prompts == 1 and measured.work.tokens == 5


def test_texts_are_drawn_at_a_temperature_by_both_and_say_so(overrides: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + number * number % 23) for number in range(3000)))
    more = [*TEXTS, f"+speed.prompts={{corpus: 'file:{text}', count: 6, repeats: 2}}", "speed.processes=1", "speed.budget_s=60"]
    dense, likeliest = (resolve([*overrides, *more, *drawn]) for drawn in (["+speed.temperature=0.8"], []))
    drafted = resolve([*overrides, *step_overrides([LOOKUP]), *more, "+speed.temperature=0.8"])
    compress.run(dense, "drawn-dense", Silent())
    compress.run(drafted, "drawn-guesses", Silent())
    found = speed.run(drafted, "drawn-guesses", "drawn-dense", Silent())
    assert found.temperature == 0.8 and found.work and found.work.temperature == 0.8 and (found.work.drawn_p or 1) > 1e-5
    assert found.work.equal is None and not any("drawn" in flag for flag in [*found.flags, *found.work.flags])
    (point,) = found.points
    assert point.tokens and len(point.tokens.candidate) == len(point.tokens.reference) == 6, "each prompt has its text, each time"
    greedy = speed.run(likeliest, "drawn-dense", None, Silent())
    assert greedy.temperature is None and greedy.points[0].tokens and greedy.points[0].tokens.candidate != point.tokens.reference
    assert len({keys(config).speed for config in (dense, likeliest)}) == 2 and keys(dense).quality == keys(likeliest).quality
    with pytest.raises(ConfigError, match="temperature"):
        resolve([*overrides, "+speed.temperature=0"])


@pytest.mark.parametrize(("budget", "acts"), [(40, False), (16, False), (15, True), (12, True)])
def test_a_policy_that_never_acts_while_timed_is_told(overrides: list[str], budget: int, acts: bool) -> None:
    """The last of six tokens behind twelve sees seventeen, itself included."""
    step = f"slimbench.methods.compact.streaming_llm.StreamingLLM(budget={budget},sinks=2)"
    config = resolve([*overrides, *step_overrides([step]), TEXTS[0], "speed.processes=1", "speed.max_repeats=4"])
    compress.run(config, f"window-{budget}", Silent())
    measured = speed.run(config, f"window-{budget}", None, Silent())
    told = [flag for flag in measured.flags if flag.startswith("policy never exercised")]
    assert told == ([] if acts else ["policy never exercised while timed: no text is longer than what stays exact (1×12+6)"])
    assert acts or spoiling(told, Figure.DECODE) == told


def test_without_texts_the_work_is_that_of_the_random_prompt(overrides: list[str]) -> None:
    config = resolve([*overrides, *step_overrides([LOOKUP]), TEXTS[0], "speed.processes=1", "speed.max_repeats=4"])
    compress.run(config, "looked-up", Silent())
    measured = speed.run(config, "looked-up", None, Silent())
    assert "random prompts: what the policy does depends on the text; speed=policy has texts" in measured.flags
    assert measured.work and measured.work.slots == ["draft"] and measured.work.prompts == 1 and measured.work.tokens == 5
    assert measured.work.prompt_tokens == 12 and sum(int(n) * count for n, count in measured.work.pass_tokens.items()) == 5
    roof = measured.points[0].roofline
    assert roof and (roof.weight_bytes > 0 or roof.reason)
    window = "slimbench.methods.compact.streaming_llm.StreamingLLM(budget=12,sinks=2)"
    same = resolve([*overrides, *step_overrides([window]), TEXTS[0], "speed.processes=1", "speed.max_repeats=4"])
    compress.run(same, "window-alone", Silent())
    assert speed.run(same, "window-alone", None, Silent()).work is None, "of what does the same on any text nothing is counted without one"


def hooks(module: Any) -> list[dict[int, Any]]:
    """What is called beside the parts of a model, and beside any module."""
    each, every = [(part._forward_hooks, part._forward_pre_hooks) for part in module.modules()], nn.modules.module
    return [dict(held) for pair in [*each, (every._global_forward_hooks, every._global_forward_pre_hooks)] for held in pair]


def modes() -> int:
    """How many of torch's modes see each of its functions or operators."""
    return torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()


EXITS = "slimbench.methods.dynamic.early_exit.EarlyExits(steps=0,threshold=0.5)"


@pytest.mark.parametrize("step", [f"{STREAMING}(budget=12,sinks=2)", LOOKUP, EXITS], ids=["window", "guesses", "exits"])
def test_nothing_watches_a_timed_run(step: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted in the same stage, by hooks and modes that are there for no product of a pass that is timed."""
    more = [TEXTS[0], "speed.processes=1", "speed.max_repeats=4", "speed.budget_s=60"]
    dense, config = (resolve([*overrides, *step_overrides([each]), *more]) for each in ("slimbench.methods.dense.Dense", step))
    at_load, timed, seen, counts = dict[Any, Any](), list[Any](), Counter[tuple[Any, ...]](), list[int]()
    load, run_once, forward, counted = speed.load, latency.run_once, nn.Linear.forward, work.counted

    def loading(*given: Any) -> Any:
        model, seconds = load(*given)
        at_load[model.module] = hooks(model.module)
        return model, seconds

    def timing(model: Any, *given: Any) -> Any:
        timed[:] = [model.module, "outside"]
        try:
            return run_once(model, *given)
        finally:
            timed.clear()

    def entering(name: str) -> Any:
        method = getattr(TransformersModel, name)

        def entered(self: TransformersModel, *given: Any, **named: Any) -> Any:
            if timed:
                timed[1] = name
            return method(self, *given, **named)

        return entered

    def multiplying(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        if timed:
            module, phase = timed
            seen["candidate" if module is next(iter(at_load)) else "reference", phase, hooks(module) == at_load[module], modes()] += 1
        return forward(self, given)

    def counting(*given: Any) -> Any:
        counts.append(len(timed))
        return counted(*given)

    compress.run(dense, "unwatched-dense", Silent())
    compress.run(config, "unwatched", Silent())
    monkeypatch.setattr(speed, "load", loading)
    monkeypatch.setattr(latency, "run_once", timing)
    monkeypatch.setattr(nn.Linear, "forward", multiplying)
    monkeypatch.setattr(work, "counted", counting)
    for name in ("prefill", "decode_step"):
        monkeypatch.setattr(TransformersModel, name, entering(name))
    measured = speed.run(config, "unwatched", "unwatched-dense", Silent())
    assert set(seen) == {(who, phase, True, 0) for who in ("candidate", "reference") for phase in ("prefill", "decode_step")}
    assert len(at_load) == 2 and min(seen.values()) >= 4 * 7 and len(measured.points[0].candidate.decode_ms) == 4
    assert bool(counts) == bool(measured.work) == (step.partition("(")[0] != STREAMING) and not any(counts)
    assert all(hooks(module) == held for module, held in at_load.items())


@pytest.mark.parametrize(("where", "told"), [("calibration", "is the calibration text"), ("elsewhere", None)])
def test_texts_that_a_policy_learned_from_are_not_timed(overrides: list[str], tmp_path: Path, where: str, told: str | None) -> None:
    files = {name: tmp_path / f"{name}.txt" for name in ("calibration", "elsewhere")}
    for file in files.values():
        file.write_text(file.name * 100)
    calls = [
        "method=calm",
        f"calibration=file:{files['calibration']}",
        f"+speed.prompts={{corpus: 'file:{files[where]}', count: 2, repeats: 1}}",
        "speed.processes=1",
    ]
    kept = [override for override in overrides if not override.startswith(("method", "~method", "calibration="))]
    if told:
        with pytest.raises(ConfigError, match=told):
            resolve([*kept, *calls])
    else:
        resolve([*kept, *calls])

"""What every policy promises: at its neutral setting it is the base, in force it is not, and no token depends on later or other texts."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.registry import entries
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import DenseModel
from slimbench.methods.core.losses import next_token
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats import policy as written
from slimbench.methods.formats.attention.policy import OperatorPolicy
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.policy import Policy
from tests.contract.shipped import classes
from tests.support import tiny
from tests.support.policies import as_long_as, far, fitted, sharp, under, watched

SMALL: dict[str, dict[str, Any]] = {
    "streaming-llm": {"sinks": 2, "budget": 11},
    "h2o": {"budget": 10},
    "tova": {"budget": 10},
    "knorm": {"budget": 10, "skip_layers": 0},
    "snapkv": {"budget": 70},
    "spatten": {"budget": 10},
    "random-eviction": {"budget": 10},
    "quest": {"budget": 12, "page": 4, "dense_layers": 1},
    "sparse-transformer": {"stride": 6},
    "longformer": {"window": 6, "dilation": 2},
    "bigbird": {"block": 4, "window": 2, "world": 1, "random": 1},
    "blockbert": {"block": 8},
    "linear-attention": {},
    "performer": {"features": 32},
    "combiner": {"block": 8},
    "reformer": {"rounds": 2, "buckets": 16, "local": 4},
    "sinkhorn": {"block": 8, "blocks": 2},
    "hyper-attention": {"block": 8, "samples": 8, "projections": 3, "shortest": 16},
    "bp-transformer": {"spans": 2},
    "token-reduction": {"layer": 1},
    "kivi": {"residual_length": 32},
    "kv-int": {},
    "kv-fp8": {},
}
"""By a method's name: what makes it act within a text of `LENGTH` tokens."""
DRAFT = "it changes no logits; `tests/unit/methods/formats/test_speculation.py` and `…/dynamic/test_draft_model.py` hold what it promises"
LIBRARY = "the cache of transformers rounds the first tokens of a text whatever its settings, and groups over a batch: none is neutral"
SUMS = "sums of sines and cosines as weights come near zero, and what rounding does to them is no longer small"
STEP = "a key that differs in its last bit may be rounded to another number of few bits"
ALONE = "it runs one text at a time"
LEFT_OUT: dict[str, dict[str, str]] = {
    "everything": {
        **dict.fromkeys(("kv-hqq", "kv-quanto"), LIBRARY),
        **dict.fromkeys(("prompt-lookup", "self-speculation", "draft-model", "draft-blocks"), DRAFT),
    },
    "pieces": {"performer-fourier": SUMS, "kv-fp8": STEP, "kv-int": STEP},
    "pieces in two bytes": {"performer-fourier": SUMS},
    "taken back": {"performer-fourier": SUMS},
    "batches": dict.fromkeys(("early-exit", "skip-layer"), ALONE),
    "gradients": {"performer-fourier": SUMS},
    "steps": {"kivi": "a prompt goes through it at once where text is written, and in chunks where it is scored"},
}
"""By what is checked, and the name of a method or of what `policies` makes of it: why it is not tried there."""


TRAINED: dict[str, Policy] = {"early-exit": EarlyExit("margin", 0.2, (1, 2))} | fitted(3, 128, 4, 2)
"""Of methods that train before they write a policy."""
PROMPT, LENGTH, REACH = 80, 112, 128


@cache
def policies() -> dict[str, Policy]:
    """That of one method of each class and pattern, by name of the first YAML."""
    found = dict(TRAINED)
    for method in (entry.method for entry in entries()):
        if isinstance(method, PolicyMethod) and method.name in SMALL:
            kind = getattr(method, "pattern", getattr(method, "feature", ""))
            found.setdefault(f"{method.name}-{kind}".strip("-"), replace(method, **SMALL[method.name]).policy())
    return found


NAMES = sorted(policies())


def names(check: str) -> list[str]:
    """Of those that are tried there."""
    return [name for name in NAMES if name not in LEFT_OUT[check]]


@pytest.fixture(scope="module")
def base() -> Any:
    """Three blocks in float32, with weights that make attentions sharp."""
    return sharp(num_hidden_layers=3, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)


def texts(count: int = 2) -> Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (count, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model: TransformersModel, ids: Tensor) -> Tensor:
    """Logits [B, LENGTH - PROMPT, V] of what follows a prompt, by the passes that the policy allows."""
    if model.scoring in ("exact", "chunk"):
        return model.logits(ids)[:, PROMPT:]
    _, state = model.extend(ids[:, :PROMPT])
    parts, rest = [], ids[:, PROMPT:]
    for piece in rest.split(1 if model.scoring == "step" else rest.shape[1], 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    return torch.cat(parts, 1)


def test_every_policy_that_is_shipped_is_tried() -> None:
    shipped = {entry.method.name for entry in entries() if isinstance(entry.method, PolicyMethod)}
    assert shipped == set(SMALL) | set(LEFT_OUT["everything"]) and not set(SMALL) & set(LEFT_OUT["everything"])


def test_what_is_left_out_somewhere_is_there() -> None:
    assert {name for check, left in LEFT_OUT.items() if check != "everything" for name in left} <= set(NAMES)
    assert set(LEFT_OUT["batches"]) == {name for name in NAMES if policies()[name].max_batch == 1}


@pytest.mark.parametrize("name", NAMES)
def test_at_its_neutral_setting_it_is_the_base_though_its_own_code_runs(base: Any, name: str) -> None:
    ids, plain = texts(), TransformersModel(base, "cpu")
    model = under(base, policies()[name].neutral())
    calls = watched(model)
    found, wanted = logits(model, ids), plain.logits(ids)[:, PROMPT:]
    assert len(calls) >= 3, "its own code ran in every layer"
    assert far(found, wanted) <= 1e-4
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_neutral_artefact_is_not_loaded_as_the_base_alone(base: Any, name: str, tmp_path: Path) -> None:
    """A loader that left a neutral policy out would give the base too, and time that."""
    (tmp_path / "out").mkdir()
    written.save(policies()[name].neutral(), tiny.saved(base, tmp_path / "dense"), tmp_path / "out")
    model, ids = TransformersModel(written.load(tmp_path / "out"), "cpu"), texts()
    calls = watched(model)
    found, wanted = logits(model, ids), TransformersModel(base, "cpu").logits(ids)[:, PROMPT:]
    assert len(calls) >= 3, "its own code ran in every layer"
    assert far(found, wanted) <= 1e-4


REACHING = {name: found for name in NAMES if (found := as_long_as(policies()[name], REACH)) is not None}
"""Policies of a length, which is here more than that of the text: what they do is done, and leaves nothing out."""


def test_what_has_no_length_is_known() -> None:
    """These are the base where none leaves early, is skipped or is dropped, or by unit tests of their own."""
    sums = {"linear-attention-efficient", "linear-attention-elu", "performer-fourier", "performer-positive"}
    others = {"adaptive-span", "entmax", "latent-attention"}
    assert set(NAMES) - set(REACHING) == sums | others | {"early-exit", "skip-layer", "token-reduction"}


@pytest.mark.parametrize("name", sorted(REACHING))
def test_where_it_reaches_over_the_whole_text_its_own_arithmetic_gives_the_base(base: Any, name: str) -> None:
    assert REACHING[name] != policies()[name].neutral()
    ids, plain = texts(), TransformersModel(base, "cpu")
    found, wanted = logits(under(base, REACHING[name]), ids), plain.logits(ids)[:, PROMPT:]
    assert far(found, wanted) <= 1e-4
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_in_force_it_changes_what_comes_after(base: Any, name: str) -> None:
    ids = texts()
    assert far(logits(under(base, policies()[name]), ids), TransformersModel(base, "cpu").logits(ids)[:, PROMPT:]) > 1e-3


@pytest.mark.parametrize("name", [name for name in names("pieces") if policies()[name].scoring == "exact"])
def test_a_whole_text_gives_what_its_tokens_give_one_by_one_and_in_pieces(base: Any, name: str) -> None:
    model, ids = under(base, policies()[name]), texts(policies()[name].max_batch or 2)
    whole = model.logits(ids)
    for sizes in ([1] * LENGTH, [13, 1, 50, 2, LENGTH - 66]):
        parts, state = [], None
        for piece in ids.split(sizes, 1):
            found, state = model.extend(piece, state)
            parts.append(found)
        assert far(torch.cat(parts, 1), whole) <= 1e-4


@pytest.mark.parametrize("name", [name for name in names("pieces in two bytes") if policies()[name].scoring == "exact"])
def test_in_two_bytes_too_a_text_gives_about_the_same_in_pieces(base: Any, name: str) -> None:
    model, ids = under(copy.deepcopy(base).to(torch.bfloat16), policies()[name]), texts(policies()[name].max_batch or 2)
    whole, parts, state = model.logits(ids).float(), [], None
    for piece in ids.split([13, 1, 50, 2, 1, LENGTH - 67], 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    assert torch.isfinite(whole).all()
    assert float((torch.cat(parts, 1).float() - whole).abs().mean() / whole.abs().mean()) <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_artefact_brings_back_the_policy_and_its_tensors(base: Any, name: str, tmp_path: Path) -> None:
    policy, ids = policies()[name], texts(policies()[name].max_batch or 2)
    (tmp_path / "out").mkdir()
    written.save(policy, tiny.saved(base, tmp_path / "dense"), tmp_path / "out")
    assert written.read(tmp_path / "out")[0] == [policy]
    loaded = TransformersModel(written.load(tmp_path / "out"), "cpu")
    assert loaded.scoring == policy.scoring
    assert far(logits(loaded, ids), logits(under(base, policy), ids)) <= 1e-5


def test_every_kind_of_policy_that_changes_logits_is_brought_back() -> None:
    tried = {(policy.slot, policy.kind) for policy in policies().values()}
    drafts = {("draft", "lookup"), ("draft", "exit"), ("draft", "model")}
    others = {("cache", "transformers"), ("cache", "prefix"), ("depth", "contrast")} | drafts
    assert tried | others == set(written._KINDS) and not tried & others


@pytest.mark.parametrize("name", [name for name in NAMES if policies()[name].scoring == "suffix"])
def test_what_follows_a_prompt_gives_the_same_one_by_one(base: Any, name: str) -> None:
    model, ids = under(base, policies()[name]), texts()
    whole = logits(model, ids)
    model.scoring = "step"
    assert far(logits(model, ids), whole) <= 1e-4


@pytest.mark.parametrize("name", names("batches"))
def test_a_text_of_a_batch_gives_what_it_gives_alone(base: Any, name: str) -> None:
    """In eight bytes: in four, a product of more rows rounds otherwise, and of two keys of nearly equal norm another one leaves."""
    model, ids = under(copy.deepcopy(base).double(), policies()[name]), texts(3)
    alone = torch.cat([logits(model, text) for text in ids.split(1)])
    assert far(logits(model, ids), alone) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_no_token_knows_later_ones(base: Any, name: str) -> None:
    model, ids = under(base, policies()[name]), texts()
    other, at = ids.clone(), PROMPT + 12
    other[:, at:] = (other[:, at:] + 7) % tiny.SHAPE["vocab_size"]
    first, second = (logits(model, text)[:, : at - PROMPT] for text in (ids, other))
    assert far(first, second) <= 1e-6
    assert far(logits(model, ids)[:, at - PROMPT :], logits(model, other)[:, at - PROMPT :]) > 1e-3


TRAINABLE = [name for name in names("gradients") if policies()[name].trainable]


def test_what_weights_can_learn_with_is_known() -> None:
    sparse = {"bigbird", "blockbert", "longformer", "sparse-transformer-fixed", "sparse-transformer-strided", "streaming-llm"}
    linear = {"linear-attention-efficient", "linear-attention-elu", "linear-learned", "performer-positive"}
    others = {"adaptive-span", "bp-transformer", "combiner", "latent-attention", "linformer"}
    assert set(TRAINABLE) == sparse | linear | others


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_go_through_what_it_makes_of_a_whole_text(base: Any, name: str) -> None:
    """Without a cache, as training calls a model: the logits are those that are scored, and along a direction the loss rises as told."""
    policy, ids = policies()[name], texts()
    model: Any = copy.deepcopy(base).double()
    policy.install(model)
    weights = [value for key, value in model.named_parameters() if key.endswith("_proj.weight")]
    with torch.no_grad():
        assert far(model(input_ids=ids, use_cache=False).logits.float(), under(base, policy).logits(ids)) <= 1e-3
        for weight in weights:
            weight.mul_(0.5)

    def loss() -> Tensor:
        return next_token(model(input_ids=ids, use_cache=False).logits, ids)

    draw = torch.Generator().manual_seed(3)
    steps = [1e-4 * torch.randn(weight.shape, generator=draw, dtype=torch.float64) for weight in weights]
    told = sum((slope * step).sum() for slope, step in zip(torch.autograd.grad(loss(), weights), steps, strict=True))
    with torch.no_grad():
        torch._foreach_add_(weights, steps)
        above = loss()
        torch._foreach_sub_(weights, steps, alpha=2)
        below = loss()
    assert float(told) == pytest.approx(float(above - below) / 2, rel=0.03)


@pytest.mark.parametrize("name", names("steps"))
def test_its_steps_of_decoding_are_those_of_scoring(base: Any, name: str) -> None:
    model, ids = under(base, policies()[name]), texts(policies()[name].max_batch or 2)
    step, state, chosen = model.prefill(ids[:, :PROMPT], 16), None, []
    for _ in range(8):
        chosen.append(step.token)
        step = model.decode_step(step)
    found, state = model.extend(ids[:, :PROMPT], state)
    for token in chosen:
        assert torch.equal(found[:, -1:].argmax(-1), token)
        found, state = model.extend(token, state)


@pytest.mark.parametrize("name", [name for name in names("taken back") if isinstance(policies()[name], OperatorPolicy)])
def test_tokens_that_are_taken_back_leave_nothing_behind(base: Any, name: str) -> None:
    model, policy, ids = under(base, policies()[name]), policies()[name], texts(policies()[name].max_batch or 2)
    _, state = model.extend(ids[:, :PROMPT])
    assert state.rolls_back == policy.rolls_back == (policy.scoring != "step"), "else a pass of several tokens is another one"
    other = model.branch(state)
    state.watch()
    for piece in ids[:, PROMPT : PROMPT + 7].split([1, 6], 1):
        _, state = model.extend(piece, state)
    state.crop(-4)
    state.settle()
    if policy.rolls_back:
        _, other = model.extend(ids[:, PROMPT : PROMPT + 3], other)
        found, wanted = (model.extend(ids[:, PROMPT + 20 : PROMPT + 24], each)[0] for each in (state, other))
        assert state.get_seq_length() == other.get_seq_length() and far(found, wanted) <= 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(policies()[name], OperatorPolicy)])
def test_without_the_queries_of_other_tokens_the_same_is_kept_and_seen_unless_it_says_that_it_reads_them(base: Any, name: str) -> None:
    policy, kept, seen = policies()[name], list[dict[str, Tensor]](), list[Tensor]()
    for others, own in ((1, 1), (0, 0), (0, 1)):
        model = under(base, policy)
        operator = next(module.operator for module in model.module.modules() if hasattr(module, "operator"))
        inner, asked = operator.forward, torch.full((PROMPT, 1), float(others))
        asked[-1] = own

        def forward(query: Tensor, *more: Any, inner: Any = inner, asked: Tensor = asked) -> Tensor:
            found: Tensor = inner(query * asked, *more)
            seen.append(found[:, :, -1])
            return found

        operator.forward = forward
        _, state = model.extend(texts(policy.max_batch or 2)[:, :PROMPT])
        kept.append(state.kept[0].tensors_by_name)
    keeps = all(torch.equal(kept[0][part], kept[1][part]) for part in kept[0])
    assert (keeps and far(seen[0], seen[2]) <= 1e-5) != policy.reads_queries


BOUNDED = {name: method for name, method in classes().items() if isinstance(method, PolicyMethod) and "budget" in SMALL.get(name, {})}


def as_deep_as(base: Any, dense: DenseModel) -> DenseModel:
    return replace(dense, shape=replace(dense.shape, num_layers=base.config.num_hidden_layers))


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_what_a_bounded_cache_claims_is_what_it_reads_and_holds(base: Any, dense: DenseModel, name: str) -> None:
    method: Any = replace(BOUNDED[name], **SMALL[name])
    claim = method.claims(method.policy(), as_deep_as(base, dense))["work"]
    found = work.measure(under(base, method.policy()), texts(), claim, lambda *_: None)
    assert found.flags == [] and found.cache_tokens is not None
    if claim.cache_tokens is not None and not claim.keeps_written:
        assert found.cache_tokens.p95 == claim.cache_tokens + 1, "what is held, and the token itself"
    figure = "cache_tokens" if claim.read_tokens is None else "read_tokens"
    less = replace(claim, **{figure: getattr(claim, figure) * 3 // 4})
    assert any(flag.startswith("claims ") for flag in work.differences(found, less, work.token_bytes(base))), "the bound is no wide one"
    all_kept = work.measure(under(base, method.policy().neutral()), texts(), claim, lambda *_: None)
    assert any(re.fullmatch(r"claims (to read )?\S+ tokens( in the cache)?, .+", flag) for flag in all_kept.flags), "nothing left"


@pytest.mark.parametrize(("name", "figure"), [("knorm", "skip_layers"), ("quest", "dense_layers")])
def test_layers_that_keep_or_read_all_are_in_a_claim(base: Any, dense: DenseModel, name: str, figure: str) -> None:
    """As many as are claimed, and no more."""
    some, more = (replace(BOUNDED[name], **(SMALL[name] | {figure: layers})) for layers in (1, 2))
    claim = some.claims(some.policy(), as_deep_as(base, dense))["work"]
    assert claim.whole_layers == 1 / 3
    assert work.measure(under(base, some.policy()), texts(), claim, lambda *_: None).flags == []
    (told, *_) = work.measure(under(base, more.policy()), texts(), claim, lambda *_: None).flags
    assert told.startswith("claims ")

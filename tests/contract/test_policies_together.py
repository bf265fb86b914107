"""What two policies of one artefact promise: each acts as it does alone, and a draft over another changes no token.

For each pair of slots that may be filled together, one pair of shipped methods at least, written one after the other as a pipeline does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.registry import entry
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats import policy as written
from slimbench.methods.formats.attention.latent import Latent
from slimbench.methods.formats.attention.policy import OperatorPolicy
from slimbench.methods.formats.depth.contrast import Contrast
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.kv.prefix import Prefix
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work
from tests.support import tiny
from tests.support.policies import far

BLOCKS, TOKENS, PROMPT, LENGTH, ROOM = 4, 24, 40, 64, 28
SMALL: dict[str, dict[str, Any]] = {
    "streaming-llm": {"sinks": 2, "budget": 11},
    "snapkv": {"budget": 70},
    "knorm": {"budget": 10, "skip_layers": 0},
    "longformer": {"window": 6, "dilation": 2},
    "quest": {"budget": 12, "page": 4, "dense_layers": 1},
    "linear-elu": {},
    "kv-int8": {"bits": 2},
    "token-reduction": {"layer": 1},
    "prompt-lookup": {"tokens": 5},
    "self-speculation": {"tokens": 3, "blocks": 2},
}
"""By the name of a YAML: what makes it act within a text of `LENGTH` tokens."""


def drawn(*size: int, names: tuple[str, ...], scale: float) -> dict[str, Tensor]:
    """Normal numbers for each layer."""
    draw = torch.Generator().manual_seed(0)
    return {f"{layer}.{name}": torch.randn(size, generator=draw) * scale for layer in range(BLOCKS) for name in names}


PAIRS = {f"{layer}.pairs": torch.tensor([[0, 3], [1, 7]]) for layer in range(BLOCKS)}
FITTED: dict[str, Policy] = {
    "calm": EarlyExit("margin", 0.05, (1, 2, 3)),
    "dola": Contrast((1, 2), 0.1),
    "prefix-tuning": Prefix(3, drawn(2, 3, 16, names=("keys", "values"), scale=2.0)),
    "mla-128": Latent(20, 2, PAIRS | drawn(20, 56, names=("down",), scale=0.1) | drawn(56, 20, names=("up",), scale=0.3)),
}
"""What methods fit to a model, by the name of a YAML."""
LOGITS = [
    ("calm", "longformer"),
    ("calm", "linear-elu"),
    ("calm", "quest"),
    ("calm", "streaming-llm"),
    ("calm", "knorm"),
    ("calm", "kv-int8"),
    ("streaming-llm", "dola"),
    ("kv-int8", "dola"),
    ("longformer", "dola"),
]
"""Of slots attention or cache, and depth."""
DRAFTED = [
    ("longformer", "prompt-lookup"),
    ("quest", "prompt-lookup"),
    ("linear-elu", "prompt-lookup"),
    ("streaming-llm", "prompt-lookup"),
    ("streaming-llm", "self-speculation"),
    ("snapkv", "prompt-lookup"),
    ("mla-128", "prompt-lookup"),
    ("prefix-tuning", "prompt-lookup"),
    ("prefix-tuning", "self-speculation"),
    ("calm", "prompt-lookup"),
    ("dola", "prompt-lookup"),
    ("token-reduction", "prompt-lookup"),
]
"""Of any other slot, and draft."""


@cache
def policy(name: str) -> Policy:
    if name in FITTED:
        return FITTED[name]
    method: Any = replace(entry(name).method, **SMALL[name])
    made: Policy = method.policy()
    return made


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model in float32 of few tokens, whose continuations are neither constant nor without repetition."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | {"num_hidden_layers": BLOCKS, "vocab_size": TOKENS}))).eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(4 if "embed" not in name else 1)
    return tiny.saved(model, tmp_path_factory.mktemp("together") / "dense")


def artefact(dense: DenseModel, folder: Path, *policies: Policy) -> DenseModel:
    """Policies written one after the other, as steps of a pipeline."""
    for index, each in enumerate(policies):
        out = folder / f"{len(list(folder.iterdir()))}-{index}"
        out.mkdir()
        written.save(each, dense, out)
        dense = replace(dense, path=out, format=written.FORMAT)
    return dense


def under(dense: DenseModel, folder: Path, *policies: Policy) -> TransformersModel:
    return TransformersModel(written.load(artefact(dense, folder, *policies).path), "cpu")


def plain(dense: DenseModel) -> TransformersModel:
    return TransformersModel(written.load_base(dense.path, "huggingface", "cpu"), "cpu")


def texts(count: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, TOKENS, (count, length), generator=torch.Generator().manual_seed(2))


def logits(model: TransformersModel, ids: Tensor) -> Tensor:
    """Of what follows a prompt [B, LENGTH - PROMPT, V], each text alone and token by token: so all of these policies may be scored."""
    found = []
    for text in ids.split(1):
        _, state = model.extend(text[:, :PROMPT])
        parts = []
        for token in text[:, PROMPT:].split(1, 1):
            part, state = model.extend(token, state)
            parts.append(part)
        found.append(torch.cat(parts, 1))
    return torch.cat(found)


def finite(values: Tensor) -> Tensor:
    """Contrasts are -∞ outside of what is likely."""
    return values.nan_to_num(neginf=-100.0)


def differ(first: Tensor, second: Tensor) -> float:
    return far(finite(first), finite(second))


@pytest.mark.parametrize("pair", LOGITS, ids="+".join)
def test_two_that_change_logits_act_both_and_each_as_it_does_alone(pair: tuple[str, str], dense: DenseModel, tmp_path: Path) -> None:
    one, other = map(policy, pair)
    ids, base = texts(), plain(dense)
    both = logits(under(dense, tmp_path, one, other), ids)
    alone = [logits(under(dense, tmp_path, each), ids) for each in (one, other)]
    assert differ(both, alone[0]) > 1e-3 < differ(both, alone[1]), "both act"
    assert differ(logits(under(dense, tmp_path, one, other.neutral()), ids), alone[0]) <= 1e-4
    assert differ(logits(under(dense, tmp_path, one.neutral(), other), ids), alone[1]) <= 1e-4
    assert differ(logits(under(dense, tmp_path, one.neutral(), other.neutral()), ids), logits(base, ids)) <= 1e-4


@pytest.mark.parametrize("pair", LOGITS, ids="+".join)
def test_of_two_a_whole_text_gives_what_its_tokens_give_one_by_one(pair: tuple[str, str], dense: DenseModel, tmp_path: Path) -> None:
    model, ids = under(dense, tmp_path, *map(policy, pair)), texts()
    if model.scoring != "exact":
        assert model.scoring == max((policy(name).scoring for name in pair), key=get_args(written.Scoring).index)
        return
    whole = torch.cat([model.logits(text)[:, PROMPT:] for text in ids.split(1)])
    assert far(logits(model, ids), whole) <= 1e-4


def continued(model: TransformersModel, ids: Tensor) -> tuple[list[list[int]], int]:
    """Continuations of texts, and the calls of the last block's projection to keys that these took, those of prompts left out."""
    calls: list[int] = []
    handle = model.module.base_model.layers[-1].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    found = [model.generate(text, ROOM)[0] for text in ids.split(1)]
    handle.remove()
    return found, len(calls) - len(ids)


@pytest.mark.parametrize("pair", DRAFTED, ids="+".join)
def test_a_draft_over_another_policy_changes_no_token_and_saves_passes(pair: tuple[str, str], dense: DenseModel, tmp_path: Path) -> None:
    one, draft = map(policy, pair)
    ids, each = texts(2, 80 if "snapkv" in pair else 20), 2 * (ROOM - 1)
    wanted, plain_passes = continued(alone := under(dense, tmp_path, one), ids)
    found, passes = continued(both := under(dense, tmp_path, one, draft), ids)
    assert found == wanted and passes < plain_passes == each
    assert continued(under(dense, tmp_path, draft), ids)[0] != wanted, "the other policy acts, under the draft too"
    assert continued(under(dense, tmp_path, one, draft.neutral()), ids) == (wanted, each)
    assert continued(under(dense, tmp_path, one.neutral(), draft.neutral()), ids) == continued(plain(dense), ids)
    assert torch.equal(logits(both, texts()), logits(alone, texts())), "it changes no logits"


@pytest.mark.parametrize("pair", [pair for pair in DRAFTED if isinstance(policy(pair[0]), OperatorPolicy)], ids="+".join)
def test_what_was_guessed_wrongly_leaves_nothing_behind(pair: tuple[str, str], dense: DenseModel, tmp_path: Path) -> None:
    one, draft = map(policy, pair)
    alone, both = under(dense, tmp_path, one), under(dense, tmp_path, one, draft)
    ids = texts(1, 80 if "snapkv" in pair else 20)
    step = both.prefill(ids, ROOM)
    while step.state.room > 0:
        step = both.decode_step(step)
    assert step.state.accepted < step.state.drafted, "some guesses were wrong"
    other = alone.prefill(ids, ROOM)
    for _ in range(ROOM - 1):
        other = alone.decode_step(other)
    for found, wanted in zip(step.state.cache.kept, other.state.kept, strict=True):
        assert found.seen == wanted.seen == ids.shape[1] + ROOM - 1
        assert found.tensors_by_name.keys() == wanted.tensors_by_name.keys()
        assert not found._calls and found._before is None
        for name, tensor in wanted.tensors_by_name.items():
            off = float((found.tensors_by_name[name] - tensor).abs().max())
            assert off <= 1e-4 * max(1.0, float(tensor.abs().max())), name


def test_three_slots_are_filled_at_once(dense: DenseModel, tmp_path: Path) -> None:
    one, window, draft = map(policy, ("calm", "streaming-llm", "prompt-lookup"))
    model, alone = under(dense, tmp_path, one, window, draft), under(dense, tmp_path, one, window)
    assert model.slots == ["depth", "cache", "draft"] and model.max_batch == 1 and model.scoring == "exact"
    for text in texts(2, 20).split(1):
        assert model.generate(text, ROOM) == alone.generate(text, ROOM)


def steps(dense: DenseModel, folder: Path, *names: str) -> tuple[DenseModel, Claim]:
    """Methods that train nothing run one after the other; what they claim together."""
    claim: Claim | None = None
    for name in names:
        method: Any = replace(entry(name).method, **SMALL.get(name, {}))
        assert isinstance(method, PolicyMethod) and (claim is None or claim.format in method.accepts)
        out = folder / name
        out.mkdir()
        made = method.compress(dense, Calibration.none(), out)
        claim, dense = claim.then(made) if claim else made, replace(dense, path=out, format=written.FORMAT, original=dense.path)
    assert claim
    return dense, claim


def test_what_two_claim_is_what_hooks_count(dense: DenseModel, tmp_path: Path) -> None:
    both, claim = steps(dense, tmp_path, "streaming-llm", "prompt-lookup")
    assert claim.work == Work(cache_tokens=11) and claim.format == "policy"
    model = TransformersModel(written.load(both.path), "cpu")
    found = work.measure(model, texts(2, 30), claim.work, lambda *_: None)
    assert found.flags == [] and found.slots == ["cache", "draft"]
    assert found.passes is not None and found.passes < found.tokens
    assert found.cache_bytes == 11 * work.token_bytes(model.module), "a rejected guess keeps no token alive"
    lie = work.measure(model, texts(1, 30), Work(cache_tokens=5), lambda *_: None)
    assert any("holds the bytes of 11" in flag for flag in lie.flags)


def test_blocks_and_cache_are_both_counted(dense: DenseModel, tmp_path: Path) -> None:
    found = work.measure(
        under(dense, tmp_path, policy("calm"), policy("streaming-llm")), texts(2, 30), Work(cache_tokens=11), lambda *_: None
    )
    assert found.flags == [] and found.blocks and found.blocks.mean < BLOCKS and found.cache_tokens and found.cache_tokens.p95 == 12


def test_blocks_of_tokens_that_were_guessed_in_vain_break_no_claim(dense: DenseModel, tmp_path: Path) -> None:
    claim = Work(blocks=BLOCKS, fewest_blocks=1)
    assert work.measure(under(dense, tmp_path, policy("calm"), policy("prompt-lookup")), texts(2, 30), claim, lambda *_: None).flags == []
    model = under(dense, tmp_path, policy("calm").neutral(), policy("prompt-lookup"))
    found = work.measure(model, texts(2, 30), claim, lambda *_: None)
    assert found.flags == [] and found.blocks and found.blocks.mean > 1.05 * BLOCKS
    lie = work.measure(model, texts(2, 30), Work(blocks=BLOCKS - 1), lambda *_: None)
    assert lie.flags == [f"claims {BLOCKS - 1} blocks a token, ran {BLOCKS}"]


def test_a_draft_with_a_cache_of_its_own_takes_back_what_was_claimed(dense: DenseModel, tmp_path: Path) -> None:
    both, claim = steps(dense, tmp_path, "streaming-llm", "draft-model")
    assert claim.work == Work()
    model, alone = TransformersModel(written.load(both.path), "cpu"), under(dense, tmp_path, policy("streaming-llm"))
    for text in texts(2, 20).split(1):
        assert model.generate(text, ROOM) == alone.generate(text, ROOM)
    assert claim.parameters == sum(parameter.numel() for parameter in written.load_base(dense.path, "huggingface", "cpu").parameters()) * 2
    assert work.measure(model, texts(1, 30), claim.work, lambda *_: None).flags == []


def test_parameters_of_a_draft_and_of_what_was_fitted_before_it_are_all_claimed(dense: DenseModel, tmp_path: Path) -> None:
    width = tiny.SHAPE["hidden_size"]
    exits = EarlyExit("margin", 0.05, (1,), {"1.weight": torch.zeros(width, width), "1.bias": torch.zeros(width)})
    both, claim = steps(artefact(dense, tmp_path, exits), tmp_path, "draft-model")
    assert claim.parameters == TransformersModel(written.load(both.path), "cpu").evidence().parameters


def test_an_artefact_holds_policies_and_tensors_in_their_order_and_leaves_the_one_before_as_it_was(
    dense: DenseModel, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    width = tiny.SHAPE["hidden_size"]
    maps = {f"1.{name}": torch.randn(size, generator=draw) / width for name, size in (("weight", (width, width)), ("bias", (width,)))}
    exits = EarlyExit("margin", 0.05, (1, 2, 3), maps)
    first = artefact(dense, tmp_path, exits)
    before = {file.name: file.read_bytes() for file in first.path.iterdir()}
    second = tmp_path / "second"
    second.mkdir()
    written.save(policy("streaming-llm"), first, second)
    assert {file.name: file.read_bytes() for file in first.path.iterdir()} == before
    held: Any
    held, base = written.read(second)
    assert held == [exits, policy("streaming-llm")] and base == "huggingface"
    assert all(torch.equal(held[0].translators[name], tensor) for name, tensor in maps.items())
    described, earlier = (json.loads((folder / written.DESCRIPTION).read_text()) for folder in (second, first.path))
    assert list(described["slots"]) == ["depth", "cache"] and described["slots"]["depth"] == earlier["slots"]["depth"]
    assert (described["base"], described["scoring"], described["max_batch"], described["schema"]) == ("huggingface", "exact", 1, 1)


def test_one_policy_alone_is_written_as_it_always_was(dense: DenseModel, tmp_path: Path) -> None:
    alone = artefact(dense, tmp_path, policy("streaming-llm"))
    assert sorted(file.name for file in alone.path.iterdir()) == ["config.json", "model.safetensors", "policy.json"]
    assert (alone.path / "policy.json").read_text() == (
        '{\n "format": "slimbench policy",\n "schema": 1,\n "base": "huggingface",\n "slots": {\n  "cache": {\n   "kind": "window",\n'
        '   "sinks": 2,\n   "recent": 9\n  }\n },\n "scoring": "exact",\n "max_batch": null\n}\n'
    )


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("streaming-llm", "kv-int8"), "'quantized' cannot follow 'window': both decide on the slot cache; leave one of the two out"),
        (("knorm", "prompt-lookup"), "'lookup' cannot follow 'eviction': the cache 'eviction' cannot roll back a rejected draft"),
        (("prompt-lookup", "streaming-llm"), "'window' cannot follow 'lookup': a draft guesses for all that acts, so it comes last"),
    ],
)
def test_what_does_not_act_together_is_not_written(names: tuple[str, str], reason: str, dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as refusal:
        artefact(dense, tmp_path, *map(policy, names))
    assert str(refusal.value) == f"the policy {reason}"

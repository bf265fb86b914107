"""Nested gates of CoFi and Compresso: expected size, masks on the residual stream, losses and cuts, against formulas written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.gates import Pace
from slimbench.methods.formats import edited
from slimbench.methods.pruning.gates.cofi import CoFi, matched, opened
from slimbench.methods.pruning.gates.compresso import Compresso
from slimbench.methods.pruning.gates.nested import Nest, NestedGates
from slimbench.methods.pruning.gates.stream import stream_of
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
IDS = CALIBRATION.ids[:2]
FEW: dict[str, Any] = {"steps": 40, "batch_size": 2, "length": 16}
GROUPS = {"llama": 2, "opt": 4}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
MODELS: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("llama", UNTIED), ("opt", {}), ("qwen3", UNTIED)]


def unit(architecture: str, kind: str, hidden: int) -> int:
    """Parameters of a head group or a channel where so many features are left."""
    heads = {"llama": 16 * 6 * hidden, "opt": 16 * (4 * hidden + 3)}[architecture]
    return heads if kind == "heads" else {"llama": 3 * hidden, "opt": 2 * hidden + 1}[architecture]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS, use_cache=False).logits
    return made


@pytest.mark.parametrize(("architecture", "more"), MODELS)
@pytest.mark.parametrize("soft", [False, True])
def test_a_masked_stream_is_a_narrower_one(architecture: str, more: dict[str, Any], soft: bool) -> None:
    masked, model = make(architecture, **more), make(architecture, **more)
    assert stream_of(model).tied == (not more)
    z = 0.4 + 1.2 * torch.rand(64, generator=torch.Generator().manual_seed(6)) if soft else torch.ones(64)
    z[torch.arange(64) % 5 == 1] = 0.0
    with stream_of(masked).masked(z):
        wanted = logits(masked)
    assert (logits(masked) - logits(model)).abs().max() == 0, "it was for a while"
    stream = stream_of(model)
    stream.fold(z)
    stream.cut(model, z.nonzero().squeeze(1))
    assert {tuple(p.shape)[-1] for p in (model.get_input_embeddings().weight, anatomy(model)[1].attention.q.weight)} == {51}
    assert (logits(model) - wanted).abs().max() < 1e-4
    assert (wanted - logits(masked)).abs().max() > 1e-2


def test_something_else_on_the_stream_is_refused() -> None:
    model = make("llama")
    model.model.extra = torch.nn.Linear(64, 32)
    with pytest.raises(Unsupported, match=r"model\.extra on its residual stream"):
        stream_of(model)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_expected_size_is_a_sum_over_features_parts_and_units(architecture: str) -> None:
    gates, generator = NestedGates(make(architecture), 0.3, Pace(10)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(3 * torch.randn(len(alpha), generator=generator))

    def stays(alpha: float) -> float:
        return 1 / (1 + math.exp(-(alpha - 2 / 3 * math.log(0.1 / 1.1))))

    p = {name: [stays(alpha) for alpha in values.tolist()] for name, values in gates.alphas.items()}
    size = whole = 0.0
    for index in range(3):
        names = [name for name in p if f".layers.{index}." in name]
        for part, name in (("attention", names[0]), ("mlp", names[1])):
            kind = "heads" if part == "attention" else "channels"
            biases = unit(architecture, kind, 0)
            per_feature = unit(architecture, kind, 1) - biases
            for unit_stays in p[name]:
                size += sum(feature * p[part][index] * unit_stays * per_feature for feature in p["hidden"])
                size += p[part][index] * unit_stays * biases
                whole += 64 * per_feature + biases
    assert gates.nest.total == whole == gates.whole
    assert float(gates.gone().detach()) == pytest.approx(1 - size / whole, abs=1e-5)


def uneven(model: Any, ratio: float) -> NestedGates:
    """Gates of which an attention, an MLP, features and units are likely to be shut."""
    gates, generator = NestedGates(model, ratio, Pace(10)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(1 + 1.5 * torch.randn(len(alpha), generator=generator))
        gates.alphas["attention"].copy_(torch.tensor([2.0, -4.0, 1.0]))
        gates.alphas["mlp"].copy_(torch.tensor([0.5, 1.0, -3.0]))
        gates.alphas["hidden"].clamp_(min=-1.0)
    return gates


@pytest.mark.parametrize(("architecture", "more"), MODELS[:3])
def test_what_is_cut_is_what_was_masked_and_as_large_as_expected(architecture: str, more: dict[str, Any]) -> None:
    masked, model = make(architecture, **more), make(architecture, **more)
    gates, same = uneven(model, 0.75), Nest(masked)
    wanted = round(0.75 * gates.whole)
    expected = round(float((1 - gates.stays()["hidden"]).sum()))
    final = gates.finish(model, wanted)
    with same.applied(final):
        made = logits(masked)
    assert (logits(model) - made).abs().max() < 1e-4
    assert final["attention"].ne(0).tolist() == [True, False, True] and final["mlp"].ne(0).tolist() == [True, True, False]
    assert int((final["hidden"] == 0).sum()) == expected > 0
    counted = float(same.size({name: (value != 0).double() for name, value in final.items()}))
    assert counted == gates.nest.held(final), "gates of 0 and 1 expect what there is"
    facts = gates.nest.told(final)
    hidden = facts["hidden"]
    by_hand = unit(architecture, "heads", hidden) * sum(facts["head_groups_by_block"])
    by_hand += unit(architecture, "channels", hidden) * sum(facts["channels_by_block"])
    assert counted == by_hand and facts["head_groups_by_block"][1] == facts["channels_by_block"][2] == 0
    assert wanted <= gates.whole - counted < wanted + unit(architecture, "heads", hidden)
    for name, value in gates.values().items():
        kept = final[name] != 0
        assert torch.equal(final[name][kept], value[kept]) and bool((value > 0).all())


def test_features_take_no_more_than_the_budget() -> None:
    model = make("llama")
    gates = uneven(model, 0.02)
    with torch.no_grad():
        gates.alphas["hidden"].fill_(-3.0)
    facts = gates.nest.told(gates.finish(model, round(0.02 * gates.whole)))
    assert facts["hidden"] == 63 and all(facts["head_groups_by_block"]) and all(facts["channels_by_block"])
    gone = gates.whole - sum(facts["channels_by_block"]) * 3 * 63 - sum(facts["head_groups_by_block"]) * 16 * 6 * 63
    assert round(0.02 * gates.whole) <= gone < round(0.02 * gates.whole) + 16 * 6 * 63


def test_a_gate_has_a_gradient_through_everything_that_it_masks() -> None:
    model = make("opt")
    gates = NestedGates(model, 0.3, Pace(10, begin=0.0))
    torch.manual_seed(0)
    with gates.drawn():
        loss = model(IDS, use_cache=False).logits.square().mean()
    found = torch.autograd.grad(loss, list(gates.alphas.values()))
    assert all(bool((gradient != 0).any()) for gradient in found)


def test_alphas_stay_within_bounds() -> None:
    gates = NestedGates(make("llama"), 0.3, Pace(10))
    with torch.no_grad():
        gates.alphas["hidden"].fill_(9.0)
        gates.alphas["mlp"].fill_(-9.0)
    gates.after_step(0, None)  # type: ignore[arg-type]
    assert float(gates.alphas["hidden"].max()) == pytest.approx(math.log(100))
    assert float(gates.alphas["mlp"].min()) == pytest.approx(math.log(0.01))


def test_layers_are_matched_to_the_nearest_open_one() -> None:
    generator = torch.Generator().manual_seed(4)
    states, teacher = ([torch.randn(2, 3, 4, generator=generator) for _ in range(8)] for _ in range(2))
    matrix, among = torch.randn(4, 4, generator=generator), [0, 2, 5, 6]
    total = 0.0
    for place in (1, 3, 5, 7):  # behind the second, fourth, sixth and eighth block
        errors = []
        for index in among:
            error = 0.0
            for sequence in range(2):
                for token in range(3):
                    for j in range(4):
                        turned = sum(float(matrix[j, i]) * float(states[index][sequence, token, i]) for i in range(4))
                        error += (turned - float(teacher[place][sequence, token, j])) ** 2
            errors.append(error / 24)
        total += min(errors)
    assert float(matched(states, teacher, matrix, among)) == pytest.approx(total, rel=1e-5)
    assert opened({"mlp": torch.tensor([0.0, 0.3, 0.0, 1.0])}) == [1, 3] and opened({"mlp": torch.zeros(3)}) == [0, 1, 2]


def test_the_loss_of_cofi_is_the_papers(tmp_path: Path) -> None:
    dense, teacher = tiny.saved(make("llama"), tmp_path / "model"), make("llama", num_hidden_layers=3, rms_norm_eps=1e-2)
    model = dense.load()
    gates, matrix = NestedGates(model, 0.3, Pace(10, begin=50.0)), torch.eye(64) * 1.1
    with torch.no_grad():
        gates.multipliers[0].fill_(0.7)
        student, wanted = (each(IDS, use_cache=False, output_hidden_states=True) for each in (model, teacher))
        got = float(CoFi(prediction=0.3).objective(model, teacher, gates, matrix, dense)(IDS))
    p, q = (made.logits.double().div(2).log_softmax(-1) for made in (student, wanted))
    entropy = -float((q.exp() * q).sum(-1).mean())
    divergence = float((q.exp() * (q - p)).sum(-1).mean())
    ours, theirs = ([h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() for h in of.hidden_states[1:]] for of in (student, wanted))
    layers = sum(min(float((1.1 * s - t).square().mean()) for s in ours) for t in theirs)
    penalty = 0.7 * (float(gates.gone().detach()) - gates.target())
    assert got == pytest.approx(0.3 * 4 * (divergence + entropy) + 0.7 * layers + penalty, rel=1e-4)


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("kind", [CoFi, Compresso])
def test_the_budget_is_held_to_the_unit_and_the_path_is_told(kind: Any, architecture: str, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture), tmp_path / "model")
    tiny.save_tokenizer(dense.tokenizer_path)
    few = FEW | ({"prompt": "Less."} if kind is Compresso else {})
    claim = compressed(kind(**few), dense, tmp_path / "out")
    model, facts = edited.load(tmp_path / "out"), claim.details
    assert claim.parameters == model.num_parameters() and claim.layers == 3 and claim.format == "edited"
    counted = unit(architecture, "heads", facts["hidden"]) * sum(facts["head_groups_by_block"])
    counted += unit(architecture, "channels", facts["hidden"]) * sum(facts["channels_by_block"])
    whole = 3 * (GROUPS[architecture] * unit(architecture, "heads", 64) + 128 * unit(architecture, "channels", 64))
    assert round(0.25 * whole) <= whole - counted < round(0.25 * whole) + unit(architecture, "heads", 64)
    gates = facts["gates"]
    assert gates["gone"] == pytest.approx(1 - counted / whole) and gates["difference"] == abs(gates["gone"] - gates["expected_gone"])
    middle = gates["path"][19]
    assert middle[0] == 20 and abs(middle[1] - middle[2]) < 0.05 and abs(gates["expected_gone"] - 0.25) < 0.015
    assert model.get_input_embeddings().embedding_dim == facts["hidden"]
    assert torch.isfinite(logits(model)).all()
    if kind is Compresso and architecture == "llama":
        learned = sum(8 * (64 + out) for out in (64, 32)) * 3 + 3 * (2 + 128) + 64 + 2
        assert claim.trained_parameters == learned and claim.teacher is None


def test_adapters_do_in_training_what_they_do_merged(tmp_path: Path) -> None:
    dense = tiny.saved(make("opt"), tmp_path / "model")
    model = dense.load()
    adapters, value = Compresso(rank=3, alpha=6.0).beside(model, dense), anatomy(model)[0].attention.v
    assert [*adapters.layers.values()] == [layer for block in anatomy(model) for layer in (block.attention.q, block.attention.v)]
    second_layer, before = list(adapters.layers)[1], value.weight.detach().clone()
    with adapters.added():
        assert torch.equal(logits(model), logits(dense.load())), "B is 0"
    with torch.no_grad():
        for _, second in adapters.pairs.values():
            second.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with adapters.added():
        wanted = logits(model)
    down, up = (value.detach().clone() for value in adapters.pairs[second_layer])
    adapters.merge()
    assert (logits(model) - wanted).abs().max() < 1e-4
    assert torch.allclose(value.weight, before + 6 / 3 * up @ down, atol=1e-6)


@pytest.mark.parametrize("prompt", [[], [7, 8, 9]])
def test_the_prompt_stands_before_each_text_and_is_not_learned(prompt: list[int], tmp_path: Path) -> None:
    dense = tiny.saved(make("llama"), tmp_path / "model")
    model = dense.load()
    gates, method = NestedGates(model, 0.3, Pace(10, begin=50.0), parts=()), Compresso()
    adapters = Beside({}, 1, 1.0, 0)
    with torch.no_grad():
        loss = float(method.objective(model, gates, adapters, torch.tensor(prompt, dtype=torch.int64), dense)(IDS))
        whole = torch.cat([torch.tensor([prompt] * 2, dtype=torch.int64).reshape(2, -1), IDS], 1)
        p = model(whole, use_cache=False).logits.double().log_softmax(-1)
    begin = max(1, len(prompt))
    losses = [-float(p[row, at - 1, whole[row, at]]) for row in range(2) for at in range(begin, whole.shape[1])]
    assert len(losses) == 2 * (32 if prompt else 31)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("kind", [CoFi, Compresso])
def test_what_does_not_fit_is_refused_in_one_line(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4 experts in one tensor") as caught:
        compressed(kind(**FEW), tiny.saved(make("mixtral"), tmp_path / "experts"), tmp_path / "one")
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match="one group of heads and one channel"):
        compressed(kind(**FEW, ratio=0.99), tiny.saved(make("llama"), tmp_path / "llama"), tmp_path / "two")
    with pytest.raises(Unsupported, match="GemmaForCausalLM has no embedding and head of the usual classes"):
        compressed(kind(**FEW), tiny.saved(make("gemma"), tmp_path / "gemma"), tmp_path / "three")
    with pytest.raises(ValueError, match=r"prediction must be|rank must be"):
        CoFi(prediction=1.5) if kind is CoFi else Compresso(rank=0)


def test_the_same_artefact_comes_twice(tmp_path: Path) -> None:
    dense = tiny.saved(make("llama"), tmp_path / "model")
    for name in ("one", "two"):
        compressed(CoFi(**FEW | {"steps": 8}), dense, tmp_path / name)
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

"""APT against its formulas written out, on tiny random models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.units import kinds_of
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.gates import multiplied
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.losses import next_token
from slimbench.methods.core.training import Trained
from slimbench.methods.formats import edited
from slimbench.methods.pruning.adapters.apt import APT, matched, objective, shared
from slimbench.methods.pruning.adapters.merging import finished
from slimbench.methods.pruning.adapters.salience import Salience, kurtosis
from slimbench.methods.pruning.gates.nested import Nest
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 24, "batch_size": 2, "length": 16, "fade": 0.25}
GROUP, CHANNEL = {"llama": 16 * 64 * 6, "opt": 16 * (3 * 65 + 64)}, {"llama": 3 * 64, "opt": 65 + 64}
GROUPS = {"llama": 2, "opt": 4}
ONE = {"llama": (16 * 6, 0, 3, 0), "opt": (16 * 4, 16 * 3, 2, 1)}
"""Weights of a group for each feature, its biases, and those of a channel."""
SCALE = 2.0


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    return request.param, tiny.saved(make(request.param), tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("llama"), tmp_path_factory.mktemp("plain") / "model")


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def watched(
    growth: Cubic | None = None, rank: int = 2, most: int = 4, wanted: int = 30_000, architecture: str = "llama", **more: Any
) -> tuple[Any, Beside, Salience]:
    """A model, of one block where nothing else is said, with adapters on queries, values and up, whose B is not zero."""
    model = make(architecture, **(more or {"num_hidden_layers": 1})).requires_grad_(False)
    ends = ("q_proj", "v_proj", "up_proj", "fc1")
    beside = Beside({name: layer for name, layer in tiny.block_layers(model).items() if name.endswith(ends)}, most, SCALE, 0)
    generator = torch.Generator().manual_seed(3)
    for _, second in beside.pairs.values():
        second.data[:, :rank] = 0.1 * torch.randn(second[:, :rank].shape, generator=generator)
    nest = Nest(model) if more else None
    return model, beside, Salience(beside, kinds_of(model), wanted, growth or Cubic(0.0, 1.0, 2, 6), 0.75, 0.25, rank, nest)


def held(architecture: str, groups: int, channels: int, hidden: int) -> int:
    """Parameters of so many groups of heads and channels of the whole model where so many features are left."""
    group, biases, channel, bias = ONE[architecture]
    return hidden * (group * groups + channel * channels) + biases * groups + bias * channels


def lost(architecture: str, groups: int, channels: int, hidden: int, tied: bool = True) -> int:
    """Parameters that go from a model of three blocks where so much is left: of units, and what else each feature has."""
    blocks = {"llama": 2, "opt": 2 * 2 + 2}[architecture]  # gains of norms; biases of norms and of what writes the stream
    outside = {"llama": 256 + 1, "opt": 256 + 256 + 2 + 2}[architecture] + (0 if tied else 256)
    units = held(architecture, 3 * GROUPS[architecture], 3 * 128, 64) - held(architecture, groups, channels, hidden)
    return units + (64 - hidden) * (3 * blocks + outside)


def plain_kurtosis(values: list[float]) -> float:
    """Excess kurtosis, with the variance of a sample as the authors' program has it."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return sum((value - mean) ** 4 for value in values) / len(values) / variance**2 - 3


def test_kurtosis_is_large_where_there_are_outliers() -> None:
    values = [[0.1, -0.2, 0.3, 4.0, 0.0, 0.2, 0.1, -0.3, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]]
    got = kurtosis(torch.tensor(values, dtype=torch.float64)).tolist()
    assert got == [pytest.approx(plain_kurtosis(row), rel=1e-9) for row in values]
    assert got[0] > 0 > got[1]


def test_salience_is_that_of_activations_gradients_adapters_and_outliers() -> None:
    """Against the model into which the adapters are merged: ∂L/∂B is s ∂L/∂W Aᵀ."""
    model, beside, hooks = watched()
    for parameter in beside.parameters.values():
        parameter.requires_grad_(True)
    ids = CALIBRATION.ids[:2, :12]
    with beside.added(), multiplied(hooks.kinds, hooks.gates):
        next_token(model(ids, use_cache=False).logits, ids).backward()
    hooks.after_backward(0)
    merged = make("llama", num_hidden_layers=1).requires_grad_(False)
    layers = tiny.block_layers(merged)
    for name, (first, second) in beside.pairs.items():
        layers[name].weight.data += SCALE * (second @ first).detach()
    inputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        x.retain_grad()
        inputs[name] = x

    for name in hooks.kinds:
        merged.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    for name in beside.pairs:
        layers[name].weight.requires_grad_(True)
    next_token(merged(ids, use_cache=False).logits, ids).backward()
    for name, makes in {"self_attn.o_proj": ("q_proj", "v_proj"), "mlp.down_proj": ("up_proj",)}.items():
        full = f"model.layers.0.{name}"
        x = inputs[full]
        assert x.grad is not None
        states, gradients = x.detach().flatten(0, 1).tolist(), x.grad.flatten(0, 1).tolist()
        weight = layers[full].weight.tolist()
        count = hooks.kinds[full].count
        width = len(states[0]) // count
        want = []
        for unit in range(count):
            score, outputs = 0.0, []
            for j in range(unit * width, (unit + 1) * width):
                score += sum(abs(row[j]) for row in states) * sum(abs(row[j]) for row in gradients)
                mean = sum(row[j] for row in states) / len(states)
                outputs += [row[j] * mean for row in weight]
            for layer in makes:
                adapter = next(other for other in beside.pairs if other.endswith(layer))
                a, b = (value.detach() for value in beside.pairs[adapter])
                rows = len(b) // count
                of_second = SCALE * (layers[adapter].weight.grad @ a.T)
                score += SCALE * float((of_second * b).abs()[unit * rows : (unit + 1) * rows].sum())
            want.append(score + math.sqrt(max(0.0, plain_kurtosis(outputs))))
        torch.testing.assert_close(hooks.averages[full], 0.25 * torch.tensor(want), rtol=2e-4, atol=1e-5)
    assert not hooks.seen, "each step begins anew"
    for name, (first, second) in beside.pairs.items():
        assert first.grad is not None and second.grad is not None
        assert not first.grad[2:].any() and not second.grad[:, 2:].any() and second.grad[:, :2].any(), "later ranks do not learn yet"
        of_second = SCALE * (layers[name].weight.grad @ beside.pairs[name][0].detach().T)
        assert hooks.importance[name] == pytest.approx(float((of_second * second.detach()).abs().sum()), rel=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_salience_of_a_feature_is_summed_over_all_that_is_written_to_it(architecture: str) -> None:
    """Against the model into which the adapters are merged; what is written counts before the mask."""
    adapted, beside, hooks = watched(architecture=architecture, num_hidden_layers=2)
    z = torch.linspace(0.4, 1.0, 64)
    z[::5] = 0.0
    hooks.gates["hidden"].copy_(z)
    for parameter in beside.parameters.values():
        parameter.requires_grad_(True)
    ids = CALIBRATION.ids[:2, :12]
    with beside.added(), hooks.masked():
        next_token(adapted(ids, use_cache=False).logits, ids).backward()
    hooks.after_backward(0)
    merged = make(architecture, num_hidden_layers=2).requires_grad_(False)
    layers = tiny.block_layers(merged)
    for name, (first, second) in beside.pairs.items():
        layers[name].weight.data += SCALE * (second @ first).detach()
    merged.get_input_embeddings().weight.requires_grad_(True)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, made: Tensor) -> None:
        made.retain_grad()
        inputs[name], outputs[name] = x, made

    writers = [name for name in layers if name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))]
    assert len(writers) == 4
    for name in writers:
        layers[name].register_forward_hook(lambda _, args, made, name=name: keep(name, args[0], made))
    with Nest(merged).stream.masked(z):
        next_token(merged(ids, use_cache=False).logits, ids).backward()
    want = [0.0] * 64
    for name in writers:
        made, x, gradient = outputs[name], inputs[name], outputs[name].grad
        assert gradient is not None
        rows, slopes = made.detach().flatten(0, -2).tolist(), gradient.flatten(0, -2).tolist()
        means, weight = x.detach().flatten(0, -2).mean(0).tolist(), layers[name].weight.tolist()
        for j in range(64):
            want[j] += sum(abs(row[j]) for row in rows) * sum(abs(row[j]) for row in slopes)
            spread = plain_kurtosis([w * mean for w, mean in zip(weight[j], means, strict=True)])
            want[j] += math.sqrt(max(0.0, spread))
    torch.testing.assert_close(hooks.averages["hidden"], 0.25 * torch.tensor(want), rtol=2e-4, atol=1e-5)
    assert not hooks.seen


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_is_left_is_a_product_of_features_and_of_heads_and_channels(architecture: str) -> None:
    _, _, hooks = watched(architecture=architecture, num_hidden_layers=3)
    generator, groups = torch.Generator().manual_seed(1), 3 * GROUPS[architecture]
    names = list(hooks.averages)
    group, biases, channel, bias = ONE[architecture]
    left = {"group": groups, "channel": 3 * 128, "hidden": 64}
    whole = held(architecture, groups, 3 * 128, 64)
    assert names[-1] == "hidden" and hooks.nest is not None and hooks.nest.total == whole
    for share in (0.3, 0.6):
        prices = {"group": group * left["hidden"] + biases, "channel": channel * left["hidden"] + bias}
        prices["hidden"] = group * left["group"] + channel * left["channel"]
        kinds = {name: "hidden" if name == "hidden" else "group" if "attn" in name else "channel" for name in names}
        for name in names:
            drawn = torch.rand(len(hooks.averages[name]), generator=generator)
            hooks.averages[name].copy_(drawn * prices[kinds[name]] * (3 if name == "hidden" else 1))
        densities = [(float(v) / prices[kinds[name]], name, i) for name in names for i, v in enumerate(hooks.averages[name])]
        densities = sorted(set(densities) - {max(entry for entry in densities if entry[1] == name) for name in names})
        gone: set[tuple[str, int]] = set()
        left = {"group": groups, "channel": 3 * 128, "hidden": 64}
        while whole - held(architecture, *left.values()) < round(share * whole):
            _, name, index = densities[len(gone)]
            gone.add((name, index))
            left[kinds[name]] -= 1
        for wanted in (round(share * whole), whole - held(architecture, *left.values())):
            chosen = hooks.chosen(wanted)
            assert {(name, i) for name, mask in chosen.items() for i in mask.nonzero().flatten().tolist()} == gone
        hooks.gone = chosen
        assert min(left.values()) > 0 and left["hidden"] < 64 and left["group"] < groups and left["channel"] < 3 * 128
    everything = whole - held(architecture, 3, 3, 1)
    assert sum(int((~mask).sum()) for mask in hooks.chosen(everything).values()) == len(names)
    with pytest.raises(Unsupported, match=f"leave {everything} parameters to prune, fewer than {everything + 1}"):
        hooks.chosen(everything + 1)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_masked_and_adapted_is_what_is_cut_and_merged(architecture: str, tied: bool, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture, tie_word_embeddings=tied), tmp_path / "dense")
    model, beside, hooks = watched(architecture=architecture, num_hidden_layers=3, tie_word_embeddings=tied)
    generator, before = torch.Generator().manual_seed(2), model.num_parameters()
    for average in hooks.averages.values():
        average.copy_(torch.rand(len(average), generator=generator))
    assert hooks.nest is not None
    hooks.averages["hidden"].mul_(10)
    hooks.gone = hooks.chosen(hooks.nest.total // 2)
    hooks.gates = {name: (~mask).float() for name, mask in hooks.gone.items()}
    with torch.no_grad(), beside.added():
        plain = model(CALIBRATION.ids[:2], use_cache=False).logits
        with hooks.masked():
            wanted = model(CALIBRATION.ids[:2], use_cache=False).logits
    hooks.finish()
    beside.merge()
    claim = finished(model, APT(**FEW), hooks.gone, Trained(0, 0, ((0, 0.0),), 0.0), dense, tmp_path)
    cut = edited.load(tmp_path)
    groups, channels = (sum(claim.details[f"{kind}_by_block"]) for kind in ("head_groups", "channels"))
    hidden = claim.details["hidden"]
    assert 1 < hidden < 64 and groups < 3 * GROUPS[architecture] and channels < 3 * 128
    with torch.no_grad():
        assert (cut(CALIBRATION.ids[:2]).logits - wanted).abs().max() < 1e-4
    assert (plain - wanted).abs().max() > 1e-2
    assert claim.parameters == cut.num_parameters()
    assert before - cut.num_parameters() == lost(architecture, groups, channels, hidden, tied)


def test_structures_of_the_lowest_salience_per_parameter_go_and_their_masks_fade() -> None:
    _, _, hooks = watched(Cubic(0.0, 1.0, 0, 4), wanted=192 * 100)
    optimizer: Any = None
    heads, channels = hooks.averages
    generator = torch.Generator().manual_seed(0)
    hooks.averages[heads].copy_(torch.tensor([32.0 * 50, 32.0 * 1000]))
    hooks.averages[channels].copy_(torch.rand(128, generator=generator) * 100 + 1)
    densities = [(float(value) / 6144, heads, i) for i, value in enumerate(hooks.averages[heads])]
    densities += [(float(value) / 192, channels, i) for i, value in enumerate(hooks.averages[channels])]
    for step in range(4):
        hooks.after_step(step, optimizer)
        share = 1 - (1 - (step + 1) / 4) ** 3
        wanted, left, gone = round(share * 192 * 100), 0, set()
        best = {max(entry for entry in densities if entry[1] == name) for name in (heads, channels)}
        for _, name, index in sorted(set(densities) - best):
            if left >= wanted:
                break
            left += 6144 if name == heads else 192
            gone.add((name, index))
        assert {(name, i) for name, mask in hooks.gone.items() for i in mask.nonzero().flatten().tolist()} == gone
        assert wanted <= left < wanted + 6144
    assert bool(hooks.gone[heads][0]) and not bool(hooks.gone[heads][1])
    values = hooks.gates[channels]
    assert set(values.tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0} and bool((values[~hooks.gone[channels]] == 1).all())
    hooks.gone[channels].zero_()
    hooks.growth = Cubic(0.0, 1.0, 0, 4)
    low = values.clone()
    hooks.after_step(5, optimizer)
    torch.testing.assert_close(hooks.gates[channels], (low + 0.25).clamp_max(1))


def test_the_more_important_half_of_the_adapters_gets_the_larger_ranks() -> None:
    _, beside, hooks = watched(Cubic(0.0, 1.0, 0, 8), rank=4, most=8, wanted=192)
    names = list(beside.pairs)
    ranks = dict.fromkeys(names, 4)
    optimizer: Any = None
    for step in range(8):
        hooks.importance = {name: float(index) if step < 5 else float(-index) for index, name in enumerate(names)}
        hooks.after_step(step, optimizer)
        if step % 2 == 1:
            ratio = (1 + (step + 1) / 8) / (1 + (step - 1) / 8)
            chosen = names[2] if step < 5 else names[0]
            ranks[chosen] = min(8, math.floor(ranks[chosen] * ratio))
        assert hooks.ranks == ranks
    assert ranks[names[2]] > 4 and ranks[names[1]] == 4


def test_states_are_matched_with_the_block_that_comes_closest() -> None:
    torch.manual_seed(0)
    states, teacher = ([torch.randn(2, 3, 4) for _ in range(4)] for _ in range(2))
    first, second = torch.randn(2, 4), torch.randn(4, 2)
    for factors in ((first, torch.zeros(4, 2)), (first, second)):
        whole = torch.eye(4) + factors[1] @ factors[0]
        want = sum(min(float((state @ whole.T - goal).square().mean()) for state in states) for goal in teacher)
        assert float(matched(states, teacher, factors)) == pytest.approx(want, rel=1e-5)
    torch.manual_seed(1)
    drawn = {round(float(matched(states, [*teacher, *teacher], (first, second))), 4) for _ in range(20)}
    assert len(drawn) > 1, "of a quarter with two blocks one is drawn"


def test_the_loss_goes_from_the_text_to_the_model_itself(llama: DenseModel) -> None:
    assert [shared(step, 2, 6) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 0, 0]
    model, beside, hooks = watched(Cubic(0.0, 1.0, 2, 6))
    transform = (torch.zeros(2, 64), torch.zeros(64, 2))
    loss = objective(model, beside, hooks, transform, llama)
    ids = CALIBRATION.ids[:2, :12]
    with torch.no_grad():
        text = float(loss(ids))
        with beside.added():
            made = model(ids, use_cache=False, output_hidden_states=True)
        assert text == pytest.approx(float(next_token(made.logits, ids)), rel=1e-6)
        hooks.step = 3
        entropy = -float((made.logits.softmax(-1) * made.logits.log_softmax(-1)).sum(-1).mean())
        assert float(loss(ids)) == pytest.approx(0.25 * entropy + 0.75 * text, rel=1e-5), "its own teacher until something changes"
        for _, second in beside.pairs.values():
            second.mul_(-3)
        assert float(loss(ids)) > 0.25 * entropy + 0.75 * text


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_features_that_no_block_writes_go_first_and_count_by_what_they_take(architecture: str, tmp_path: Path) -> None:
    idle = make(architecture)
    with torch.no_grad():
        for name, layer in tiny.block_layers(idle).items():
            if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")):
                for tensor in layer.parameters():
                    tensor[:16] = 0.0
    dense = tiny.saved(idle, tmp_path / "dense")
    claim = compressed(APT(**FEW, ratio=0.3), dense, tmp_path / "out")
    cut = edited.load(tmp_path / "out")
    groups, channels = (sum(claim.details[f"{kind}_by_block"]) for kind in ("head_groups", "channels"))
    whole = held(architecture, 3 * GROUPS[architecture], 3 * 128, 64)
    gone = whole - held(architecture, groups, channels, 48)
    assert claim.details["hidden"] == 48 and channels < 3 * 128
    assert round(0.3 * whole) <= gone < round(0.3 * whole) + GROUP[architecture]
    assert claim.parameters == cut.num_parameters() == idle.num_parameters() - lost(architecture, groups, channels, 48)
    torch.testing.assert_close(cut.get_input_embeddings().weight, idle.get_input_embeddings().weight[:, 16:])
    assert torch.isfinite(cut(CALIBRATION.ids).logits).all()


def test_the_artefact_has_the_parameters_that_were_asked_for(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(APT(**FEW, hidden=False), dense, tmp_path / "out")
    model, before = edited.load(tmp_path / "out"), dense.load().num_parameters()
    group, channel = GROUP[architecture], CHANNEL[architecture]
    heads, channels = claim.details["head_groups_by_block"], claim.details["channels_by_block"]
    lost = group * (3 * GROUPS[architecture] - sum(heads)) + channel * (3 * 128 - sum(channels))
    total = 3 * (GROUPS[architecture] * group + 128 * channel)
    assert round(0.25 * total) <= lost < round(0.25 * total) + group
    assert claim.parameters == model.num_parameters() == before - lost
    assert claim.details["ranks"][0] == 8 < claim.details["ranks"][1] <= 16
    assert "hidden" not in claim.details and model.get_input_embeddings().weight.shape[1] == 64
    assert claim.layers == 3 and claim.training_tokens == 24 * 2 * 16
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_other_decoders_and_settings_are_refused_in_one_line(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts in one tensor") as caught:
        APT(**FEW).compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match="one group of heads and one channel in each block leave"):
        APT(**FEW, ratio=0.99, hidden=False).compress(llama, CALIBRATION, tmp_path)
    with pytest.raises(Unsupported, match="one hidden feature, and one group of heads and one channel in each block, leave") as caught:
        APT(**FEW, ratio=0.999).compress(llama, CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)
    scaled = tiny.saved(make("gemma"), tmp_path / "scaled")
    with pytest.raises(Unsupported, match="no embedding and head of the usual classes"):
        APT(**FEW).compress(scaled, CALIBRATION, tmp_path)
    assert compressed(APT(**FEW, hidden=False), scaled, tmp_path / "scaled-out").parameters
    wrong: dict[str, Any]
    for wrong in ({"growing": 0.5}, {"memory": 1.0}, {"fade": 0.0}, {"loss": "distillation"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            APT(**wrong)
    with pytest.raises(ValueError, match=r"fade must be at least 1 / 7, not 0\.1: a mask has 7 of 20 steps to close"):
        APT(steps=20)
    hooks = watched(APT(steps=20, fade=1 / 7).growth, wanted=192 * 100)[2]
    for average in hooks.averages.values():
        average.copy_(torch.arange(len(average)))
    hooks.fade = 1 / 7
    for step in range(20):
        hooks.after_step(step, None)  # type: ignore[arg-type]
    for name, gate in hooks.gates.items():
        torch.testing.assert_close(gate, (~hooks.gone[name]).float())


def test_the_same_artefact_comes_twice_and_after_an_interruption(llama: DenseModel, tmp_path: Path) -> None:
    def stop(done: float, total: float) -> None:
        if done == 9:
            raise KeyboardInterrupt

    method = APT(**FEW | {"steps": 14, "checkpoint_every": 4})
    first, second = (compressed(method, llama, tmp_path / name) for name in ("one", "two"))
    assert first == second
    kept = replace(llama, checkpoints=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        compressed(method, replace(kept, progress=stop), tmp_path / "broken")
    compressed(method, kept, tmp_path / "resumed")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "resumed")]
    assert files[0] == files[1] == files[2]

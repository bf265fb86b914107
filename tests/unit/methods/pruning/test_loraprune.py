"""LoRAPrune and LoRAShear against their formulas written out, on tiny random models."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.units import Structures, kinds_of
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.formats import edited
from slimbench.methods.pruning.adapters.loraprune import Importance, LoRAPrune
from slimbench.methods.pruning.adapters.lorashear import LoRAShear, Shear, deviations
from slimbench.methods.pruning.adapters.merging import estimate, goals
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 20, "batch_size": 2, "length": 16}
GROUP, CHANNEL = {"llama": 16 * 64 * 6, "opt": 16 * (3 * 65 + 64)}, {"llama": 3 * 64, "opt": 65 + 64}
GROUPS = {"llama": 2, "opt": 4}


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


def test_the_estimate_is_the_fall_of_the_product_in_a_step_of_rate_one() -> None:
    torch.manual_seed(0)
    a, b, ga, gb = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (2, 5), (4, 2)))
    got = estimate(a, b, ga, gb)
    torch.testing.assert_close(got, b @ a - (b - gb) @ (a - ga))
    for i in range(4):
        for j in range(5):
            want = sum(float(gb[i, r] * a[r, j] + b[i, r] * ga[r, j] - gb[i, r] * ga[r, j]) for r in range(2))
            assert float(got[i, j]) == pytest.approx(want, rel=1e-12)


def test_with_an_adapter_that_can_do_all_it_is_the_gradient_to_first_order() -> None:
    """A of orthonormal rows and as many of them as inputs, B small: ĝ differs from ∂L/∂W by terms with B alone."""
    torch.manual_seed(1)
    x, target = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    weight = torch.randn(4, 5, dtype=torch.float64)
    first = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    errors = []
    for size in (1e-2, 1e-3):
        a, b = first.clone().requires_grad_(True), (size * torch.ones(4, 5, dtype=torch.float64)).requires_grad_(True)
        whole = (weight + (b @ a).detach()).requires_grad_(True)
        (x @ (weight + b @ a).T - target).square().mean().backward()
        (x @ whole.T - target).square().mean().backward()
        assert a.grad is not None and b.grad is not None and whole.grad is not None
        errors.append(float((estimate(a.detach(), b.detach(), a.grad, b.grad) - whole.grad).norm() / whole.grad.norm()))
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(10, rel=0.3)


def toy() -> tuple[Beside, Structures]:
    """Three structures of two rows each in layers [6, 3] and [6, 3], and of two columns in a layer [4, 6], with adapters and gradients."""
    torch.manual_seed(2)
    layers = {"gate": nn.Linear(3, 6), "up": nn.Linear(3, 6), "down": nn.Linear(6, 4)}
    beside = Beside(layers, 2, 3.0, 0)
    for first, second in beside.pairs.values():
        second.data.normal_()
        first.grad, second.grad = torch.randn_like(first), torch.randn_like(second)
    return beside, Structures("channels", 3, (layers["gate"], layers["up"]), layers["down"])


def scores_of(beside: Beside) -> list[float]:
    """G, number by number."""
    total = [0.0] * 3
    for name, (first, second) in beside.pairs.items():
        a, b, weight = first.tolist(), second.tolist(), beside.layers[name].weight.tolist()
        assert first.grad is not None and second.grad is not None
        ga, gb = first.grad.tolist(), second.grad.tolist()
        sums = [0.0] * 3
        for i in range(len(weight)):
            for j in range(len(weight[0])):
                gradient = sum(gb[i][r] * a[r][j] + b[i][r] * ga[r][j] - gb[i][r] * ga[r][j] for r in range(2))
                value = weight[i][j] + 6.0 / 2 * sum(b[i][r] * a[r][j] for r in range(2))
                sums[(j if name == "down" else i) // 2] += (value * gradient) ** 2
        norm = math.sqrt(sum(value**2 for value in sums))
        total = [have + value / norm for have, value in zip(total, sums, strict=True)]
    return total


def test_scores_of_structures_are_sums_of_squares_over_the_norm_of_each_layer() -> None:
    beside, kind = toy()
    hooks = Importance(beside, {"down": kind}, {"down": 2}, Cubic(0.0, 1.0, 0, 4), 0.75)
    averages = [0.0] * 3
    for step in range(3):
        want = scores_of(beside)
        hooks.after_backward(step)
        averages = [0.75 * have + 0.25 * value for have, value in zip(averages, want, strict=True)]
        torch.testing.assert_close(hooks.averages["down"], torch.tensor(averages), rtol=1e-4, atol=1e-6)
        for first, _ in beside.pairs.values():
            assert first.grad is not None
            first.grad.mul_(-2).add_(0.3)


def test_structures_are_masked_by_a_cubic_schedule_and_stay_so() -> None:
    beside, kind = toy()
    hooks = Importance(beside, {"down": kind}, {"down": 2}, Cubic(0.0, 1.0, 1, 5), 0.9)
    optimizer: Any = None
    counts = []
    for step in range(6):
        hooks.averages["down"].copy_(torch.tensor([3.0, 1.0, 2.0] if step < 3 else [0.0, 5.0, 4.0]))
        hooks.after_step(step, optimizer)
        counts.append(int(hooks.gone["down"].sum()))
        share = 1 - (1 - min(1.0, max(0.0, step / 4))) ** 3
        assert counts[-1] == math.floor(2 * share + 0.5)
    assert counts == [0, 1, 2, 2, 2, 2] and hooks.gone["down"].tolist() == [False, True, True]
    assert hooks.gates["down"].tolist() == [1.0, 0.0, 0.0]


def spared(kinds: dict[str, Any], prefix: str) -> list[str]:
    return [name for name in kinds if prefix not in name]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_what_goes_is_the_share_of_all_parameters_to_less_than_a_channel(ratio: float, source: tuple[str, DenseModel]) -> None:
    architecture, dense = source
    kinds = kinds_of(dense.load())
    gone = goals(kinds, spared(kinds, "layers.2."), ratio)
    group, channel = GROUP[architecture], CHANNEL[architecture]
    total = 3 * (GROUPS[architecture] * group + 128 * channel)
    lost = sum(count * (group if kinds[name].name == "head_groups" else channel) for name, count in gone.items())
    assert round(ratio * total) <= lost < round(ratio * total) + channel
    assert len(gone) == 4 and max(count for name, count in gone.items() if "attn" in name) < GROUPS[architecture]
    channels = [count for name, count in gone.items() if "attn" not in name]
    assert max(channels) - min(channels) <= 1


def test_the_artefact_is_the_merged_model_without_the_structures(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(LoRAPrune(**FEW), dense, tmp_path / "out")
    model, before = edited.load(tmp_path / "out"), dense.load().num_parameters()
    group, channel = GROUP[architecture], CHANNEL[architecture]
    heads, channels = claim.details["head_groups_by_block"], claim.details["channels_by_block"]
    lost = group * (3 * GROUPS[architecture] - sum(heads)) + channel * (3 * 128 - sum(channels))
    total = 3 * (GROUPS[architecture] * group + 128 * channel)
    assert round(0.25 * total) <= lost < round(0.25 * total) + channel
    assert claim.parameters == model.num_parameters() == before - lost
    assert heads[-1] == GROUPS[architecture] and channels[-1] == 128 and claim.details["blocks_pruned"] == [0, 1]
    assert heads[0] == heads[1] and abs(channels[0] - channels[1]) <= 1
    assert claim.cache_bytes_per_token == sum(heads) * 16 * 2 * 4 and claim.layers == 3
    assert claim.trained_parameters == 8 * sum(sum(layer.weight.shape) for layer in tiny_linears(dense.load()))
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def tiny_linears(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if ".layers." in name and isinstance(module, nn.Linear)]


def test_the_cut_model_computes_what_the_masked_one_with_adapters_did(
    llama: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimbench.methods.core.learning.gates import multiplied

    seen: list[Tensor] = []
    merge = Beside.merge

    def watched(self: Beside) -> None:
        names = {name: layer for name, layer in self.layers.items()}
        model = holder[0]
        kinds = kinds_of(model)
        hooks = watching[0]
        with torch.no_grad(), self.added(), multiplied({name: kinds[name] for name in hooks.gone}, hooks.gates):
            seen.append(model(CALIBRATION.ids).logits)
        assert any(bool(self.pairs[name][1].any()) for name in names)
        merge(self)

    holder: list[Any] = []
    watching: list[Importance] = []
    made = Importance.__init__

    def built(self: Importance, *args: Any) -> None:
        made(self, *args)
        watching.append(self)

    from slimbench.methods.core.learning import trained

    load = trained.load

    def loaded(dense: DenseModel) -> Any:
        holder.append(load(dense))
        return holder[0]

    monkeypatch.setattr(Beside, "merge", watched)
    monkeypatch.setattr(Importance, "__init__", built)
    monkeypatch.setattr(trained, "load", loaded)
    compressed(LoRAPrune(**FEW | {"learning_rate": 1e-2}), llama, tmp_path / "out")
    with torch.no_grad():
        got = edited.load(tmp_path / "out")(CALIBRATION.ids).logits
    torch.testing.assert_close(got, seen[0], rtol=1e-4, atol=1e-4)


class Optimizer(torch.optim.Optimizer):
    """Has no moments."""

    def __init__(self) -> None:
        self.state = defaultdict(dict)


def shear(**settings: Any) -> tuple[Beside, Structures, Shear]:
    """Layers with three structures, of which two fade, in one period of four steps after the first unless settings say otherwise."""
    beside, kind = toy()
    method = LoRAShear(**{"steps": 5, "begin": 0.2, "end": 1.0, "periods": 1} | settings)
    hooks = Shear(beside, {"down": kind}, {"down": 2}, method)
    hooks.averages["down"].copy_(torch.tensor([3.0, 1.0, 2.0]))
    return beside, kind, hooks


def test_redundant_groups_fade_and_are_zero_after_the_last_step() -> None:
    beside, _, hooks = shear()
    for _, second in beside.pairs.values():
        second.data[2:] = 0
    up, down = beside.layers["up"].weight.detach().clone(), beside.layers["down"].weight.detach().clone()
    bias, change = beside.layers["up"].bias.detach().clone(), beside.change("up")
    for step in range(5):
        hooks.after_step(step, Optimizer())
        left = [1, 3 / 4, 2 / 4, 1 / 4, 0][step]
        merged = change if step == 4 else torch.zeros_like(change)
        torch.testing.assert_close(beside.layers["up"].weight.detach()[:2], (up + merged)[:2])
        torch.testing.assert_close(beside.layers["up"].weight.detach()[2:], left * up[2:])
        torch.testing.assert_close(beside.layers["up"].bias.detach()[2:], left * bias[2:])
    assert not beside.layers["gate"].weight[2:].any() and not beside.layers["up"].bias[2:].any()
    assert torch.equal(beside.layers["up"].bias[:2], bias[:2])
    torch.testing.assert_close(beside.layers["down"].weight.detach()[2:], down[2:])
    assert hooks.gone["down"].tolist() == [False, True, True]
    assert not any(bool(second.any()) for _, second in beside.pairs.values()), "merged, they begin anew"


def test_a_step_is_that_of_the_paper_with_the_half_space_projection() -> None:
    for epsilon, size, turned in ((0.0, 1.0, 1), (0.97, 0.1, 2)):
        beside, kind, hooks = shear(epsilon=epsilon)
        for _, second in beside.pairs.values():
            second.data *= size
        changes = {name: beside.change(name) for name in ("gate", "up")}
        before = {name: beside.layers[name].weight.detach().clone() for name in ("gate", "up")}
        hooks.after_step(0, Optimizer())
        hooks.after_step(1, Optimizer())
        zeros = 0
        for group in (1, 2):
            rows = slice(2 * group, 2 * group + 2)
            x = torch.cat([before[name][rows].flatten() for name in ("gate", "up")])
            moved = torch.cat([changes[name][rows].flatten() for name in ("gate", "up")])
            trial = x + moved - float(x.norm()) / 4 * x / x.norm()
            want = trial if float(trial @ x) >= epsilon * float(x @ x) else torch.zeros_like(x)
            zeros += not bool(want.any())
            got = torch.cat([beside.layers[name].weight.detach()[rows].flatten() for name in ("gate", "up")])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert not beside.pairs["up"][1][rows].any() and beside.pairs["up"][1][:2].any()
        assert zeros == turned
        assert kind.count == 3


def test_periods_share_the_steps_and_the_groups() -> None:
    _, _, hooks = shear(steps=10, periods=3)
    assert [hooks.place(step) for step in range(1, 10)] == [
        None, (0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3), (2, 0, 3), (2, 1, 3), (2, 2, 3),
    ]  # fmt: skip
    counts = []
    for step in range(10):
        hooks.after_step(step, Optimizer())
        counts.append((int(hooks.gone["down"].sum()), int(hooks.fading["down"].sum())))
    assert counts == [(0, 0)] * 2 + [(1, 1)] * 2 + [(1, 0)] * 3 + [(2, 1)] * 3


def test_layers_that_cannot_bear_it_are_spared(llama: DenseModel) -> None:
    model = llama.load()
    kinds = kinds_of(model)
    ids = CALIBRATION.ids[:2, :16]
    harm = deviations(model, kinds, ids, 0.25)
    name = "model.layers.1.mlp.down_proj"
    mlp = model.model.layers[1].mlp
    norms = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
    gone = norms.argsort()[:32]
    before = model(ids, labels=ids).loss.item()
    mlp.down_proj.weight.data[:, gone] = 0
    assert harm[name] == pytest.approx(model(ids, labels=ids).loss.item() - before, abs=2e-5)


def test_what_has_faded_is_cut_out(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(LoRAShear(**FEW, spared=0.2), dense, tmp_path / "out")
    model, before = edited.load(tmp_path / "out"), dense.load().num_parameters()
    group, channel = GROUP[architecture], CHANNEL[architecture]
    lost = group * (3 * GROUPS[architecture] - sum(claim.details["head_groups_by_block"]))
    lost += channel * (3 * 128 - sum(claim.details["channels_by_block"]))
    total = 3 * (GROUPS[architecture] * group + 128 * channel)
    assert round(0.25 * total) <= lost < round(0.25 * total) + channel
    assert claim.parameters == model.num_parameters() == before - lost
    assert len(claim.details["layers_spared"]) == 1
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_other_decoders_and_settings_are_refused_in_one_line(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts in one tensor") as caught:
        LoRAPrune(**FEW).compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match="each of which keeps one"):
        LoRAPrune(**FEW, ratio=0.66).compress(llama, CALIBRATION, tmp_path)
    with pytest.raises(Unsupported, match="no block of 1 is left"):
        LoRAPrune(**FEW).check(replace(llama.shape, num_layers=1))
    wrong: dict[str, Any]
    for wrong in ({"begin": 0.9, "end": 0.2}, {"memory": 1.0}, {"keep_first": 1.0}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAPrune(**wrong)
    for wrong in ({"periods": 0}, {"periods": 99}, {"epsilon": 1.0}, {"spared": 1.0}, {"memory": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAShear(**wrong)


@pytest.mark.parametrize("kind", [LoRAPrune, LoRAShear])
def test_the_same_artefact_comes_twice_and_after_an_interruption(kind: Any, llama: DenseModel, tmp_path: Path) -> None:
    def stop(done: float, total: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    method = kind(**FEW | {"steps": 12, "checkpoint_every": 3})
    first, second = (compressed(method, llama, tmp_path / name) for name in ("one", "two"))
    assert first == second
    kept = replace(llama, checkpoints=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        compressed(method, replace(kept, progress=stop), tmp_path / "broken")
    compressed(method, kept, tmp_path / "resumed")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "resumed")]
    assert files[0] == files[1] == files[2]

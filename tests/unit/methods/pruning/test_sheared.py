"""Sheared LLaMA: the mix of domains and the Lagrangians of the kinds against formulas written out, and targets that are hit exactly."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.uniform import Sizes, sizes_of
from slimbench.methods.core.learning.gates import Pace
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.formats import huggingface
from slimbench.methods.pruning.gates.nested import Nest
from slimbench.methods.pruning.gates.shapes import ShapedGates
from slimbench.methods.pruning.gates.sheared import Both, Mixture, Sheared, update_proportion
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
IDS = CALIBRATION.ids[:2]
FEW: dict[str, Any] = {"steps": 40, "batch_size": 2, "length": 16}
KINDS = ("blocks", "hidden", "groups", "channels")


def test_the_mix_grows_where_the_loss_lies_above_its_reference() -> None:
    weights, losses, reference = [0.2, 0.5, 0.3], [3.4, 2.0, 2.75], [3.1, 2.9, 2.75]
    grown = [0.2 * math.exp(3.4 - 3.1), 0.5 * math.exp(0.0), 0.3 * math.exp(0.0)]  # below its reference a domain does not shrink
    assert update_proportion(weights, losses, reference) == pytest.approx([value / sum(grown) for value in grown], abs=1e-9)
    assert sum(update_proportion(weights, losses, reference)) == pytest.approx(1, abs=1e-12)


def gates_of(model: Any, target: Sizes) -> ShapedGates:
    gates, generator = ShapedGates(model, sizes_of(model), target, Pace(10)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(1 + 1.5 * torch.randn(len(alpha), generator=generator))
    return gates


def test_each_kind_has_a_lagrangian_of_its_own() -> None:
    full, target = Sizes(3, 64, 4, 128), Sizes(2, 48, 3, 80)
    gates = gates_of(make("opt"), target)
    first, second = [0.5, -1.0, 2.0, 0.3], [1.0, 3.0, 0.2, 5.0]
    with torch.no_grad():
        for multiplier, values in zip(gates.multipliers, (first, second), strict=True):
            multiplier.copy_(torch.tensor(values))
    gates.step = 3  # the fourth of ten
    gates.scale = torch.tensor([2.0, 0.5, 1.0, 30.0])

    def gone(alphas: list[float]) -> float:
        return 1 - sum(1 / (1 + math.exp(-(alpha - 2 / 3 * math.log(0.1 / 1.1)))) for alpha in alphas) / len(alphas)

    heads = [gone(values.tolist()) for name, values in gates.alphas.items() if name.endswith("out_proj")]
    channels = [gone(values.tolist()) for name, values in gates.alphas.items() if name.endswith("fc2")]
    shares = [[gone(gates.alphas["blocks"].tolist())], [gone(gates.alphas["hidden"].tolist())], heads, channels]
    assert [len(values) for values in shares] == [1, 1, 3, 3]
    total, begun = 0.0, gone([gates.pace.begin])
    for kind, name in enumerate(KINDS):
        t = begun + 0.4 * (1 - getattr(target, name) / getattr(full, name) - begun)
        gaps = [share - t for share in shares[kind]]
        total += float(gates.scale[kind]) * sum(first[kind] * gap + second[kind] * gap**2 for gap in gaps) / len(gaps)
    assert float(gates.penalty().detach()) == pytest.approx(total, abs=1e-5)
    with torch.no_grad():
        row = gates.row()
    assert row[0] == pytest.approx(float(gates.gone().detach())) and len(row) == 18
    means = [sum(values) / len(values) for values in shares]
    assert [row[2 + 4 * kind] for kind in range(4)] == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False}])
def test_the_target_is_what_was_masked_and_an_ordinary_model(more: dict[str, Any], tmp_path: Path) -> None:
    model, masked = make("llama", num_key_value_heads=4, **more), make("llama", num_key_value_heads=4, **more)
    target = Sizes(2, 48, 3, 88)
    gates, same = gates_of(model, target), Nest(masked)
    stays, values = gates.stays(), gates.values()
    kept = {"blocks": 2, "hidden": 48} | {name: 3 if name.endswith("o_proj") else 88 for name in same.kinds}
    for name, count in kept.items():
        order = sorted(range(len(values[name])), key=lambda index: float(stays[name][index]))
        values[name][order[: len(order) - count]] = 0.0
    with torch.no_grad(), same.applied(values):
        wanted = masked(IDS, use_cache=False).logits
    gone = gates.shape(model)
    assert sizes_of(model) == target
    with torch.no_grad():
        assert (model(IDS, use_cache=False).logits - wanted).abs().max() < 1e-4
    units = 2 * (3 * 16 * 4 * 48 + 88 * 3 * 48)
    assert gone == pytest.approx(1 - units / (3 * (4 * 16 * 4 * 64 + 128 * 3 * 64)))
    huggingface.save_dense(model, tmp_path)
    assert not (tmp_path / "edited.json").exists()
    with torch.no_grad():
        assert (huggingface.load(tmp_path)(IDS).logits - wanted).abs().max() < 1e-4


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {"depth": 0.0, "loss": "distillation"}), ("llama", {"depth": 0.5, "ratio": 0.5}), ("opt", {"depth": 0.0})],
)
def test_the_sizes_are_hit_and_each_path_follows_its_target(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture), tmp_path / "model")
    claim = compressed(Sheared(**FEW | {"steps": 60} | settings), dense, tmp_path / "out")
    model, facts = huggingface.load(tmp_path / "out"), claim.details
    assert asdict(sizes_of(model)) == facts["sizes_left"] != facts["sizes_before"]
    assert claim.parameters == model.num_parameters() <= (1 - settings.get("ratio", 0.25)) * facts["parameters_before"]
    assert claim.layers == facts["sizes_left"]["blocks"] == model.config.num_hidden_layers and claim.format == "huggingface"
    assert (claim.teacher is None) == (settings.get("loss") is None)
    path = facts["gates"]["path"]
    assert path[-1][0] == 60 and {len(row) for row in path} == {19}
    half = min(path, key=lambda row: abs(row[0] - 30))
    for kind, name in enumerate(KINDS):
        middle, last = ([row[3 + 4 * kind], row[4 + 4 * kind]] for row in (half, path[-1]))
        assert abs(middle[0] - middle[1]) < 0.05
        assert last[1] == pytest.approx(1 - facts["sizes_left"][name] / facts["sizes_before"][name], abs=1e-6)
    assert facts["gates"]["difference"] < 0.01
    assert len(set(facts["gates"]["scale"])) == 4 and 1.0 not in facts["gates"]["scale"], "each kind was weighed against the loss"
    training = facts["training"]
    whole, gates = dict(training["loss_curve"]), dict(training["loss_terms"]["gates"])
    assert gates[1] == 0.0 and any(gates.values()), "the loss of the text is what is left without it"
    assert all(0 < whole[step] - gates[step] < 10 for step in gates)
    assert [row[0] for row in facts["mix"]["path"]] == [10, 20, 30, 40, 50, 60]
    for row in facts["mix"]["path"]:
        assert sum(row[1:3]) == pytest.approx(1)


def test_nothing_that_hooks_do_is_left_out_where_two_act_together() -> None:
    offered = {name for name, value in vars(Hooks).items() if callable(value) and not name.startswith("_")}
    assert offered <= set(vars(Both))


def test_domains_are_drawn_in_proportion_and_held_out_windows_never(tmp_path: Path) -> None:
    dense = tiny.saved(make("llama"), tmp_path / "model")
    windows = torch.arange(14 * 16).reshape(14, 16) % 250
    mixture = Mixture(Sheared(), dense.load(), None, windows, dense)
    assert [len(held) for held in mixture.held] == [2, 2] and [len(texts) for texts in mixture.texts] == [5, 5]
    for index in range(2):
        with torch.no_grad():
            p = dense.load()(mixture.held[index]).logits.double().log_softmax(-1)
        losses = [-float(p[row, at, mixture.held[index][row, at + 1]]) for row in range(2) for at in range(15)]
        assert mixture.reference[index] == pytest.approx(sum(losses) / 30, rel=1e-5)
    mixture.weights = [0.2, 0.8]
    torch.manual_seed(0)
    drawn = mixture.drawn(2000)
    firsts = [{tuple(row) for row in texts.tolist()} for texts in mixture.texts]
    counts = [sum(tuple(row) in first for row in drawn.tolist()) for first in firsts]
    assert sum(counts) == 2000 and counts[1] / 2000 == pytest.approx(0.8, abs=0.03)
    other = Mixture(Sheared(), dense.load(), None, windows, dense)
    mixture.path = [[10, 0.2, 0.8, 1.0, 2.0]]
    other.load(mixture.state())
    assert (other.weights, other.path) == (mixture.weights, mixture.path)


def test_it_refuses_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4 experts in one tensor"):
        compressed(Sheared(**FEW), tiny.saved(make("mixtral"), tmp_path / "experts"), tmp_path / "one")
    dense = tiny.saved(make("llama"), tmp_path / "model")
    with pytest.raises(Unsupported, match="16 windows are too few for 9 domains"):
        compressed(Sheared(**FEW, domains=9, depth=0.0), dense, tmp_path / "two")
    with pytest.raises(Unsupported, match="no block can be removed from 1"):
        Sheared().check(tiny.saved(make("llama", num_hidden_layers=1), tmp_path / "flat").shape)
    for name, value in (("domains", 1), ("depth", 1.5), ("mix_every", 0), ("multiple", 0)):
        with pytest.raises(ValueError, match=name):
            Sheared(**{name: value})  # type: ignore[arg-type]


def test_the_same_artefact_comes_twice(tmp_path: Path) -> None:
    dense = tiny.saved(make("opt"), tmp_path / "model")
    claims = [compressed(Sheared(**FEW | {"steps": 10, "depth": 0.0}), dense, tmp_path / name) for name in ("one", "two")]
    assert claims[0] == claims[1]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")}) == 1

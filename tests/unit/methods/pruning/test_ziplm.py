"""ZipLM's removals against least squares solved anew, its choice of levels against brute force, and both inside tiny models."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.units import structures
from slimbench.methods.formats import edited
from slimbench.methods.pruning.second_order import latency, ziplm
from slimbench.methods.pruning.second_order.ziplm import ZipLM, cheapest, levels_of, prune, remove, saliency, search
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Eight query heads in four groups."""
    return tiny.saved(make("llama", num_attention_heads=8, num_key_value_heads=4), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("opt"), tmp_path_factory.mktemp("opt") / "model")


def compressed(dense: DenseModel, out: Path, **settings: Any) -> Claim:
    out.mkdir()
    cheap: dict[str, Any] = {"cost": "products", "candidates": 4, "tokens": 96}
    return ZipLM(**(cheap | settings)).compress(dense, CALIBRATION, out)


def layer(outputs: int = 10, inputs: int = 12, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the Hessian of correlated inputs of different strengths; float64."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(80, inputs)) @ (np.eye(inputs) + 0.5 * random.normal(size=(inputs, inputs))) * np.logspace(-0.5, 0.5, inputs)
    return random.normal(size=(outputs, inputs)), 2 * x.T @ x / 80 + 0.01 * np.eye(inputs)


def solved(weight: np.ndarray, hessian: np.ndarray, kept: list[int]) -> np.ndarray:
    """The weights of the kept inputs that change the outputs least, by the normal equations."""
    return np.asarray(np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ weight.T).T)


def loss(weight: np.ndarray, hessian: np.ndarray, kept: list[int]) -> float:
    change = weight.copy()
    change[:, kept] -= solved(weight, hessian, kept)
    return float(np.einsum("ri,ij,rj->", change, hessian, change))


@pytest.mark.parametrize("width", [1, 3])
def test_the_error_of_a_removal_is_that_of_least_squares_without_it(width: int) -> None:
    weight, hessian = layer()
    found = saliency(torch.tensor(weight), torch.tensor(np.linalg.inv(hessian)), 12 // width)
    want = [loss(weight, hessian, [i for i in range(12) if i // width != s]) for s in range(12 // width)]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("width", [1, 3])
def test_a_removal_is_the_least_squares_solution_and_downdates_the_inverse(width: int) -> None:
    weight, hessian = layer()
    work, inverse = torch.tensor(weight), torch.tensor(np.linalg.inv(hessian))
    for number, structure in enumerate((2, 0)):
        remove(work, inverse, slice(structure * width, (structure + 1) * width))
        kept = [i for i in range(12) if i // width not in ((2,), (2, 0))[number]]
        gone = [i for i in range(12) if i not in kept]
        np.testing.assert_allclose(work[:, kept].numpy(), solved(weight, hessian, kept), rtol=1e-5)
        np.testing.assert_allclose(inverse.numpy()[np.ix_(kept, kept)], np.linalg.inv(hessian[np.ix_(kept, kept)]), rtol=1e-5)
        assert not work[:, gone].any() and not inverse[gone][:, kept].any() and not inverse[kept][:, gone].any()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("sizes", [[12, 11, 7, 3, 0], [12, 5, 1]])
def test_levels_are_those_of_the_paper(width: int, sizes: list[int]) -> None:
    """Greedily, by least squares solved anew for each structure that could go next."""
    weight, hessian = layer(inputs=12 * width)
    left, want, spent = list(range(12)), {12: (list(range(12)), weight, 0.0)}, 0.0
    columns = lambda structures: [s * width + i for s in structures for i in range(width)]  # noqa: E731
    while left:
        losses = {s: loss(weight, hessian, columns([other for other in left if other != s])) for s in left}
        gone = min(losses, key=losses.__getitem__)
        left, spent = [s for s in left if s != gone], losses[gone]
        want[len(left)] = (list(left), solved(weight, hessian, columns(left)), spent)
    whole = float(np.einsum("ri,ij,rj->", weight, hessian, weight))
    assert spent == pytest.approx(whole)
    found = levels_of(torch.tensor(weight), torch.tensor(np.linalg.inv(hessian)), 12, sizes)
    assert [len(level.kept) for level in found] == sizes
    for level in found:
        kept, values, error = want[len(level.kept)]
        assert level.kept.tolist() == kept
        np.testing.assert_allclose(level.weight.numpy(), values.reshape(10, -1), rtol=1e-6, atol=1e-9)
        assert level.error == pytest.approx(error / whole, rel=1e-6)


def test_equal_structures_go_in_order() -> None:
    weight, hessian = np.ones((3, 6)), np.eye(6)
    found = levels_of(torch.tensor(weight), torch.tensor(hessian), 6, [6, 4, 1])
    assert [level.kept.tolist() for level in found] == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [5]]


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_of_levels_is_that_of_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    errors = np.sort(random.random((3, 4)), 1).tolist()
    times = random.integers(1, 40, (3, 4)).tolist()
    for budget in (20, 40, 50, 80):
        fitting = [c for c in itertools.product(range(4), repeat=3) if sum(times[i][k] for i, k in enumerate(c)) <= budget]
        if not fitting:
            with pytest.raises(Unsupported, match="the fastest levels take"):
                cheapest(errors, times, budget)
            continue
        want = min(fitting, key=lambda c: sum(errors[i][k] for i, k in enumerate(c)))
        assert cheapest(errors, times, budget) == list(want)


def test_the_budget_is_never_exceeded() -> None:
    random = np.random.default_rng(0)
    times = [np.sort(random.random(30))[::-1].tolist() for _ in range(40)]
    errors = [np.sort(random.random(30)).tolist() for _ in range(40)]
    for budget in (5.0, 10.0, 20.0):
        assert sum(of[k] for of, k in zip(times, cheapest(errors, times, budget), strict=True)) <= budget


def test_the_search_keeps_what_lowers_the_loss() -> None:
    errors, times = [[0.0, 0.1, 1.0], [0.0, 0.2, 1.0], [0.0, 0.3, 1.0]], [[4.0, 2.0, 0.0]] * 3
    tried: list[tuple[int, ...]] = []

    def loss_of(levels: Any) -> float:
        tried.append(tuple(levels))
        return float(levels[0])

    chosen, losses = search(errors, times, 8.0, loss_of, 200, 0, lambda done, total: None)
    assert tried[0] == tuple(cheapest(errors, times, 8.0)) and len(tried) == len(set(tried)) > 2
    assert tried[0][0] == 1 and chosen[0] == 0 and losses == [1.0, 0.0] and chosen == list(next(t for t in tried if t[0] == 0))
    alone, _ = search(errors, times, 8.0, loss_of, 1, 0, lambda done, total: None)
    assert alone == list(tried[0])


def hessian_of(model: Any, name: str, dampening: float) -> np.ndarray:
    """2 X Xᵀ / n and a share of the mean of its diagonal on it."""
    x = tiny.layer_inputs(model, name, CALIBRATION.ids).numpy()
    h = 2 * x.T @ x / len(x)
    return np.asarray(h + dampening * np.diag(h).mean() * np.eye(len(h)))


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_layers_of_a_model_get_least_squares_of_its_own_inputs(source: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(source).load()
    kinds = {block.name_of(kind.reads): kind for block in anatomy(model)[1:] for kind in structures(block)}
    sizes = {name: [kind.count, kind.count * 3 // 4, 1] for name, kind in kinds.items()}
    found = prune(model, CALIBRATION.ids, kinds, sizes, 0.05, lambda done, total: None)
    for name, kind in kinds.items():
        weight, hessian = kind.reads.weight.detach().double().numpy(), hessian_of(model, name, 0.05)
        assert torch.equal(found[name][0].weight, kind.reads.weight.detach())
        for level in found[name][1:]:
            width = kind.reads.in_features // kind.count
            kept = [s * width + i for s in level.kept.tolist() for i in range(width)]
            change = weight.copy()
            change[:, kept] -= level.weight.double().numpy()
            assert float(np.einsum("ri,ij,rj->", change, hessian, change)) == pytest.approx(loss(weight, hessian, kept), rel=1e-5)
            np.testing.assert_allclose(level.weight.double().numpy(), solved(weight, hessian, kept), rtol=1e-3, atol=1e-4)


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def held(counts: dict[str, list[int]], source: str) -> int:
    """Parameters of the three blocks with so many groups of heads and channels."""
    group, channel = {"llama": (8 * 64 * 6, 3 * 64), "opt": (16 * (3 * 65 + 64), 65 + 64)}[source]
    total = group * sum(counts["head_groups"]) + channel * sum(counts["channels"])
    if source == "llama":
        return total + 64 * sum(number > 0 for of in counts.values() for number in of)
    return total + 3 * (64 + 64 + 4 * 64)


@pytest.mark.parametrize(("source", "speedup"), [("llama", 1.3), ("llama", 7.0), ("opt", 2.5)])
def test_the_claim_is_what_is_loaded_and_the_promise_is_kept(
    source: str, speedup: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    claim = compressed(dense, tmp_path / "out", speedup=speedup)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    counts = {of: claim.details[f"{of}_by_block"] for of in ("head_groups", "channels")}
    removed = sum(p.numel() for p in blocks(whole).parameters()) - held(counts, source)
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - removed
    assert claim.layers == 3 and claim.format == "edited" and claim.sparsity is None
    assert claim.cache_bytes_per_token == sum(counts["head_groups"]) * (8 if source == "llama" else 16) * 2 * 4
    group, channel = {"llama": (8 * 64 * 6 * 128 + 2 * 16 * 128**2, 3 * 64 * 128), "opt": (16 * 64 * 4 * 128 + 2 * 16 * 128**2, 128 * 128)}[
        source
    ]
    spent = 256 * 64 + group * sum(counts["head_groups"]) + channel * sum(counts["channels"])
    assert claim.details["speedup_promised"] == pytest.approx((256 * 64 + 12 * group + 384 * channel) / spent)
    assert speedup <= claim.details["speedup_promised"] < 1.2 * speedup
    assert claim.details["losses"][1] <= claim.details["losses"][0]
    assert (min(*counts["head_groups"], *counts["channels"]) == 0) == (speedup == 7.0), "whole parts go where much is asked"
    if source == "opt":
        assert min(*counts["head_groups"], *counts["channels"]) > 0, "a bias would go with the last structure"
    assert counts["head_groups"][0] > 0


def test_the_cut_model_is_the_one_with_zeros(llama: DenseModel, tmp_path: Path) -> None:
    claim = compressed(llama, tmp_path / "out", speedup=7.0, candidates=1)
    model, whole = edited.load(tmp_path / "out"), llama.load()
    plan = {block.name_of(kind.reads): kind for block in anatomy(whole) for kind in structures(block)}
    sizes = {name: latency.sizes_of(kind, True) for name, kind in plan.items()}
    levels = prune(whole, CALIBRATION.ids, plan, sizes, 0.01, lambda done, total: None)
    left = {"head_groups": iter(claim.details["head_groups_by_block"]), "channels": iter(claim.details["channels_by_block"])}
    for name, kind in plan.items():
        levels[name][sizes[name].index(next(left[kind.name]))].write(kind)
    with torch.no_grad():
        got, want = (m(CALIBRATION.ids).logits for m in (model, whole))
    assert float((got - want).abs().max()) <= 1e-4


def counted(run: Any, device: str) -> float:
    """Floating-point operations in place of seconds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_what_is_timed_is_each_part_at_each_size(source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "seconds", counted)
    model = request.getfixturevalue(source).load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    (timed, rest), (products, outside) = (of(model, anatomy(model)[0], 2, 16) for of in (latency.measured, latency.products))
    products["head_groups"] = {
        size: of - 2 * 64 * 2 * 16**2 * size / 4 for size, of in products["head_groups"].items()
    }  # not counted on a CPU
    assert timed == {of: {size: 2 * number for size, number in row.items()} for of, row in products.items()}
    assert rest == pytest.approx(2 * outside, rel=0.01)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not hasattr(model, "edits")


def test_the_promise_is_by_the_measured_table(llama: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (latency, ziplm):
        monkeypatch.setattr(module, "seconds", counted)
    details = compressed(llama, tmp_path / "out", cost="latency", speedup=1.7).details
    assert 1.7 <= details["speedup_promised"] == pytest.approx(details["speedup_measured"])
    assert [size for size, _ in details["table"]["head_groups"]] == [4, 3, 2, 1, 0] and details["table"]["channels"][-1] == [0, 0.0]
    spent = [dict(map(tuple, details["table"][of]))[number] for of in details["table"] for number in details[f"{of}_by_block"]]
    whole = 3 * sum(row[0][1] for row in details["table"].values()) + details["rest"]
    assert details["speedup_promised"] == pytest.approx(whole / (sum(spent) + details["rest"]))


def test_seconds_are_seconds() -> None:
    assert 0.002 <= latency.seconds(partial(time.sleep, 0.002), "cpu") < 0.1


def test_sizes_shrink_by_tenths() -> None:
    kind = structures(anatomy(make("llama"))[0])[1]
    sizes = latency.sizes_of(kind, True)
    assert sizes == [*sorted({round(128 * 0.9**i) for i in range(43)}, reverse=True), 0] and sizes[-2] == 2
    assert latency.sizes_of(structures(anatomy(make("llama"))[0])[0], False) == [2, 1]


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        ZipLM().compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_reached_and_settings_out_of_range_are_refused(opt: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"a pass becomes \d+\.\d\d times faster at most, and not 99 times"):
        ZipLM(speedup=99, cost="products").compress(opt, CALIBRATION, tmp_path)
    for settings in ({"speedup": 1.0}, {"batch": 0}, {"length": 0}, {"candidates": 0}, {"tokens": 0}, {"dampening": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            partial(ZipLM, **settings)()


def bits(folder: Path) -> Tensor:
    return torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8)


def test_the_same_artefact_comes_twice(llama: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(llama, tmp_path / name) for name in ("one", "two"))
    assert first == second and torch.equal(bits(tmp_path / "one"), bits(tmp_path / "two"))

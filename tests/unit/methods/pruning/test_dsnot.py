"""DSnoT against a loop over rows and swaps in plain Python, bit for bit, and inside a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.statistics import Inputs
from slimbench.methods.pruning.unstructured.dsnot import Channels, DSnoT
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
PATTERNS = [None, "2:4", "4:8"]


def row_by_row(
    weight: list[float],
    gone: list[bool],
    total: list[float],
    variance: list[float],
    norm: list[float],
    error: float,
    swaps: int,
    threshold: float,
    power: float,
    run: int | None,
) -> tuple[list[bool], float, int]:
    """The swaps of one row by the authors' rule, that the error keeps its sign; in a run it must come nearer to zero besides."""
    at_first, done, positive = list(gone), 0, error > 0
    grown, left = set[int](), set[int]()
    for _ in range(swaps):
        if abs(error) <= threshold:
            break
        sign = 1.0 if error >= 0 else -1.0
        best = None
        for i in range(len(weight)):
            if at_first[i] and i not in grown and sign * weight[i] * total[i] > 0:
                value = sign * weight[i] * total[i] / max(variance[i], 1e-12) ** power
                if best is None or value > best[0]:
                    best = (value, i)
        if best is None:
            break
        i = best[1]
        least = None
        for j in range(len(weight)) if run is None else range(i // run * run, i // run * run + run):
            if not at_first[j] and j not in left and (run is not None or sign * weight[j] * total[j] < 0):
                score = float(np.float32(abs(weight[j])) * np.float32(norm[j]))
                if least is None or score < least[0]:
                    least = (score, j)
        if least is None:
            break
        j = least[1]
        then = error - weight[i] * total[i] + weight[j] * total[j]
        if not (then > 0 if positive else then < 0) or (run is not None and abs(then) >= abs(error)):
            break
        gone[i], gone[j], error, done = False, True, then, done + 1
        grown.add(i)
        left.add(j)
    return gone, error, done


def layer(seed: int, tied: bool, outputs: int = 40, inputs: int = 64) -> tuple[Tensor, Channels]:
    """A weight and channels; tied: on a coarse grid, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    total, variance = 3 * torch.randn(inputs, generator=generator), torch.rand(inputs, generator=generator) ** 2 + 0.05
    norm = torch.rand(inputs, generator=generator) * 5 + 1
    if tied:
        weight, total, variance, norm = (weight * 2).round() / 2, total.round(), torch.ones(inputs), norm.round()
    variance[7], total[7] = 0.0, 0.5
    return weight, Channels(total, variance, norm)


def first(weight: Tensor, channels: Channels, pattern: str | None, sparsity: float = 0.6) -> Tensor:
    """The mask of Wanda with NumPy."""
    scores = weight.abs().numpy() * channels.norm.numpy()
    m = int(pattern.split(":")[1]) if pattern else scores.shape[1]
    count = int(pattern.split(":")[0]) if pattern else round(sparsity * m)
    runs = scores.reshape(-1, m)
    mask = np.zeros_like(runs, dtype=bool)
    np.put_along_axis(mask, np.argsort(runs, axis=1, kind="stable")[:, :count], True, axis=1)
    return torch.from_numpy(mask.reshape(scores.shape))


def lost(weight: Tensor, mask: Tensor, channels: Channels) -> Tensor:
    return (weight.double() * channels.total.double() * mask).sum(1)


def method(pattern: str | None = None, **settings: Any) -> DSnoT:
    return DSnoT(**({"sparsity": 0.5 if pattern else 0.6, "pattern": pattern} | settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [{}, {"swaps": 3}, {"power": 0.0, "threshold": 0.0}, {"power": 0.5, "threshold": 4.0}])
def test_masks_are_those_of_a_loop_over_rows(settings: dict[str, Any], pattern: str | None, tied: bool) -> None:
    weight, channels = layer(3, tied)
    mask, chosen = first(weight, channels, pattern), method(pattern, **settings)
    error = lost(weight, mask, channels)
    got = chosen.refine(weight, mask.clone(), channels, error)
    run = int(pattern.split(":")[1]) if pattern else None
    total, variance, norm = (vector.double().tolist() for vector in channels)
    for row in range(len(weight)):
        values, gone = weight[row].double().tolist(), mask[row].tolist()
        rule = (chosen.swaps, chosen.threshold, chosen.power, run)
        want, left, swaps = row_by_row(values, gone, total, variance, norm, float(error[row]), *rule)
        assert got.mask[row].tolist() == want
        assert int(got.swaps[row]) == swaps and float(got.error[row]) == pytest.approx(left, abs=1e-9)
    assert int(got.swaps.max()) > 1 and int(got.swaps.max()) <= chosen.swaps


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_and_runs_keep_their_counts_and_the_error_falls(pattern: str | None) -> None:
    weight, channels = layer(5, False, 300, 128)
    mask = first(weight, channels, pattern)
    error = lost(weight, mask, channels)
    got = method(pattern).refine(weight, mask, channels, error)
    assert torch.equal(got.mask.sum(1), mask.sum(1)) and not torch.equal(got.mask, mask)
    if pattern:
        m = int(pattern.split(":")[1])
        assert torch.equal(got.mask.unflatten(1, (-1, m)).sum(-1), mask.unflatten(1, (-1, m)).sum(-1))
    torch.testing.assert_close(got.error, lost(weight, got.mask, channels), rtol=0, atol=1e-9)
    touched = got.swaps > 0
    assert torch.equal(touched, (got.mask != mask).any(1)) and float(touched.float().mean()) > 0.5
    assert bool((got.error.abs() < error.abs())[touched].all()) and float(got.error.abs().sum()) < 0.5 * float(error.abs().sum())
    assert torch.equal(got.error.sign(), error.sign())
    assert torch.equal(2 * got.swaps, (got.mask != mask).sum(1)), "what has changed does not change back"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_that_has_stopped_swaps_no_more(pattern: str | None) -> None:
    weight, channels = layer(6, False)
    mask = first(weight, channels, pattern)
    error, before = lost(weight, mask, channels), mask
    stopped = torch.zeros(len(weight), dtype=torch.bool)
    for swaps in range(1, 30):
        now = method(pattern, swaps=swaps).refine(weight, mask, channels, error).mask
        same = (now == before).all(1)
        assert bool(same[stopped].all())
        stopped, before = stopped | same, now
    assert bool(stopped.all())


@pytest.mark.parametrize(
    ("pattern", "weight", "gone", "left"),
    [
        (None, [4.0, 3.0, -6.0, 0.5], {0, 3}, 4.5),  # 0 for 2 would give 4.5 - 4 - 6: nothing is swapped
        (None, [4.0, 3.0, -0.2, 0.5], {2, 3}, 0.3),  # 0 for 2: 4.5 - 4 - 0.2; nothing negative is left
        ("2:4", [4.0, 3.0, -6.0, 0.5], {1, 3}, 3.5),  # 0 for 1: 4.5 - 4 + 3; then 3 for 2 would give -3
        ("2:4", [4.0, 9.0, 8.0, 0.5], {0, 3}, 4.5),  # 0 for 2 would give 4.5 - 4 + 8, of the same sign but further away
    ],
)
def test_a_row_by_hand(pattern: str | None, weight: list[float], gone: set[int], left: float) -> None:
    ones, mask = torch.ones(4), torch.tensor([[True, False, False, True]])
    for sign in (1, -1):
        error = torch.tensor([sign * 4.5], dtype=torch.float64)
        got = method(pattern).refine(sign * torch.tensor([weight]), mask, Channels(ones, ones, ones), error)
        assert set(got.mask[0].nonzero().flatten().tolist()) == gone and float(got.error) == pytest.approx(sign * left)


def test_in_a_run_the_scores_of_the_first_mask_say_what_leaves() -> None:
    weight, channels = layer(4, False)
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(7))
    mask, chosen = method("2:4").first_mask(scores), method("2:4", swaps=1)
    error = lost(weight, mask, channels)
    got = chosen.refine(weight, mask, channels, error, scores)
    went = (got.mask & ~mask).nonzero().tolist()
    assert len(went) > 5
    for row, j in went:
        run = range(j // 4 * 4, j // 4 * 4 + 4)
        assert float(scores[row, j]) == min(float(scores[row, k]) for k in run if not mask[row, k])
    assert not torch.equal(got.mask, chosen.refine(weight, mask, channels, error).mask)


def test_a_row_that_is_good_enough_is_left_alone() -> None:
    weight, channels = layer(8, False)
    mask = first(weight, channels, None)
    error = lost(weight, mask, channels)
    middle = float(error.abs().median())
    got = method(threshold=middle).refine(weight, mask, channels, error)
    assert not bool(got.swaps[error.abs() <= middle].any()) and bool(got.swaps[error.abs() > middle].any())


def test_rows_do_not_depend_on_how_many_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, channels = layer(9, False)
    mask = first(weight, channels, None)
    whole = method().refine(weight, mask, channels, lost(weight, mask, channels))
    monkeypatch.setattr("slimbench.methods.pruning.unstructured.dsnot._ROWS", 7)
    parts = method().refine(weight, mask, channels, lost(weight, mask, channels))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("start", ["wanda", "sparsegpt", "magnitude"])
def test_the_first_mask_is_that_of_its_method(start: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator) * torch.linspace(0.2, 3, 32)
    x[:, 5] = 0
    weight = torch.randn(12, 32, generator=generator)
    seen = Inputs(x[0], x[0], *torch.zeros(2, 32))
    for batch in x.split(150):
        seen.add(batch, gram=True)
    h = (x.double().T @ x.double()).numpy() / 400
    h[5, 5] = 1
    inverse = np.linalg.inv(h + 0.01 * np.trace(h) / 32 * np.eye(32))
    upper = np.linalg.cholesky(inverse).T
    scores = {
        "wanda": np.abs(weight.numpy()) * np.linalg.norm(x.numpy(), axis=0),
        "magnitude": np.abs(weight.numpy()),
        "sparsegpt": (weight.double().numpy() / upper.diagonal()) ** 2,
    }[start]
    if start == "sparsegpt":
        scores[:, 5] = 0
    for sparsity, pattern in ((0.6, None), (0.5, "2:4")):
        chosen = DSnoT(start=start, sparsity=sparsity, pattern=pattern)
        got = chosen.first_mask(chosen.first_scores(weight, seen))
        m = 4 if pattern else 32
        for row, gone in zip(scores.reshape(-1, m), got.numpy().reshape(-1, m), strict=True):
            assert row[gone].max() <= row[~gone].min()
        assert int(got.sum()) == round(sparsity * weight.numel())
        assert int(got.sum(1).max() - got.sum(1).min()) <= 1


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """In float32, with inputs whose means are not zero."""
    folder = tmp_path_factory.mktemp("dense")
    dense = tiny.save_model(folder, "float32", num_hidden_layers=3)
    model, generator = dense.load(), torch.Generator().manual_seed(4)
    model.model.embed_tokens.weight.data += 0.01 * torch.randn(64, generator=generator)
    model.save_pretrained(folder)
    return dense


def compressed(chosen: DSnoT, dense: DenseModel, out: Path) -> tuple[Any, dict[str, Tensor]]:
    """The claim and the weights of an artefact."""
    out.mkdir()
    claim = chosen.compress(dense, CALIBRATION, out)
    return claim, {name: layer.weight.detach() for name, layer in tiny.block_layers(tiny.dense_model(out, "float32").load()).items()}


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_attention_of_a_model_is_refined_and_nothing_else(dense: DenseModel, tmp_path: Path, pattern: str | None) -> None:
    chosen = method(pattern)
    claim, got = compressed(chosen, dense, tmp_path / "out")
    model, sample, touched = dense.load(), len(CALIBRATION.ids), 0
    for name, weight in tiny.block_layers(model).items():
        gone, whole = got[name] == 0, weight.weight.detach()
        assert torch.equal(got[name][~gone], whole[~gone]), "no weight is updated"
        assert int(gone.sum()) == round(chosen.sparsity * gone.numel()) and int(gone.sum(1).max() - gone.sum(1).min()) <= 1
        if pattern:
            assert bool((gone.unflatten(1, (-1, 4)).sum(-1) == 2).all())
        if ".layers.0." not in name:
            continue
        x = tiny.layer_inputs(model, name, CALIBRATION.ids)
        channels = Channels(x.sum(0).float() / sample, x.var(0, unbiased=False).float(), x.norm(dim=0).float())
        mask = chosen.first_mask(chosen.first_scores(whole, statistics(x)))
        changed = int((gone != mask).sum())
        touched += changed
        assert (changed > 0) == ("self_attn" in name)
        if "self_attn" in name:
            want = chosen.refine(whole, mask, channels, lost(whole, mask, channels)).mask
            assert float((want == gone).float().mean()) > 0.999, "statistics differ in their last digits"
    assert claim.sparsity == pytest.approx(chosen.sparsity, abs=1e-4) and claim.pattern == pattern
    assert 2 * claim.details["swaps"] > touched > 0 and claim.details["error_left"] < 0.7 and claim.details["rows_changed"] > 0.3


def statistics(x: Tensor) -> Inputs:
    seen = Inputs(*torch.zeros(4, x.shape[1]))
    seen.add(x, gram=True)
    return seen


@pytest.mark.parametrize("start", ["wanda", "sparsegpt", "magnitude"])
def test_all_layers_or_the_mlp_alone_can_be_refined(dense: DenseModel, tmp_path: Path, start: Any) -> None:
    _, everywhere = compressed(method(start=start, refined="all", threshold=0.0), dense, tmp_path / "all")
    _, mlp = compressed(method(start=start, refined="mlp", threshold=0.0), dense, tmp_path / "mlp")
    _, attention = compressed(method(start=start, threshold=0.0), dense, tmp_path / "attention")
    for name in everywhere:
        if ".layers.0." in name:
            other, same = (mlp, attention) if "self_attn" in name else (attention, mlp)
            assert torch.equal(everywhere[name], same[name]) and not torch.equal(everywhere[name], other[name])


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_mask_of_an_earlier_step_is_refined_with_the_dense_weights(dense: DenseModel, tmp_path: Path, pattern: str | None) -> None:
    (first_step := tmp_path / "first").mkdir()
    Magnitude(sparsity=0.5, pattern=pattern).compress(dense, CALIBRATION, first_step)
    model = tiny.dense_model(first_step, "float32").load()
    for layer in tiny.block_layers(model).values():
        layer.weight.data *= 1.03  # as an update of what remains
    model.save_pretrained(first_step)
    pruned = tiny.dense_model(first_step, "float32", original=dense.path)
    chosen = DSnoT(start=None, sparsity=0.5, pattern=pattern, refined="all", threshold=0.01)
    claim, got = compressed(chosen, pruned, tmp_path / "out")
    whole, sparse = tiny.block_layers(dense.load()), tiny.block_layers(model)
    for name, weight in got.items():
        before, after, original = sparse[name].weight == 0, weight == 0, whole[name].weight
        assert torch.equal(before.sum(1), after.sum(1))
        assert torch.equal(weight[~before & ~after], sparse[name].weight[~before & ~after])
        assert torch.equal(weight[before & ~after], original[before & ~after])
        if ".layers.0." in name and "q_proj" in name:
            x = tiny.layer_inputs(model, name, CALIBRATION.ids)
            errors = [((original - w).double() @ x.sum(0) / len(CALIBRATION.ids)).abs() for w in (sparse[name].weight, weight)]
            touched = (before != after).any(1)
            assert (
                bool(touched.any())
                and bool((errors[1] < errors[0])[touched].all())
                and torch.equal(errors[1][~touched], errors[0][~touched])
            )
        if pattern:
            assert bool((after.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert claim.sparsity == pytest.approx(0.5, abs=1e-4) and claim.details["error_left"] < 1


def test_a_mask_comes_from_one_place_alone(dense: DenseModel, tmp_path: Path) -> None:
    (first_step := tmp_path / "first").mkdir()
    Magnitude(sparsity=0.5).compress(dense, CALIBRATION, first_step)
    pruned = tiny.dense_model(first_step, "float32", original=dense.path)
    for chosen, source, message in (
        (DSnoT(), pruned, "an earlier step left 50.0% zeros: they are the first mask with start: null, not wanda's"),
        (DSnoT(start=None), dense, "no step of the pipeline has pruned before this one"),
        (DSnoT(start=None), replace(dense, original=dense.path), "an earlier step left 0.0% zeros where sparsity says 50.0%"),
        (DSnoT(start=None, sparsity=0.6), pruned, "an earlier step left 50.0% zeros where sparsity says 60.0%"),
        (DSnoT(start=None, pattern="2:4"), pruned, "an earlier step left zeros that are not 2:4"),
    ):
        with pytest.raises(Unsupported, match=message) as caught:
            chosen.compress(source, CALIBRATION, tmp_path)
        assert "\n" not in str(caught.value)


def test_sizes_that_an_earlier_step_changed_are_refused(dense: DenseModel, tmp_path: Path) -> None:
    (first_step := tmp_path / "first").mkdir()
    other = tiny.save_model(tmp_path / "other", "float32", num_hidden_layers=3, intermediate_size=160)
    Magnitude(sparsity=0.5).compress(dense, CALIBRATION, first_step)
    with pytest.raises(Unsupported, match="an earlier step changed the sizes of layers"):
        DSnoT(start=None).compress(tiny.dense_model(first_step, "float32", original=other.path), CALIBRATION, tmp_path)


def test_opt_is_pruned_and_keeps_its_biases(tmp_path: Path) -> None:
    model = make("opt")
    source = tiny.saved(model, tmp_path / "source")
    claim, got = compressed(method(), source, tmp_path / "out")
    biases = {name: layer.bias for name, layer in tiny.block_layers(tiny.dense_model(tmp_path / "out", "float32").load()).items()}
    assert all(torch.equal(bias, tiny.block_layers(model)[name].bias) for name, bias in biases.items())
    assert all(int((weight == 0).sum()) == round(0.6 * weight.numel()) for weight in got.values())
    assert claim.details["swaps"] > 0
    again, same = compressed(method(), source, tmp_path / "again")
    assert again == claim and all(torch.equal(weight, same[name]) for name, weight in got.items())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("mixtral", "holds 4 experts in one tensor; only linear layers can be handled"), ("phi", "PhiDecoderLayer is not built like Llama")],
)
def test_other_decoders_are_refused(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        DSnoT().compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swaps": 0}, "swaps must be at least 1"),
        ({"threshold": -1}, "threshold must not be negative"),
        ({"power": math.nan}, "power must not"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSnoT(**settings)

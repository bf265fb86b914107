"""ISC against slow transcriptions of its paper: curvature of the loss, shares of layers, saliency and update, and inside a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.pruning.second_order.isc import MixedSaliency, mean_traces, reconstruct
from tests.support import tiny
from tests.unit.methods.pruning.test_obs import CALIBRATION, Net, compressed, ids, quadratic, silent


def test_mean_traces_are_hutchinsons_with_one_draw_for_each_sample() -> None:
    net: Any = Net(5, 6, 4).double()
    samples = ids(7)
    layers = dict(zip("ab", net.layers, strict=True))
    got = mean_traces(net, layers, samples, 11, silent)
    generator, want = torch.Generator().manual_seed(11), np.zeros(2)
    weights = [layer.weight.detach() for layer in layers.values()]

    def loss_of(sample: Tensor) -> Any:
        def loss(first: Tensor, second: Tensor) -> Tensor:
            hidden = torch.tanh(torch.tanh(net.embedding(sample) @ first.T) @ second.T)
            return -net.head(hidden)[:-1].log_softmax(-1).gather(1, sample[1:, None]).mean()

        return loss

    for sample in samples:
        z = [torch.randn(weight.shape, generator=generator).double().flatten() for weight in weights]
        rows: Any = torch.autograd.functional.hessian(loss_of(sample), tuple(weights))
        full = [[part.reshape(weights[i].numel(), -1) for part in row] for i, row in enumerate(rows)]
        for i in range(2):
            want[i] += float(z[i] @ sum(full[i][j] @ z[j] for j in range(2))) / len(samples) / weights[i].numel()
    np.testing.assert_allclose([*got.values()], want, rtol=1e-4)


@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.1), (0.7, 0.2)])
def test_the_more_sensitive_a_layer_the_more_it_keeps(sparsity: float, spread: float) -> None:
    sensitivity = {"a": 3.0, "b": -1.0, "c": 7.0, "d": 0.5, "e": 3.0}
    total_weight = sorted(sensitivity.values())
    low = 1 - sparsity - spread
    high = 2 * (1 - sparsity) - low
    want = {name: 1 - (low + sum(other < value for other in total_weight) * (high - low) / 4) for name, value in sensitivity.items()}
    got = MixedSaliency(sparsity=sparsity, spread=spread).shares(sensitivity)
    assert got == pytest.approx(want) and max(got.values()) - min(got.values()) == pytest.approx(2 * spread)
    assert max(got, key=lambda name: got[name]) == "b"


def column_by_column(weight: np.ndarray, h: np.ndarray, zeros: int, dampening: float) -> np.ndarray:
    """ISC and the update of the paper, with the inverse of what is left of H for each input."""
    w, inputs = weight.copy(), len(h)
    damped = h + dampening * h.diagonal().mean() * np.eye(inputs)
    for begin in range(0, inputs, 128):
        end = min(begin + 128, inputs)
        inverse_diagonal = np.array([np.linalg.inv(damped[m:, m:])[0, 0] for m in range(begin, end)])
        scores = w[:, begin:end] ** 2 * (h.diagonal()[begin:end] + 1 / inverse_diagonal)
        count = zeros * end // inputs - zeros * begin // inputs
        mask = np.zeros(scores.size, dtype=bool)
        mask[np.argsort(scores.ravel(), kind="stable")[:count]] = True
        for m in range(begin, end):
            inverse = np.linalg.inv(damped[m:, m:])
            for row in np.flatnonzero(mask.reshape(scores.shape)[:, m - begin]):
                w[row, m:] -= w[row, m] / inverse[0, 0] * inverse[:, 0]
                w[row, m] = 0
    return w


@pytest.mark.parametrize(("outputs", "inputs", "zeros"), [(6, 40, 131), (5, 150, 402)])
def test_isc_adds_both_saliencies_and_makes_up_for_what_goes(outputs: int, inputs: int, zeros: int) -> None:
    weight, matrices = quadratic(outputs, inputs, 1)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    strengths = torch.logspace(-0.7, 0.7, inputs)[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    h = (matrices[0] * strengths * strengths[:, None]).float()
    got = reconstruct(weight, h, zeros, 0.01)
    want = column_by_column(weight.double().numpy(), h.double().numpy(), zeros, 0.01)
    assert int((got == 0).sum()) == zeros and np.array_equal(got.numpy() == 0, want == 0)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-2, atol=1e-3)


def test_isc_takes_silent_inputs_first() -> None:
    h = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    got = reconstruct(torch.tensor([[0.1, 9.0, 0.2, 0.3], [0.1, 9.0, 0.2, 0.3]]), h, 2, 0.01)
    assert (got == 0).tolist() == [[False, True, False, False]] * 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def test_isc_spreads_an_exact_budget_over_the_layers(dense: DenseModel, tmp_path: Path) -> None:
    method = MixedSaliency(sparsity=0.6, samples=4)
    claim, got = compressed(method, dense, tmp_path)
    model = dense.load()
    layers = tiny.block_layers(model)
    shares = method.shares(mean_traces(model, layers, CALIBRATION.ids[:4], 0, silent))
    sizes = {name: weight.numel() for name, weight in got.items()}
    found = {name: float((weight == 0).float().mean()) for name, weight in got.items()}
    moved = {found[name] - shares[name] for name in found}
    assert max(moved) - min(moved) < 1e-3 and max(found.values()) - min(found.values()) == pytest.approx(0.2, abs=1e-3)
    assert claim.sparsity == round(0.6 * sum(sizes.values())) / sum(sizes.values())
    assert claim.details["layer_sparsity"] == {name: pytest.approx(share, abs=1e-4) for name, share in found.items()}
    other, _ = compressed(method, replace(dense, seed=1), tmp_path / "other")
    assert other.details["layer_curvature"] != claim.details["layer_curvature"]

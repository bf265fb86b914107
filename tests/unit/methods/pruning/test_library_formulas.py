"""Wanda and SparseGPT, which a library computes, against loops over what the papers define; loops with one fault are told from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slimbench.methods.base import DenseModel, Method
from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT
from slimbench.methods.pruning.unstructured.wanda import Wanda
from tests.support import tiny

pytest.importorskip("llmcompressor")

Matrix = NDArray[np.float64]
CALIBRATION = tiny.tokens(samples=8, length=32)
BLOCK = 32
FAULTS = ("sign", "axis", "index")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=1)


def wanda(weight: Matrix, x: Matrix, sparsity: float, fault: str = "") -> Matrix:
    """|W_ij| ‖X_j‖₂, the lowest of each output go (arXiv 2306.11695, equation 1)."""
    norms = [math.sqrt(sum(value**2 for value in x[:, j])) for j in range(x.shape[1])]
    if fault == "index":
        norms = norms[1:] + norms[:1]
    scores = np.array([[abs(weight[i, j]) * norms[j] for j in range(weight.shape[1])] for i in range(weight.shape[0])])
    scores = -scores if fault == "sign" else scores
    left = weight.copy()
    lines = zip(scores.T, left.T, strict=True) if fault == "axis" else zip(scores, left, strict=True)
    for line, kept in lines:
        for place in sorted(range(len(line)), key=lambda place: line[place])[: int(len(line) * sparsity)]:
            kept[place] = 0.0
    return left


def sparsegpt(weight: Matrix, x: Matrix, sparsity: float, fault: str = "") -> Matrix:
    """Columns from the first to the last, each with the inverse of the Hessian of those that follow (arXiv 2301.00774, algorithm 1).

    Of each run of columns those of the lowest w² / [H⁻¹] go, over all rows; the error of what goes is made up for by the columns after it.
    """
    hessian = 2 * x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    left = weight.copy()
    for first in range(0, weight.shape[1], BLOCK):
        columns = range(first, first + BLOCK)
        curves = [inverses[min(j + (fault == "index"), len(inverses) - 1)][0, 0] for j in columns]
        scores = left[:, columns] ** 2 / np.array(curves)
        if fault == "axis":
            gone = scores <= np.quantile(scores, sparsity, axis=1, keepdims=True)
        else:
            gone = scores <= np.sort(scores, axis=None)[int(scores.size * sparsity)]
        for place, j in enumerate(columns):
            for i in np.flatnonzero(gone[:, place]):
                error = left[i, j] / inverses[j][0, 0]
                left[i, j:] -= (-error if fault == "sign" else error) * inverses[j][0]
                left[i, j] = 0.0
    return left


@pytest.mark.parametrize(
    ("method", "formula"),
    [(Wanda(sparsity=0.6), wanda), (SparseGPT(sparsity=0.6, block_size=BLOCK), sparsegpt)],
    ids=["wanda", "sparsegpt"],
)
def test_every_layer_is_pruned_as_the_paper_says(method: Method, formula: Any, dense: DenseModel, tmp_path: Path) -> None:
    method.compress(dense, CALIBRATION, tmp_path)
    made, model = tiny.block_layers(tiny.dense_model(tmp_path, "float32").load()), dense.load()
    far = dict.fromkeys(("", *FAULTS), 0.0)
    for name, layer in tiny.block_layers(model).items():
        weight, x = layer.weight.detach().double().numpy(), tiny.layer_inputs(model, name, CALIBRATION.ids).numpy()
        found = made[name].weight.detach().double().numpy()
        for fault in far:
            wanted = formula(weight, x, 0.6, fault)
            apart = float((np.abs(found - wanted) > 1e-3 * np.abs(weight).max()).mean())
            far[fault] = max(far[fault], apart)
    assert far[""] <= 0.005, "a score in a thousand may tie"
    assert all(far[fault] > 0.05 for fault in FAULTS), far

"""Projections of Linformer: what is minimised, that it falls in every layer, and that the artefact computes with what was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.compact.pooled_attention import BPTransformer, Combiner, Linformer
from slimbench.methods.core.learning import trained
from slimbench.methods.core.learning.states import attention_states
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.pooled import Pooled
from tests.support import tiny

METHOD = Linformer(steps=40, batch_size=4, length=32, block=8, summaries=2, learning_rate=0.02)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def rotation(width: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)


def turned(states: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
    """States [T, D] at positions [T], or rotated ones brought back to none."""
    cosines, sines = rotation(states.shape[1], -positions if back else positions)
    low, high = states.chunk(2, 1)
    return states * cosines + torch.cat([-high, low], 1) * sines


def errors(model: Any, method: Linformer, parameters: Any, ids: torch.Tensor) -> list[float]:
    """Of each layer the squared error, from the rotated queries and keys of the model as it is, one head after the other."""
    found, places, block = [], torch.arange(ids.shape[1]), method.block
    stretch = block // method.summaries
    whole = ids.shape[1] // block
    middles = torch.arange(whole * method.summaries) * stretch + stretch // 2
    with torch.no_grad(), attention_states(model, [0, 1]) as states:
        model(input_ids=ids, use_cache=False)
        for layer in (0, 1):
            query, key, value = states.queries[layer], states.keys[layer], states.values[layer]
            e, f = (parameters[f"{layer}.{which}"].double() for which in ("keys", "values"))
            total, count = 0.0, 0
            for row in range(len(ids)):
                for head in range(query.shape[1]):
                    group = head // (query.shape[1] // key.shape[1])
                    q, k, v = query[row, head].double(), key[row, group].double(), value[row, group].double()
                    products = q @ k.T / q.shape[1] ** 0.5
                    before = places[None] <= places[:, None]
                    exact = products.masked_fill(~before, -torch.inf).softmax(1) @ v
                    flat = turned(k, places, back=True)
                    old_k = turned(torch.cat([e @ part for part in flat[: whole * block].split(block)]), middles)
                    old_v = torch.cat([f @ part for part in v[: whole * block].split(block)])
                    own = before & (places[None] // block == places[:, None] // block)
                    earlier = middles[None] // block < places[:, None] // block
                    summed = (q @ old_k.T / q.shape[1] ** 0.5).masked_fill(~earlier, -torch.inf)
                    weights = torch.cat([summed, products.masked_fill(~own, -torch.inf)], 1).softmax(1)
                    total += float((weights @ torch.cat([old_v, v]) - exact).square().sum())
                    count += exact.numel()
            found.append(total / count)
    return found


def test_the_loss_is_that_of_the_layers_and_training_lowers_it_in_each(dense: DenseModel, tmp_path: Path) -> None:
    model, ids = trained.load(dense), tiny.tokens(samples=8, length=32).ids
    fixed, before = METHOD.begin(model, ids)
    wanted = errors(model, METHOD, before, ids)
    learned = {name: torch.nn.Parameter(part) for name, part in before.items()}
    assert [float(error) for error in METHOD.errors(model, fixed, learned)(ids)] == pytest.approx(wanted, rel=1e-3)
    claim = METHOD.compress(dense, Calibration(ids, "tiny"), tmp_path)
    made: Any = policies.read(tmp_path)[0][0]
    assert made == Pooled("projection", 8, 2) and set(made.weights) == set(before)
    held_out = tiny.tokens(samples=4, length=32, seed=9).ids
    better, averaged = (errors(model, METHOD, weights, held_out) for weights in (made.weights, before))
    assert all(late < early for late, early in zip(better, averaged, strict=True))
    assert claim.training_tokens == 40 * 4 * 32 and claim.trained_parameters == 2 * 2 * 2 * 8
    assert claim.parameters == sum(part.numel() for part in model.parameters()) + 2 * 2 * 2 * 8


def test_the_artefact_attends_with_what_was_learned(dense: DenseModel, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=4, length=32).ids
    for folder, steps in (("one", 1), ("many", 40)):
        (tmp_path / folder).mkdir()
        replace(METHOD, steps=steps).compress(dense, Calibration(ids, "tiny"), tmp_path / folder)
    plain = TransformersModel(dense.load(), "cpu").logits(ids)
    one, many = (TransformersModel(policies.load(tmp_path / folder), "cpu").logits(ids) for folder in ("one", "many"))
    assert float((many - plain).square().mean()) < float((one - plain).square().mean())


@pytest.mark.parametrize("method", [Combiner(block=8), BPTransformer(spans=2)])
def test_an_artefact_without_tensors_is_the_policy_alone(dense: DenseModel, tmp_path: Path, method: Any) -> None:
    method.compress(dense, Calibration.none(), tmp_path)
    assert policies.read(tmp_path)[0] == [method.policy()]
    ids = tiny.tokens(samples=2, length=32).ids
    model = TransformersModel(policies.load(tmp_path), "cpu")
    assert not torch.allclose(model.logits(ids), TransformersModel(dense.load(), "cpu").logits(ids), atol=1e-3)


@pytest.mark.parametrize("settings", [{"length": 32}, {"block": 8, "summaries": 3}, {"block": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Linformer(**settings)


def test_spans_are_refused_by_their_own_name() -> None:
    with pytest.raises(ValueError, match="spans must be at least 1, not 0"):
        BPTransformer(spans=0)

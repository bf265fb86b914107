"""Attention transfer: what is minimised, that it falls in every layer, and that the artefact computes with what was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.claims import cache_bytes_per_token
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.compact.attention_span import AdaptiveSpan
from slimbench.methods.compact.entmax_attention import EntmaxAttention
from slimbench.methods.compact.latent_attention import LatentAttention
from slimbench.methods.compact.linear_attention import LearnedLinear, Performer
from slimbench.methods.compact.pooled_attention import Linformer
from slimbench.methods.core.learning import trained
from slimbench.methods.core.learning.states import attention_states
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.linear import Linear
from tests.support import tiny
from tests.support.policies import watched

METHOD = LearnedLinear(steps=40, batch_size=4, length=32, window=4, learning_rate=0.02)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def errors(model: Any, method: LearnedLinear, parameters: Any, ids: torch.Tensor) -> list[float]:
    """Of each layer the squared error, with scores and results written out for one head after the other."""
    found = []
    with torch.no_grad(), attention_states(model, [0, 1]) as states:
        model(input_ids=ids, use_cache=False)
        for layer in (0, 1):
            query, key, value = states.queries[layer], states.keys[layer], states.values[layer]
            total, count = 0.0, 0
            for row in range(len(ids)):
                for head in range(query.shape[1]):
                    group = head // (query.shape[1] // key.shape[1])
                    q, k, v = query[row, head].double(), key[row, group].double(), value[row, group].double()
                    products = q @ k.T / q.shape[1] ** 0.5
                    before = torch.ones_like(products).tril() > 0
                    exact = products.masked_fill(~before, -torch.inf).softmax(1) @ v
                    maps = [parameters[f"{layer}.{which}"][head].double() for which in ("query", "key")]
                    f_q, f_k = (torch.cat([(x @ m).softmax(1), (-x @ m).softmax(1)], 1) for x, m in zip((q, k), maps, strict=True))
                    near = before & (torch.ones_like(products).tril(-method.window) == 0)
                    soft = products.masked_fill(~near, -torch.inf)
                    soft = torch.sigmoid(parameters[f"{layer}.gate"][head].double()) * (soft - soft.amax(1, keepdim=True)).exp()
                    weights = soft + (f_q @ f_k.T).masked_fill(near | ~before, 0)
                    total += float(((weights / weights.sum(1, keepdim=True)) @ v - exact).square().sum())
                    count += exact.numel()
            found.append(total / count)
    return found


def test_the_loss_is_the_papers_and_training_lowers_it_in_every_layer(dense: DenseModel, tmp_path: Path) -> None:
    model = trained.load(dense)
    ids = tiny.tokens(samples=8, length=32).ids
    fixed, before = METHOD.begin(model, ids)
    wanted = errors(model, METHOD, before, ids)
    learning = {name: torch.nn.Parameter(part) for name, part in before.items()}
    assert [float(error) for error in METHOD.errors(model, fixed, learning)(ids)] == pytest.approx(wanted, rel=1e-3)
    claim = METHOD.compress(dense, Calibration(ids, "tiny"), tmp_path)
    after = policies.read(tmp_path)[0][0].maps  # type: ignore[attr-defined]
    held_out = tiny.tokens(samples=4, length=32, seed=9).ids
    learned = errors(model, METHOD, after, held_out)
    assert all(late < early for late, early in zip(learned, errors(model, METHOD, before, held_out), strict=True))
    assert claim.details["error_before"] == pytest.approx(errors(model, METHOD, before, ids[:4]), rel=1e-3)
    assert claim.details["error_after"] == pytest.approx(errors(model, METHOD, after, ids[:4]), rel=1e-3)
    assert claim.details["converted_layers"] == 2 and claim.details["training"]["loss_after"]
    assert claim.training_tokens == 40 * 4 * 32 and claim.trained_parameters == 2 * (2 * 4 * 16 * 16 + 4)


def test_learning_begins_where_the_papers_do(dense: DenseModel) -> None:
    model, ids = trained.load(dense), tiny.tokens(samples=1, length=32).ids
    _, first = METHOD.begin(model, ids)
    assert torch.allclose(torch.sigmoid(first["0.gate"]), torch.tensor(0.1)), "LoLCATs' weight of the window"
    _, relu = LearnedLinear(feature="relu", window=0).begin(model, ids)
    assert set(relu) == {f"{layer}.{which}{part}" for layer in (0, 1) for which in ("query", "key") for part in ("", "_bias")}
    assert torch.equal(relu["0.query_bias"], torch.zeros(4, 16))


LEARNED = (LearnedLinear, LatentAttention, Linformer, AdaptiveSpan, EntmaxAttention)


@pytest.mark.parametrize("kind", LEARNED)
def test_attentions_learn_from_texts_of_useful_length_and_short_runs_are_known(kind: Any) -> None:
    assert kind().length == 512 and kind.least_steps == 1000


@pytest.mark.parametrize("window", [0, 255, 256, 300])
def test_what_a_further_token_takes_is_claimed_where_a_state_is_there_before_it(dense: DenseModel, window: int) -> None:
    """Claims are held on caches of 256 and of 512 tokens; a window that has lost none by the first has no state there."""
    method = LearnedLinear(window=window)
    model: Any = dense.load()
    model.config.max_position_embeddings = 1024
    _, maps = method.begin(model, torch.zeros(1, 8, dtype=torch.int64))
    Linear(method.feature, window, maps=maps).install(model)
    taken, claimed = cache_bytes_per_token(TransformersModel(model, "cpu")), method.cache_numbers(model)
    assert (claimed is None) == (window > 255) and (claimed is not None or taken)
    assert claimed is None or taken == claimed == 0


def test_a_window_over_whole_texts_of_training_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be below the length of 64 tokens"):
        LearnedLinear(length=64, window=64)
    with pytest.raises(ValueError, match="features must be at least 1, not 0"):
        Performer(features=0)


@pytest.mark.parametrize("kind", [LearnedLinear, LatentAttention, Linformer])
def test_a_loss_that_would_do_nothing_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="loss must be 'distillation'"):
        kind(loss="nll")


def test_the_artefact_attends_with_what_was_learned(dense: DenseModel, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=4, length=32).ids
    for folder, steps in (("one", 1), ("many", 40)):
        (tmp_path / folder).mkdir()
        replace(METHOD, steps=steps).compress(dense, Calibration(ids, "tiny"), tmp_path / folder)
    plain = TransformersModel(dense.load(), "cpu").logits(ids)
    loaded = [TransformersModel(policies.load(tmp_path / folder), "cpu") for folder in ("one", "many")]
    calls = [watched(model) for model in loaded]
    one, many = (model.logits(ids) for model in loaded)
    layers = loaded[0].module.config.num_hidden_layers
    assert [own.count("operator") for own in calls] == [layers, layers], "no layer was left as it was"
    assert float((many - plain).square().mean()) < float((one - plain).square().mean())

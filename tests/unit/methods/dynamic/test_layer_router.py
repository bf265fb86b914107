"""Routers that learn: the loss with its gates, the share that comes out, and that the artefact skips what training skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.core.learning import trained
from slimbench.methods.dynamic.layer_router import Gates, LayerRouter, lengths
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.router import Router
from slimbench.methods.work import Work
from tests.support import tiny

BLOCKS = 4
METHOD = LayerRouter(share=0.6, steps=60, batch_size=4, length=32, learning_rate=0.05)
CALIBRATION = Calibration(tiny.tokens(samples=8, length=32).ids, "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=BLOCKS)


def drawn(model: Any) -> Gates:
    """Routers that let some tokens in and others not."""
    gates, draw = Gates(model, 0.5, CALIBRATION.ids[:4]), torch.Generator().manual_seed(3)
    for name, value in gates.learned.items():
        value.data = torch.randn(64, generator=draw) if name.endswith("weight") else torch.zeros(1)
    return gates


def test_the_loss_is_that_of_the_routed_model_and_of_the_share(dense: DenseModel) -> None:
    model = trained.load(dense)
    gates, ids = drawn(model), CALIBRATION.ids[:1]
    loss = replace(METHOD, loss="nll", penalty=3.0)._loss(model, gates, dense)(ids)
    deployed: Any = trained.load(dense)
    Router(0.5, gates.routers()).install(deployed)
    with torch.no_grad():
        logs = deployed(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    text = -logs[:, :-1].gather(2, ids[:, 1:, None]).mean()
    ran = [count / 32 for count in deployed.model.routed.ran]
    assert float(loss.detach()) == pytest.approx(float(text) + 3.0 * (sum(ran) / BLOCKS - 0.6) ** 2, rel=1e-4)
    assert [float(share.detach()) for share in gates.shares] == pytest.approx(ran)
    assert all(0 < share < 1 for share in ran)


def test_gradients_go_straight_through_the_gates(dense: DenseModel) -> None:
    """The bias of the last router moves its own gates alone: its gradient is theirs times the slope of the sigmoid."""
    model: Any = trained.load(dense)
    gates, ids = drawn(model), CALIBRATION.ids[:2]
    replace(METHOD, loss="nll", penalty=3.0)._loss(model, gates, dense)(ids).backward()
    assert all(value.grad is not None and (value.grad != 0).any() for value in gates.learned.values())
    assert all(not parameter.requires_grad for parameter in model.parameters())

    model, routers = trained.load(dense), gates.routers()
    hidden = model.model.embed_tokens(ids)
    rotations = model.model.rotary_emb(hidden, position_ids=torch.arange(32)[None])
    shares = []
    for index, block in enumerate(model.model.layers):
        opened = torch.sigmoid(hidden @ routers[f"{index}.weight"] + routers[f"{index}.bias"])
        gate = (opened > 0.5).float().requires_grad_(True)
        hidden = hidden + gate[..., None] * (block(hidden, position_embeddings=rotations) - hidden)
        shares.append(gate.mean())
    logits = model.lm_head(model.model.norm(hidden))
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (slope,) = torch.autograd.grad(text + 3.0 * (torch.stack(shares).mean() - 0.6) ** 2, [gate])
    wanted = float((slope * opened * (1 - opened)).detach().sum())
    found = gates.learned[f"{BLOCKS - 1}.bias"].grad
    assert found is not None and float(found) == pytest.approx(wanted, rel=1e-3)


def test_lengths_are_those_of_the_states_before_each_block(dense: DenseModel) -> None:
    model = trained.load(dense)
    with torch.no_grad():
        states = model(input_ids=CALIBRATION.ids, use_cache=False, output_hidden_states=True).hidden_states
    assert states is not None
    wanted = [float(state.square().sum(-1).sqrt().median()) for state in states[:-1]]
    assert lengths(model, CALIBRATION.ids) == pytest.approx(wanted)


def test_all_blocks_run_at_first_and_about_the_wanted_share_at_last(dense: DenseModel, tmp_path: Path) -> None:
    begun = Gates(trained.load(dense), 0.9, CALIBRATION.ids).routers()
    assert all(float(torch.sigmoid(value)) > 0.9 if name.endswith("bias") else not value.any() for name, value in begun.items())
    claim = METHOD.compress(dense, CALIBRATION, tmp_path)
    course = claim.details["training"]
    assert course["loss_terms"]["share"][0][1] == pytest.approx(10 * 0.4**2, abs=1e-4)
    shares = claim.details["share_by_block"]
    assert sum(shares) / BLOCKS == pytest.approx(0.6, abs=0.15)
    assert claim.work == Work(blocks=BLOCKS, fewest_blocks=0), "of routers that learned nothing is known"
    assert claim.trained_parameters == BLOCKS * 65 and claim.training_tokens == 60 * 4 * 32
    assert claim.parameters == sum(p.numel() for p in trained.load(dense).parameters()) + BLOCKS * 65
    model = TransformersModel(policies.load(tmp_path), "cpu")
    assert (model.scoring, model.max_batch, model.slots) == ("exact", 1, ["depth"])
    model.logits(CALIBRATION.ids)
    ran = [count / CALIBRATION.ids.numel() for count in model.module.model.routed.ran]
    assert sum(ran) / BLOCKS == pytest.approx(sum(shares) / BLOCKS, abs=0.1)


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"threshold": 1.0}, {"penalty": -1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        LayerRouter(**settings)

"""Centroids of the Routing Transformer: of which keys they are, that k-means finds them, and that the artefact attends by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import StepConfig
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.compact import content_attention
from slimbench.methods.compact.content_attention import Reformer, RoutingTransformer, SinkhornAttention, spherical_means
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.content import Lsh, Routing, Sinkhorn
from tests.support import tiny

METHOD = RoutingTransformer(centroids=4, window=6, samples=50)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def test_keys_are_those_of_the_first_layers_projection_before_rotation(dense: DenseModel) -> None:
    ids, model = tiny.tokens(samples=100, length=48).ids, dense.load()
    plain: Any = dense.load()
    METHOD.policy().neutral().install(model)
    found = content_attention.keys(model, ids, 50, seed=3)
    assert {layer: tuple(part.shape) for layer, part in found.items()} == {0: (2, 50, 16), 1: (2, 50, 16)}
    block = plain.model.layers[0]
    with torch.no_grad():
        wanted = block.self_attn.k_proj(block.input_layernorm(plain.model.embed_tokens(ids))).flatten(0, 1).unflatten(-1, (2, 16))
    at = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(3))[:50].sort().values
    assert torch.allclose(found[0].transpose(0, 1), wanted[at], atol=1e-4)
    again, other = content_attention.keys(model, ids, 50, seed=3), content_attention.keys(model, ids, 50, seed=4)
    assert torch.equal(found[1], again[1]) and not torch.equal(found[1], other[1])


def test_k_means_finds_directions_whatever_the_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator))[0][:, :3]
    own = torch.randint(3, (2, 400), generator=generator)
    vectors = true.gather(1, own[..., None].expand(-1, -1, 8)) + 0.05 * torch.randn(2, 400, 8, generator=generator)
    vectors = vectors * (0.1 + 5 * torch.rand(2, 400, 1, generator=generator))
    best = torch.zeros(2)
    for seed in range(6):
        found = spherical_means(vectors, 3, 20, seed)
        assert torch.allclose(found.norm(dim=-1), torch.ones(2, 3), atol=1e-5)
        best = torch.maximum(best, (true @ found.mT).amax(-1).amin(-1))
    assert (best > 0.99).all()
    settled = spherical_means(vectors, 3, 21, 5)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    nearest = (unit @ settled.mT).argmax(-1)
    for group in range(2):
        for index in range(3):
            mean = unit[group, nearest[group] == index].double().mean(0)
            assert torch.allclose(settled[group, index].double(), mean / mean.norm(), atol=1e-4)


def test_the_artefact_attends_by_its_centroids(dense: DenseModel, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=4, length=32).ids
    claim = METHOD.compress(dense, Calibration(ids, "tiny"), tmp_path)
    (policy,), _ = policies.read(tmp_path)
    assert isinstance(policy, Routing) and policy.window == 6
    assert {name: tuple(part.shape) for name, part in policy.means.items()} == {"0": (2, 4, 16), "1": (2, 4, 16)}
    assert claim.details == {"centroid_numbers": 2 * 2 * 4 * 16} and claim.parameters is None
    loaded = policies.load(tmp_path)
    whole = TransformersModel(loaded, "cpu").logits(ids)
    again: Any = dense.load()
    policy.install(again)
    assert torch.equal(whole, TransformersModel(again, "cpu").logits(ids))
    alike: Any = dense.load()
    replace(policy, means={name: torch.ones_like(part) for name, part in policy.means.items()}).install(alike)
    assert torch.allclose(TransformersModel(alike, "cpu").logits(ids), TransformersModel(dense.load(), "cpu").logits(ids), atol=1e-3)
    assert not torch.allclose(whole, TransformersModel(dense.load(), "cpu").logits(ids), atol=1e-1)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in dense.load().parameters())


def test_the_seed_of_the_cell_is_added_to_that_of_the_method() -> None:
    assert Reformer(seed=2).policy(3) == Lsh(4, 32, 64, seed=5)
    assert SinkhornAttention().policy(3) == Sinkhorn(64, 4, 7, 0.75)


def test_too_little_text_is_refused(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="3 calibration tokens are fewer than 4 centroids"):
        METHOD.compress(dense, Calibration(torch.ones(1, 3, dtype=torch.int64), "tiny"), tmp_path)


@pytest.mark.parametrize("settings", [{"centroids": 0}, {"centroids": 9, "samples": 8}, {"steps": 0}, {"window": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        RoutingTransformer(**settings)


@pytest.mark.parametrize("name", ["Reformer", "RoutingTransformer", "SinkhornAttention"])
def test_a_configuration_builds_it(name: str) -> None:
    target = f"{content_attention.__name__}.{name}"
    assert build_method(StepConfig(name="mine", target=target)) == getattr(content_attention, name)()

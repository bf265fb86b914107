"""Code books: keys that are not rotated, clusters that are means of their members, and an artefact that uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.compact.content_attention import RoutingTransformer
from slimbench.methods.compact.vq_attention import TransformerVQ, k_means
from slimbench.methods.formats import policy as policies
from tests.support import tiny

METHOD = TransformerVQ(codes=8, exact=4, steps=30)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def test_codes_are_of_keys_that_are_drawn_wherever_they_stand(dense: DenseModel, tmp_path: Path) -> None:
    ids, seen, model = tiny.tokens(samples=6, length=32).ids, [], dense.load()
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, result: seen.append(result))
    with torch.no_grad():
        model(ids)
    made = seen[0].flatten(0, 1).unflatten(1, (2, -1)).transpose(0, 1)
    replace(METHOD, codes=2, steps=0).compress(dense, Calibration(ids, "tiny"), tmp_path)
    policy: Any = policies.read(tmp_path)[0][0]
    places = [int(torch.cdist(code[None], made[0]).argmin()) for code in policy.books["1.codes"][0]]
    assert torch.allclose(made[:, places], policy.books["1.codes"], atol=1e-5), "not rotated, and of the same tokens in all heads"
    drawn = torch.randperm(192, generator=torch.Generator().manual_seed(0))[:64]
    assert set(places) <= set(drawn.tolist())


def test_a_model_that_does_not_fit_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    other = tiny.saved(GPTNeoXForCausalLM(GPTNeoXConfig(**size)), tmp_path / "neox")
    monkeypatch.setattr(DenseModel, "load", lambda _: pytest.fail("the model is loaded"))
    for method in (METHOD, RoutingTransformer(centroids=2)):
        with pytest.raises(Unsupported, match="rotate whole queries and keys by halves"):
            method.compress(other, tiny.tokens(), tmp_path)


def test_codes_are_the_means_of_the_keys_that_are_nearest_to_them() -> None:
    keys = torch.randn(2, 200, 6, generator=torch.Generator().manual_seed(0))
    codes = k_means(keys, 8, 200, 1)
    for head in range(2):
        nearest = torch.cdist(keys[head], codes[head]).argmin(1)
        for code in range(8):
            assert torch.allclose(keys[head, nearest == code].mean(0), codes[head, code], atol=1e-5)
    assert k_means(keys[:, :3], 8, 5, 1).shape == (2, 3, 6), "no more codes than keys"
    assert not torch.equal(k_means(keys, 8, 2, 1), k_means(keys, 8, 2, 2))


def test_clusters_are_found_and_a_code_that_none_is_near_stays() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    found = {seed: k_means((middles.repeat(100, 1) + noise)[None], 3, 50, seed)[0] for seed in range(8)}
    hits = [bool((torch.cdist(middles, codes).amin(1) < 0.1).all()) for codes in found.values()]
    assert any(hits)
    same = torch.ones(1, 9, 2)
    assert torch.equal(k_means(same, 4, 5, 0), torch.ones(1, 4, 2))


def test_more_codes_are_nearer_to_the_base_and_the_artefact_holds_them(dense: DenseModel, tmp_path: Path) -> None:
    calibration = tiny.tokens(samples=16, length=64)
    ids, plain = tiny.tokens(samples=4, length=64, seed=9).ids, TransformersModel(dense.load(), "cpu")
    wanted, far = plain.logits(ids), {}
    for codes in (1, 64):
        out = tmp_path / str(codes)
        out.mkdir()
        claim = replace(METHOD, codes=codes).compress(dense, calibration, out)
        made: Any = policies.read(out)[0][0]
        assert made.exact == 4 and {name: tuple(part.shape) for name, part in made.books.items()} == {
            f"{layer}.codes": (2, codes, 16) for layer in (0, 1)
        }
        assert claim.details == {"code_parameters": 2 * 2 * codes * 16}
        assert claim.parameters == sum(part.numel() for part in plain.module.parameters()) + 2 * 2 * codes * 16
        far[codes] = float((TransformersModel(policies.load(out), "cpu").logits(ids) - wanted).square().mean())
    assert far[64] < far[1]


def test_draws_depend_on_both_seeds(dense: DenseModel, tmp_path: Path) -> None:
    made = []
    for name, seed, cell in (("a", 0, 0), ("b", 0, 0), ("c", 1, 0), ("d", 0, 1)):
        (tmp_path / name).mkdir()
        replace(METHOD, seed=seed).compress(replace(dense, seed=cell), tiny.tokens(), tmp_path / name)
        policy: Any = policies.read(tmp_path / name)[0][0]
        made.append(policy.books["0.codes"])
    assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("settings", [{"codes": 0}, {"codes": 1 << 16}, {"exact": 0}, {"steps": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        TransformerVQ(**settings)

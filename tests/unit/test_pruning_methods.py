"""Pruning methods against the definitions of their papers, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from methods._sequential import blocks_of
from methods.base import DenseModel, Unsupported
from methods.pruning.shortgpt import ShortGPT, block_influence
from tests.unit import tiny

CALIBRATION = tiny.tokens(samples=6, length=48)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Six blocks in float32 that differ in how much they do, with gains that are not one."""
    folder = tmp_path_factory.mktemp("deep")
    dense = tiny.save_model(folder, "float32", num_hidden_layers=6)
    model = dense.load()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= (1, 4, 2, 8, 0.5, 3)[int(name.split(".")[2])]
    model.save_pretrained(folder)
    return dense


def hidden_states(dense: DenseModel) -> list[Tensor]:
    """Inputs of the first block and outputs of each, float64 [samples, length, hidden]; the last without the final norm."""
    model = dense.load()
    model.model.norm = nn.Identity()
    with torch.inference_mode():
        return [h.double() for h in model(CALIBRATION.ids, output_hidden_states=True).hidden_states]


def test_block_influence_is_one_minus_the_mean_cosine(deep: DenseModel) -> None:
    states = hidden_states(deep)
    want = []
    for before, after in zip(states, states[1:], strict=False):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        want.append(float(1 - cosine.mean()))
    assert len(want) == 6 and block_influence(deep.load(), CALIBRATION.ids) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("method", "count"), [(ShortGPT(), 2), (ShortGPT(blocks=3), 3), (ShortGPT(fraction=0.01), 1)])
def test_shortgpt_is_the_model_without_the_blocks_of_least_influence(
    deep: DenseModel, tmp_path: Path, method: ShortGPT, count: int
) -> None:
    claim = method.compress(deep, CALIBRATION, tmp_path)
    influence = block_influence(deep.load(), CALIBRATION.ids)
    removed = claim.details["blocks_removed"]
    assert len(removed) == count and claim.sparsity is None
    assert max(influence[i] for i in removed) < min(influence[i] for i in range(6) if i not in removed)
    want = deep.load()
    want.model.layers = nn.ModuleList(block for i, block in enumerate(want.model.layers) if i not in removed)
    short = tiny.dense_model(tmp_path, "float32").load()
    with torch.inference_mode():
        want.config.num_hidden_layers = 6 - count
        assert torch.equal(short(CALIBRATION.ids).logits, want(CALIBRATION.ids, use_cache=False).logits)
    assert len(blocks_of(short)) == 6 - count and json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 6 - count
    assert claim.details["parameters"] == short.num_parameters() < claim.details["parameters_before"] == deep.load().num_parameters()
    saved = sum(p.numel() for p in deep.load().model.layers[0].parameters()) * 4 * count
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (deep.path, tmp_path)]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05)


def test_what_a_config_says_of_each_block_goes_with_it(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = tiny.SHAPE | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).float()
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    model.save_pretrained(source)
    claim = ShortGPT(blocks=1).compress(tiny.dense_model(source, "float32"), CALIBRATION, out)
    (removed,) = claim.details["blocks_removed"]
    assert tiny.dense_model(out, "float32").load().config.layer_types == kinds[:removed] + kinds[removed + 1 :]


def test_shortgpt_leaves_a_block(deep: DenseModel) -> None:
    with pytest.raises(Unsupported, match="6 blocks cannot be removed from 6"):
        ShortGPT(blocks=6).check(deep.shape)
    with pytest.raises(ValueError, match="fraction must be"):
        ShortGPT(fraction=1.0)

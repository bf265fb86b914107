"""Experts that lie in one tensor: a method reaches them, leaves the weights alone, or says that they are out of reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimbench.methods.base import DenseModel, Unsupported
from tests.contract.shipped import classes, make, marked, runnable, sound
from tests.support import tiny

REACH = {"wanda", "sparsegpt"}
TRAIN = {"assistant", "distilbert", "fitnets", "fsp", "gkd", "kd", "minilm", "minillm", "mutual", "ptloss", "ted", "tinybert"}
TRAIN |= {name for name, method in classes().items() if method.needs.text}
KEEP = {"dense", "shortgpt", "gguf", "contribution-dropping", "every-other", "layer-dropping", "norms"}
JOINED = {"head-importance": "a norm over all heads together", "grouped-query": "k_norm"}
"""They change heads, and those of these experts' model hang together; what they say of it."""
LEAVE = sorted(KEEP - {"gguf"})
EDIT = {"adapter", "adapterdrop", "adapterfusion", "compacter", "sparse-adapter", "sublayer-dropping"}
"""They work beside the experts, in the format `edited`, which stacks them; tests of their own hold that these stay as they are."""
OTHERS = REACH | TRAIN | KEEP | EDIT | set(JOINED)
REFUSE = [name for name, method in classes().items() if name not in OTHERS and method.produces != "policy"]


@pytest.mark.parametrize("name", REFUSE)
def test_a_method_that_sees_linear_layers_alone_refuses_them(name: str, experts: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4 experts in one tensor") as refusal:
        make(runnable(name), experts, tmp_path / "artefact")
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", LEAVE)
def test_a_method_that_leaves_experts_alone_keeps_their_weights(name: str, experts: DenseModel, tmp_path: Path) -> None:
    made = make(runnable(name), experts, tmp_path / "artefact")
    before, after = (stacked(folder) for folder in (experts.path, made.folder))
    assert after and len(after) <= len(before)
    assert all(any(torch.equal(tensor, source) for source in before.values()) for tensor in after.values())
    assert sound(made.load(), tiny.tokens(2, 12).ids)


@pytest.mark.parametrize("name", marked(sorted(TRAIN)))
def test_a_method_that_trains_all_parameters_trains_them(name: str, experts: DenseModel, tmp_path: Path) -> None:
    made = make(runnable(name), experts, tmp_path / "artefact")
    before, after = (stacked(folder) for folder in (experts.path, made.folder))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    assert sound(made.load(), tiny.tokens(2, 12).ids)


@pytest.mark.parametrize("name", JOINED)
def test_heads_that_hang_together_are_not_changed(name: str, experts: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=JOINED[name]):
        make(runnable(name), experts, tmp_path / "artefact")
    assert not list(tmp_path.rglob("*.safetensors"))


def stacked(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of experts by name."""
    found = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if "experts" in name}

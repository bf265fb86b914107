"""Experts that lie in one tensor: a method reaches them, leaves the weights alone, or says that they are out of reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.methods.base import DenseModel, Unsupported
from tests.contract.shipped import classes, make, runnable

REACH = {"wanda", "sparsegpt"}
KEEP = {"dense", "shortgpt", "gguf", "contribution-dropping", "every-other", "head-importance", "layer-dropping", "norms"}
REFUSE = [name for name, method in classes().items() if name not in REACH | KEEP and method.produces != "policy"]


@pytest.mark.parametrize("name", REFUSE)
def test_a_method_that_sees_linear_layers_alone_refuses_them(name: str, experts: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4 experts in one tensor") as refusal:
        make(runnable(name), experts, tmp_path / "artefact")
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.safetensors"))

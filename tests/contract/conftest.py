"""A cache of their own, and tiny models that all contracts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.methods.base import DenseModel
from tests.support import tiny
from tests.unit.conftest import own_cache

__all__ = ["own_cache"]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Two blocks of Llama, every width a multiple of 128."""
    return tiny.save_model(tmp_path_factory.mktemp("dense"), hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model whose blocks have no `nn.Linear`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder: Path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=64, n_layer=1, n_head=2, n_inner=128, dtype="bfloat16")
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return tiny.dense_model(folder)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A mixture whose experts lie in one tensor, as transformers keeps them."""
    from transformers import OlmoeConfig

    shape = {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return tiny.save(OlmoeConfig(**(tiny.SHAPE | shape)), tmp_path_factory.mktemp("olmoe"))

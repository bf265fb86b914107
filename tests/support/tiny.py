"""A tiny random Llama for tests: grouped-query attention, tied embeddings, every width a multiple of 32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, DenseModel, ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path, dtype: str = "bfloat16", seed: int = 0, **shape: Any) -> DenseModel:
    """Write the model into `folder` and return it as the input of a method. `shape` overrides fields of the Llama config."""
    from transformers import LlamaConfig

    return save(LlamaConfig(**(SHAPE | shape)), folder, dtype, seed)


def save(config: PreTrainedConfig, folder: Path, dtype: str = "bfloat16", seed: int = 0) -> DenseModel:
    """Write a model of any architecture with random weights into `folder` and return it as the input of a method."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    return dense_model(folder, dtype)


def dense_model(folder: Path, dtype: str = "bfloat16", **settings: Any) -> DenseModel:
    """A folder on disk as the input of a method, on the CPU. `settings` are further fields."""
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    return DenseModel(path=folder, tokenizer_path=folder, dtype=dtype, device="cpu", shape=shape, **settings)


def tokens(samples: int = 4, length: int = 32, seed: int = 0) -> Calibration:
    """Random calibration tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return Calibration(torch.randint(0, SHAPE["vocab_size"], (samples, length), generator=generator), fingerprint=f"random-{seed}")

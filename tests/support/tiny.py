"""A tiny random Llama for tests: grouped-query attention, tied embeddings, every width a multiple of 32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.harness.run.proofs.taught import write_tokenizer
from slimbench.methods.base import Calibration, DenseModel, ModelShape

if TYPE_CHECKING:
    import torch
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


def sparse(dense: DenseModel, folder: Path) -> DenseModel:
    """The same model with the smaller half of each linear layer in its blocks zero, written into a folder unless it is there."""
    import torch

    from slimbench.methods.formats.huggingface import save_dense

    if not folder.is_dir():
        model = dense.load()
        with torch.no_grad():
            for layer in block_layers(model).values():
                layer.weight[layer.weight.abs() < layer.weight.abs().float().median()] = 0
        folder.mkdir()
        save_dense(model, folder)
    return replace(dense, path=folder)


def saved(model: Any, folder: Path) -> DenseModel:
    """Write a float32 model into a new folder and return it as the input of a method."""
    folder.mkdir()
    model.save_pretrained(folder)
    return dense_model(folder, "float32")


def block_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks by name."""
    import torch

    return {name: module for name, module in model.named_modules() if ".layers." in name and type(module) is torch.nn.Linear}


def first(dense: DenseModel, folder: Path) -> DenseModel:
    """The same model as a student: beside another one, of two blocks more and other weights, that its pipeline began with."""
    from transformers import AutoConfig

    if not folder.is_dir():
        config = AutoConfig.from_pretrained(dense.path)
        config.num_hidden_layers += 2
        folder.mkdir()
        save(config, folder, dense.dtype, seed=1)
    return replace(dense, original=folder)


def layer_inputs(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Inputs [tokens, in] of a layer in a pass of the whole model, float64."""
    import torch

    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def tokens(samples: int = 4, length: int = 32, seed: int = 0) -> Calibration:
    """Random calibration tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return Calibration(torch.randint(0, SHAPE["vocab_size"], (samples, length), generator=generator), fingerprint=f"random-{seed}")


def save_tiny(folder: Path) -> Path:
    """Write a two-layer Llama with random weights and a tokenizer of one token a byte, from which cells can be run."""
    from slimbench.harness.run.proofs.method import tiny_model

    tiny_model(folder, dtype="float32")
    save_tokenizer(folder)
    return folder


def save_talking(folder: Path, text: Path) -> Path:
    """As `save_tiny`, trained on a text for a second: what it writes depends on its blocks, where `save_tiny`'s repeats the last token."""
    import torch
    from transformers import AutoTokenizer

    dense = save_model(folder, "float32", vocab_size=257, tie_word_embeddings=False)
    save_tokenizer(folder)
    model, ids = dense.load(), torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(100):
        first = torch.randint(0, len(ids) - 48, (8, 1), generator=generator)
        batch = ids[first + torch.arange(48)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token a byte, and one for the end of a text, into the folder of a model."""
    write_tokenizer(folder, 257)


def save_text(file: Path) -> None:
    """Write a text of some thousand characters."""
    file.write_text(" ".join(f"The {i}th sentence of this text says {i * i} things." for i in range(200)))


def tiny_overrides(model: Path, text: Path) -> list[str]:
    """Overrides that make a cell of a tiny model: seconds on any machine."""
    return [
        "model=custom",
        "model.name=tiny",
        f"model.source=file:{model}",
        "model.dtype=float32",
        f"suite.corpus=file:{text}",
        "suite.seqlen=64",
        "suite.windows=6",
        "suite.tasks=[]",
        "suite.include_path=null",
        "speed.grid=[{batch: 1, prompt: 8, new_tokens: 4}]",
        "speed.processes=1",
        "speed.budget_s=1",
        "speed.max_repeats=6",
        "device=cpu",
        "device.compress=cpu",
        "device.threads=1",
    ]

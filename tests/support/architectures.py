"""Tiny random models of several architectures, with biases and gains that are not 0 and 1."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import tiny

_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "gemma": ("Gemma", {"head_dim": 16, "pad_token_id": 0}),
    "gemma2": ("Gemma2", {"head_dim": 16, "pad_token_id": 0}),
    "phi": ("Phi", {}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **_EXPERTS}),
    "olmoe": ("Olmoe", {"num_experts": 4, "pad_token_id": 0, **_EXPERTS}),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64, **_EXPERTS},
    ),
    "gpt2": ("GPT2", {"n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4}),
}


def make(architecture: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model of three blocks; `more` overrides fields of its config."""
    import transformers

    name, fields = _CLASSES[architecture]
    shape = {key: value for key, value in tiny.SHAPE.items() if name not in ("OPT", "GPT2") or key in _EVERYWHERE}
    config = getattr(transformers, f"{name}Config")(**(shape | {"num_hidden_layers": 3} | fields | more))
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.dtype = dtype
    return model


_EVERYWHERE = {"vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"}

"""Packed decoders in one call for all blocks, where these are what the kernel computes: nothing is launched between layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.cpu import blocks
from slimbench.methods.kernels.cpu.kernel import LANES

_ROPE = ("default", "linear", "llama3")
"""Kinds of rotary embeddings whose angles depend on the position alone."""
_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings by which a static cache forgets tokens."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class PackedDecoder:
    """Prompts and decode steps of a Llama of packed weights.

    Args:
        module: One that `fits`.
    """

    def __init__(self, module: Any) -> None:
        self._module, model, config = module, module.model, module.config
        layers = model.layers[: config.num_hidden_layers]
        norms = [norm.weight for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        packed = [layer.get_submodule(name) for layer in layers for name in _LAYERS]
        self._parts = (*norms, model.norm.weight), packed, model.norm.variance_epsilon, layers[0].self_attn.scaling
        self._of_room: dict[int, blocks.Blocks] = {}

    def __call__(self, ids: Tensor, cache: Any) -> Tensor:
        """The likeliest next tokens [B, 1] behind tokens [B, T], whose keys and values a static cache gets.

        Args:
            ids: One token of each sequence, or prompts of T tokens, for which the cache is empty.
            cache: A `StaticCache`; a new one is made ready for B sequences.

        Raises:
            RuntimeError: The cache has no room for them, or holds something before a prompt.
        """
        held = cache.layers
        if not held[0].is_initialized:
            attention = self._module.model.layers[0].self_attn
            groups = attention.k_proj.out_features // attention.head_dim
            cache.early_initialization(len(ids), groups, attention.head_dim, self._module.dtype, ids.device)
        through = self._blocks(held[0].keys.shape[2])
        x = self._module.get_input_embeddings()(ids)
        found = through(x, [each.keys for each in held], [each.values for each in held], [each.cumulative_length for each in held])
        return self._module.get_output_embeddings()(found).max(-1, keepdim=True).indices  # in half of the time of argmax

    def _blocks(self, room: int) -> blocks.Blocks:
        if room not in self._of_room:
            norms, packed, epsilon, scaling = self._parts
            cos, sin = self._module.model.rotary_emb(norms[0], torch.arange(room)[None])
            self._of_room[room] = blocks.Blocks(norms, packed, epsilon, scaling, cos[0].contiguous(), sin[0].contiguous())
        return self._of_room[room]


def fits(module: Any) -> bool:
    """Whether a module computes what the kernel does, all of its blocks are packed for it, and the kernel is there."""
    layers = [layer.get_submodule(name) for layer in module.model.layers for name in _LAYERS] if _computes(module) else []
    return bool(layers) and all(blocks.takes(layer) and _is_untouched(layer) for layer in layers) and blocks.missing() is None


def _computes(module: Any) -> bool:
    """Whether a module is a Llama as transformers has it, whatever its layers multiply by."""
    from transformers.models.llama import modeling_llama as llama

    if type(module) is not llama.LlamaForCausalLM or module.dtype is not torch.bfloat16:
        return False
    config, kinds = module.config, {llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    layers = module.model.layers[: config.num_hidden_layers]
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    own = [each for layer in layers for each in (layer, *(getattr(layer, name, None) for name in parts))]
    return (
        len(layers) == len(module.model.layers) > 0
        and config.hidden_act == "silu"
        and rope in _ROPE
        and not any(getattr(config, name, None) for name in _WINDOWS)
        and all(type(each) in kinds and _is_untouched(each) for each in (*own, module.model.norm))
        and config.hidden_size % LANES == layers[0].self_attn.head_dim % LANES == 0
        and len({layer.self_attn.head_dim for layer in layers}) == 1
        and all(_is_like(norm, module.model.norm) for norm in _norms(module.model, layers))
    )


def _norms(model: Any, layers: Iterable[Any]) -> Iterator[Any]:
    yield model.norm
    for layer in layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)


def _is_like(norm: Any, last: Any) -> bool:
    """Whether a norm has the precision that the kernel takes, and the epsilon of the last one, which it takes for all."""
    found: bool = norm.variance_epsilon == last.variance_epsilon and norm.weight.dtype is torch.bfloat16
    return found


def _is_untouched(module: nn.Module) -> bool:
    """Whether it computes what its class says."""
    return "forward" not in vars(module) and not any(vars(module)[name] for name in _HOOKS)

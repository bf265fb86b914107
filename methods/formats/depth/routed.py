"""Blocks of a decoder that run for the tokens that their routers let in (`methods.formats.depth.router`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.depth.rows import run_block


def install(model: Any, threshold: float, routers: Mapping[str, Tensor]) -> None:
    """Put routers before the blocks of a model; arguments as of `methods.formats.depth.router.Router`.

    Raises:
        Unsupported: Its blocks are not built like those of Llama.
    """
    check(model)
    base = model.base_model
    base.routed = Routed(model, threshold, routers)
    base.forward = base.routed.run


def check(model: Any) -> None:
    """Raise `Unsupported` unless the blocks of a model are built like those of Llama."""
    if not hasattr(model.base_model, "rotary_emb") or any(layout_of(block).out != "o_proj" for block in blocks_of(model).values()):
        raise Unsupported(f"routers are for blocks built like those of Llama; {type(model).__name__} has others")


class Routed(nn.Module):
    """The base of a model with routers.

    Attributes:
        ran: Of each block, tokens that it ran for since this was made; the policy's own count.
    """

    def __init__(self, model: Any, threshold: float, routers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.threshold, self._base = threshold, [model.base_model]  # in a list, so that it is no part of this module
        self.blocks = len(blocks_of(model))
        self.ran = [0] * self.blocks
        held = [index for index in range(self.blocks) if f"{index}.weight" in routers]
        self.routers = nn.ModuleDict({str(index): _linear(routers, index, model) for index in held})

    def run(self, input_ids: Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None, **given: Any) -> Any:
        """What the forward of the base gives."""
        from transformers.cache_utils import DynamicCache
        from transformers.modeling_outputs import MoeModelOutputWithPast

        base: Any = self._base[0]
        hidden: Tensor = base.embed_tokens(input_ids) if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if len(hidden) > 1:
            return self._alone(hidden, past_key_values is not None or bool(use_cache), **given)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=base.config)
        first, tokens = past_key_values.get_seq_length() if past_key_values is not None else 0, hidden.shape[1]
        rotations = base.rotary_emb(hidden, position_ids=torch.arange(first, first + tokens, device=hidden.device)[None])
        for index, block in enumerate(base.layers[: self.blocks]):
            active = self.let_in(index, hidden).nonzero()[:, 0]
            hidden = run_block(block, hidden, active, rotations, past_key_values, first)
            self.ran[index] += len(active)
        return MoeModelOutputWithPast(last_hidden_state=base.norm(hidden), past_key_values=past_key_values if use_cache else None)

    def _alone(self, hidden: Tensor, cached: bool, **given: Any) -> Any:
        """Several texts without a cache, one after the other."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        if cached:
            raise Unsupported(f"routers are for one text at a time where there is a cache, not {len(hidden)}")
        found: Any = torch.cat([self.run(**given | {"inputs_embeds": text}).last_hidden_state for text in hidden.split(1)])
        return MoeModelOutputWithPast(last_hidden_state=found)

    def let_in(self, index: int, hidden: Tensor) -> Tensor:
        """Whether a block runs for tokens with the states [1, T, d], bool [T]."""
        if str(index) not in self.routers:
            return torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        return torch.sigmoid(self.routers[str(index)](hidden)[0, :, 0].float()) > self.threshold


def _linear(routers: Mapping[str, Tensor], index: int, model: Any) -> nn.Linear:
    """⟨w, h⟩ + b of the router of a block."""
    weight, bias = (routers[f"{index}.{part}"].to(model.device, model.dtype) for part in ("weight", "bias"))
    made = nn.Linear(len(weight), 1, device="meta")
    made.weight, made.bias = nn.Parameter(weight[None], requires_grad=False), nn.Parameter(bias.reshape(1), requires_grad=False)
    return made

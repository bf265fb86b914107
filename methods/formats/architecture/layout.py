"""By which names the parts of a decoder block go: the one table for all who look into blocks.

All blocks here compute x + attention(norm(x)) and, of the result, x + mlp(norm(x)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Layout:
    """Names as seen from the block.

    Attributes:
        norms: The norm before the attention, and the one before the MLP.
        attention: The attention, a module of its own.
        mlp: The modules that are the MLP, one after the other.
        queries: The projections to queries, keys and values, in the attention.
        out: The output projection, in the attention.
        gate: Its activated outputs are multiplied with those of `up`; None where those of `up` are activated.
        up: Of one MLP, as `gate` and `down`.
        down: It reads the channels that `gate` and `up` make.
        router: What gives a token to experts; None where there is one MLP.
        experts: Holds `gate_up_proj` and `down_proj` of all experts.
    """

    norms: tuple[str, str]
    attention: str
    mlp: tuple[str, ...]
    queries: tuple[str, str, str]
    out: str
    gate: str | None
    up: str
    down: str
    router: str | None = None
    experts: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The norms, the attention and the MLP: what stays in its place, if only as `Nothing`, when a part is taken out."""
        return (*self.norms, self.attention, *self.mlp)

    def fits(self, block: nn.Module) -> bool:
        """Whether a block has these parts, and experts if there are any in the layout."""
        held = {name for name, _ in block.named_modules()}
        wanted = {*self.parts, *(name for name in (self.router, self.experts) if name)}
        behind = hasattr(block, "pre_feedforward_layernorm") or getattr(block, "do_layer_norm_before", True) is False
        return wanted <= held and not behind


LLAMA = Layout(
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    mlp=("mlp",),
    queries=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
"""Llama, Mistral, Qwen, Gemma, … as far as their blocks have two norms."""
MIXTRAL = replace(LLAMA, router="mlp.gate", experts="mlp.experts")
"""Mixtral, OLMoE, Qwen-MoE."""
OPT = Layout(
    norms=("self_attn_layer_norm", "final_layer_norm"),
    attention="self_attn",
    mlp=("fc1", "fc2"),
    queries=LLAMA.queries,
    out="out_proj",
    gate=None,
    up="fc1",
    down="fc2",
)


def layout_of(block: nn.Module) -> Layout:
    """The layout of a block.

    Raises:
        Unsupported: It has none that is known here.
    """
    for layout in (MIXTRAL, LLAMA, OPT):
        if layout.fits(block):
            return layout
    raise unlike(type(block).__name__, "it has no attention and no MLP, each behind a norm of its own, by names that are known")


def unlike(kind: str, why: str) -> Unsupported:
    """The refusal of what is built differently.

    Args:
        kind: Name of a class of models or blocks.
    """
    return Unsupported(f"{kind} is not built like Llama, OPT or Mixtral: {why}")

"""The policy `prefix` of the slot `cache`: every text goes on from k virtual tokens, of which there are only keys and values.

    state      keys and values of layer l: P_l [2, heads, k, head_dim], stored as `cache.L.keys` and `cache.L.values`
    attention  of the token at position i of a text: over the k states, and over the tokens 0 … i

Keys are attended to as they are stored: what a model does with positions is done to the tokens of the text alone, which take the positions
k, k + 1, … as if the virtual ones stood before them. So a text may be k tokens shorter than the model was made for, and the config of
the loaded module says so. Heads are those of keys and values, fewer than those of queries where they are grouped. The states count as
parameters of the model.

All protocols call the module with `new_cache`, so that each window, each prompt and each sequence of a batch has the prefix before it. The
same numbers come out in whatever pieces a text goes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import Policy, Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prefix(Policy):
    """Virtual tokens before every text.

    Attributes:
        tokens: k; 0 is the base.
        states: Keys and values [heads, k, head_dim] of each layer that has an attention, in order, as `L.keys` and `L.values`.
    """

    slot = "cache"
    kind = "prefix"

    tokens: int
    states: Mapping[str, Tensor] = tensors()

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> Prefix:
        return Prefix(0)

    def check(self, shape: ModelShape) -> None:
        if widths := {state.shape[-1] for state in self.states.values()} - {shape.head_dim}:
            raise Unsupported(f"a prefix of states of {widths.pop()} numbers does not fit the head dimension {shape.head_dim}")

    def install(self, model: Any) -> None:
        """Raises `ValueError` if there are not as many states as the model has attentions, or they are not of its heads."""
        from torch import nn
        from transformers.cache_utils import DynamicCache

        from slimbench.methods.formats.kv.prefix_cache import PrefixCache

        if not self.tokens:
            model.new_cache = lambda: DynamicCache(config=model.config)
            return
        heads = heads_of(model)
        wanted = {f"{layer}.{part}": count for layer, count in enumerate(heads) for part in ("keys", "values")}
        found = {name: tuple(state.shape[:2]) for name, state in self.states.items()}
        if found != {name: (count, self.tokens) for name, count in wanted.items()}:
            said = f"{len(found)} states of heads and tokens {sorted(set(found.values()))}"
            raise ValueError(f"the prefix does not fit its model: {said} for {len(heads)} attentions of {sorted(set(heads))} heads")
        model.prefix_states = nn.ParameterList(nn.Parameter(self.states[name].to(model.device), requires_grad=False) for name in wanted)
        model.new_cache = lambda: PrefixCache(model.prefix_states)
        if hasattr(model.config, "max_position_embeddings"):
            model.config.max_position_embeddings -= self.tokens


def heads_of(model: Any) -> list[int]:
    """Heads of keys and values of each layer that has an attention.

    Raises:
        Unsupported: Some layers do not attend to all tokens.
    """
    from slimbench.methods.formats.kv.cache import full_attention_layers

    config = model.config.get_text_config(decoder=True)
    layers = full_attention_layers(config)
    attentions = [module for module in model.modules() if hasattr(module, "k_proj")]
    if not attentions:
        return [getattr(config, "num_key_value_heads", None) or config.num_attention_heads] * layers
    return [attention.k_proj.out_features // attention.head_dim for attention in attentions]

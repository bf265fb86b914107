"""Blocks of a decoder that run for some of the tokens only (`methods.formats.depth.exit`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of

_NORMS = ("q_norm", "k_norm")


def install(model: Any, criterion: str, threshold: float, exits: Sequence[int], translators: Mapping[str, Tensor]) -> None:
    """Let tokens leave the base of a model at its exits; arguments as of `methods.formats.depth.exit.EarlyExit`.

    Raises:
        Unsupported: Its blocks are not built like those of Llama.
    """
    base, blocks = model.base_model, list(blocks_of(model).values())
    if not hasattr(base, "rotary_emb") or any(layout_of(block).out != "o_proj" for block in blocks):
        raise Unsupported(f"early exits are for blocks built like those of Llama; {type(model).__name__} has others")
    base.exits = Exits(model, criterion, threshold, exits, translators)
    base.forward = base.exits.run


class Exits(nn.Module):
    """The base of a model with exits.

    Attributes:
        left: Tokens that left after so many blocks, since it was made; the policy's own count.
    """

    def __init__(self, model: Any, criterion: str, threshold: float, exits: Sequence[int], translators: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.criterion, self.threshold, self.places, self.left = criterion, threshold, set(exits), dict[int, int]()
        self._base, self._head = [model.base_model], [model.get_output_embeddings()]  # in lists, so that they are no parts of this module
        self.blocks = len(blocks_of(model))
        held = [place for place in exits if f"{place}.weight" in translators]
        self.maps = nn.ModuleDict({str(place): _linear(translators, place, model) for place in held})

    def run(self, input_ids: Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None, **given: Any) -> Any:
        """What the forward of the base gives; of the states, each as its token left."""
        from transformers.cache_utils import DynamicCache
        from transformers.modeling_outputs import MoeModelOutputWithPast

        base: Any = self._base[0]
        hidden: Tensor = base.embed_tokens(input_ids) if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if len(hidden) > 1:
            return self._alone(hidden, past_key_values, use_cache, **given)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=base.config)
        first, tokens = past_key_values.get_seq_length() if past_key_values is not None else 0, hidden.shape[1]
        places = torch.arange(first, first + tokens, device=hidden.device)
        rotations = base.rotary_emb(hidden, position_ids=places[None])
        active = torch.arange(tokens, device=hidden.device)
        found, before, agreed = hidden.new_zeros(hidden.shape), hidden, _Agreed(tokens, hidden.device)
        for index, block in enumerate(base.layers[: self.blocks], start=1):
            hidden = run_block(block, hidden, active, rotations, past_key_values, first)
            if index not in self.places or not len(active):
                continue
            states = hidden[:, active]
            translated = self.translated(index, states)
            sure = self.sure(translated, states, before[:, active], agreed, active)
            found[:, active[sure]] = translated[:, sure]
            self._count(index, int(sure.sum()))
            active, before = active[~sure], hidden
        found[:, active] = hidden[:, active]
        self._count(self.blocks, len(active))
        return MoeModelOutputWithPast(last_hidden_state=base.norm(found), past_key_values=past_key_values if use_cache else None)

    def _alone(self, hidden: Tensor, past_key_values: Any, use_cache: bool | None, **given: Any) -> Any:
        """Several texts without a cache, one after the other."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        if past_key_values is not None or use_cache:
            raise Unsupported(f"early exits are for one text at a time where there is a cache, not {len(hidden)}")
        found: Any = torch.cat([self.run(**given | {"inputs_embeds": text}).last_hidden_state for text in hidden.split(1)])
        return MoeModelOutputWithPast(last_hidden_state=found)

    def _count(self, blocks: int, tokens: int) -> None:
        if tokens:
            self.left[blocks] = self.left.get(blocks, 0) + tokens

    def translated(self, exit_: int, states: Tensor) -> Tensor:
        """States [1, n, d] as the exit hands them to norm and head."""
        return states + self.maps[str(exit_)](states) if str(exit_) in self.maps else states

    def sure(self, translated: Tensor, states: Tensor, before: Tensor, agreed: _Agreed, active: Tensor) -> Tensor:
        """Which tokens leave here, bool [n].

        Args:
            translated: States for norm and head, [1, n, d].
            states: As the block left them.
            before: The same behind the exit before.
            agreed: What earlier exits predicted of all tokens.
            active: Which tokens these are.
        """
        criterion, threshold = self.criterion, self.threshold
        if criterion == "state":
            return functional.cosine_similarity(states.float(), before.float(), dim=-1)[0] >= threshold
        logits = self._head[0](self._base[0].norm(translated))[0].float()
        if criterion == "patience":
            return agreed.count(active, logits.argmax(-1)) >= threshold
        return confidence(logits, criterion) >= threshold


def _linear(translators: Mapping[str, Tensor], place: int, model: Any) -> nn.Linear:
    """The map W h + b of an exit."""
    weight, bias = (translators[f"{place}.{part}"].to(model.device, model.dtype) for part in ("weight", "bias"))
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
    return made


class _Agreed:
    """How many exits in a row predicted the same of each token."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.last = torch.full((tokens,), -1, device=device)
        self.times = torch.zeros(tokens, dtype=torch.int64, device=device)

    def count(self, active: Tensor, predicted: Tensor) -> Tensor:
        """Take in what an exit predicts of some tokens; PABEE counts agreements, so a first prediction has none."""
        self.times[active] = torch.where(predicted == self.last[active], self.times[active] + 1, 0)
        self.last[active] = predicted
        return self.times[active]


def confidence(logits: Tensor, criterion: str) -> Tensor:
    """How sure logits [n, V] are, [n]: `maximum`, `margin`, or for `entropy` 1 - entropy / ln V."""
    if criterion == "entropy":
        logp = logits.log_softmax(-1)
        return 1 + (logp.exp() * logp).sum(-1) / torch.log(torch.tensor(float(logits.shape[-1])))
    largest = logits.softmax(-1).topk(2, -1).values
    return largest[:, 0] if criterion == "maximum" else largest[:, 0] - largest[:, 1]


def run_block(block: Any, hidden: Tensor, active: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int) -> Tensor:
    """One block for some tokens; all of them give keys and values.

    Args:
        hidden: [1, T, d].
        active: Those that run, int64 [n], ascending.
        rotations: Cosines and sines [1, T, D] of the positions first, first + 1, ….
        cache: With the keys and values of the tokens before; None where there are none and none follow.
    """
    layout = layout_of(block)
    norms, attention = (block.get_submodule(name) for name in layout.norms), block.get_submodule(layout.attention)
    first_norm, second_norm = norms
    normed = first_norm(hidden)
    key, value = states(attention, "k", normed), states(attention, "v", normed)
    rotate = importlib.import_module(type(attention).__module__).apply_rotary_pos_emb
    key = rotate(key, key, *rotations)[1]
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    if not len(active):
        return hidden
    query = states(attention, "q", normed[:, active])
    query = rotate(query, query, *(table[:, active] for table in rotations))[0]
    out = attend(query, key, value, attention.scaling, active + first)
    running = hidden[:, active] + attention.get_submodule(layout.out)(out.transpose(1, 2).flatten(2))
    made = block.get_submodule(layout.mlp[0])(second_norm(running))
    running = running + (made[0] if isinstance(made, tuple) else made)
    return running if len(active) == hidden.shape[1] else hidden.index_copy(1, active, running)


def states(attention: Any, which: str, normed: Tensor) -> Tensor:
    """Queries, keys or values [1, heads, n, D] of normed states [1, n, d], with the norm of the architecture where it has one."""
    made = getattr(attention, f"{which}_proj")(normed)
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None and norm.weight.shape[-1] != attention.head_dim:
        made, norm = norm(made), None
    made = made.unflatten(-1, (-1, attention.head_dim))
    return (made if norm is None else norm(made)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, places: Tensor) -> Tensor:
    """Attention [1, H, n, D] of tokens at some places over all keys before them and their own."""
    count = key.shape[2]
    if query.shape[2] == 1 and int(places[-1]) == count - 1:
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    if query.shape[2] == count:
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True, enable_gqa=True)
    share = query.shape[1] // key.shape[1]
    seen = torch.arange(count, device=query.device)[None] <= places[:, None]
    key, value = (part.repeat_interleave(share, 1) if share > 1 else part for part in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)

"""Logits of a model against those of its early blocks (`methods.formats.depth.contrast`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.structure import blocks_of

_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def install(model: Any, candidates: Sequence[int], floor: float) -> None:
    """Change the logits that a causal language model gives; arguments as of `methods.formats.depth.contrast.Contrast`.

    Raises:
        Unsupported: It changes by itself what its head gives, so that early logits would be others.
    """
    if changed := [name for name in _SCALES if getattr(model.config, name, None) not in (None, 1, 1.0)]:
        raise Unsupported(f"contrasts are for models whose logits are what the head gives; this one has {changed[0]}")
    blocks, head, states = list(blocks_of(model).values()), model.get_output_embeddings(), dict[int, Tensor]()

    def keep(place: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[place] = args[0] if args else kwargs["hidden_states"]

        return before

    def after(_: Any, __: Any, out: Any) -> Any:
        if states:
            count = out.logits.shape[1]
            out.logits = contrasted(out.logits, (head(states[place][:, -count:].contiguous()) for place in candidates), floor)
            states.clear()
        return out

    for place in candidates:
        blocks[place].register_forward_pre_hook(keep(place), with_kwargs=True)
    model.register_forward_hook(after)


def contrasted(logits: Tensor, early: Iterable[Tensor], floor: float) -> Tensor:
    """F [B, T, V] in float32: in fewer bits tokens that are told apart would be alike.

    Args:
        logits: Of the whole model, [B, T, V].
        early: Those of each candidate, of the same shape; one at a time is held.
        floor: Share of the largest probability that a token must have.
    """
    final = logits.float().log_softmax(-1)
    farthest = base = None
    for other in early:
        logs = other.float().log_softmax(-1)
        distance = divergence(final, logs)[..., None]
        if farthest is None or base is None:
            farthest, base = distance, logs
        else:
            farthest, base = torch.maximum(farthest, distance), torch.where(distance > farthest, logs, base)
    if base is None:
        return logits.float()
    unlikely = final < final.amax(-1, keepdim=True) + math.log(floor)
    return (final - base).masked_fill(unlikely, -torch.inf)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen–Shannon divergence, in nats, of distributions whose logarithms are [..., V]."""
    middle = torch.logaddexp(first, second) - math.log(2)
    return sum(((logs.exp() * (logs - middle)).sum(-1) / 2 for logs in (first, second)), start=first.new_zeros(()))

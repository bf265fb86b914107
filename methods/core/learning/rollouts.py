"""What a model that learns writes itself, drawn from torch's own random numbers: those of `train`, which a checkpoint holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """Prompts and what was written behind them.

    Attributes:
        ids: int64 [sequences, prompt + new].
        written: True where a token was drawn, the end of a text included, [sequences, prompt + new].
    """

    ids: Tensor
    written: Tensor


@torch.no_grad()
def rollout(model: Any, prompts: Tensor, new: int, temperature: float = 1.0, dtype: torch.dtype | None = None) -> Rollout:
    """Draw tokens from a model's distribution, without gradients.

    Args:
        prompts: int64 [sequences, prompt], all of one length.
        new: Tokens to draw at most; behind the end of a text stand ends that were not drawn.
        temperature: By which the logits are divided.
        dtype: In which products are computed; None: that of the model.
    """
    ends = _ends(model)
    ids, written, cache = prompts, [torch.zeros_like(prompts, dtype=torch.bool)], None
    found, open_ = [prompts], torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(new):
        with torch.autocast(prompts.device.type, dtype, enabled=dtype is not None):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = torch.multinomial((out.logits[:, -1].float() / temperature).softmax(-1), 1)
        ids = torch.where(open_[:, None], drawn, ends[0] if len(ends) else drawn)
        found.append(ids)
        written.append(open_[:, None].clone())
        open_ &= ~torch.isin(ids[:, 0], ends)
    return Rollout(torch.cat(found, 1), torch.cat(written, 1))


def _ends(model: Any) -> Tensor:
    """Ids of the tokens that end a text."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(found), dtype=torch.int64, device=model.device)

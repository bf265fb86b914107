"""What a model that learns writes itself, drawn from torch's own random numbers: those of `train`, which a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimbench.util.writing.teaching import chat_ids, without_its_settings


class Rollout(NamedTuple):
    """Prompts and what was written behind them.

    Attributes:
        ids: int64 [sequences, prompt + new].
        written: True where a token was drawn, the end of a text included, [sequences, prompt + new].
        weights: q(y) / r(y) of each token drawn, with the model's distribution q and that it was drawn from, r; 1 elsewhere.
    """

    ids: Tensor
    written: Tensor
    weights: Tensor


@torch.no_grad()
def rollout(
    model: Any,
    prompts: Tensor,
    new: int,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    other: Any = None,
    share: float = 0.0,
) -> Rollout:
    """Draw tokens from a model's distribution, or from its mixture with that of another, without gradients.

    Args:
        prompts: int64 [sequences, prompt], all of one length.
        new: Tokens to draw at most; behind the end of a text stand ends that were not drawn.
        temperature: By which the logits are divided.
        dtype: In which products are computed; None: that of the model.
        other: Draws with the model, where `share` is above 0.
        share: Of the other's distribution in the mixture, 0..1.
    """
    ends, own, its = _ends(model), _Writer(model, temperature, dtype), _Writer(other, temperature, dtype) if share else None
    ids, written, weights = prompts, [torch.zeros_like(prompts, dtype=torch.bool)], [torch.ones_like(prompts, dtype=torch.float32)]
    found, open_ = [prompts], torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for place in range(new):
        if not bool(open_.any()):
            rest = ends[:1].expand(len(prompts), new - place)
            found.append(rest)
            written.append(torch.zeros_like(rest, dtype=torch.bool))
            weights.append(torch.ones_like(rest, dtype=torch.float32))
            break
        shares = own.next(ids)
        mixed = shares if its is None else share * its.next(ids) + (1 - share) * shares
        drawn = torch.multinomial(mixed, 1)
        ids = torch.where(open_[:, None], drawn, ends[0] if len(ends) else drawn)
        found.append(ids)
        written.append(open_[:, None].clone())
        weights.append(torch.where(open_[:, None], shares.gather(1, drawn) / mixed.gather(1, drawn), 1.0))
        open_ &= ~torch.isin(ids[:, 0], ends)
    return Rollout(torch.cat(found, 1), torch.cat(written, 1), torch.cat(weights, 1))


@torch.no_grad()
def answered(
    model: Any, tokenizer: Any, prompts: Sequence[str], new: int, dtype: torch.dtype | None = None, batch: int = 16, drawn: bool = False
) -> list[str]:
    """What a model answers to prompts, each in its own template.

    Args:
        new: Tokens of an answer at most.
        dtype: In which products are computed; None: that of the model.
        drawn: Each token is drawn among the fifty likeliest, by torch's own random numbers; else it is the likeliest.
    """
    from transformers import GenerationConfig

    ends, found = set(_ends(model).tolist()), list[str]()
    draws: dict[str, Any] = {"do_sample": True, "top_k": 50} if drawn else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=new, **draws, eos_token_id=sorted(ends) or None, pad_token_id=0)
    for first in range(0, len(prompts), batch):
        rows = [chat_ids(tokenizer, (("user", prompt),)) for prompt in prompts[first : first + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with without_its_settings(model), torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        texts = ([*takewhile(lambda token: token not in ends, row)] for row in made[:, width:].tolist())
        found += [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in texts]
    return found


class _Writer:
    """A model with its cache."""

    def __init__(self, model: Any, temperature: float, dtype: torch.dtype | None) -> None:
        self.model, self.temperature, self.dtype, self.cache = model, temperature, dtype, None

    def next(self, ids: Tensor) -> Tensor:
        """The distribution [sequences, vocabulary] of what follows on more tokens [sequences, n]."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype is not None):
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return (out.logits[:, -1].float() / self.temperature).softmax(-1)


def _ends(model: Any) -> Tensor:
    """Ids of the tokens that end a text."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(found), dtype=torch.int64, device=model.device)

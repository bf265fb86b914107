"""Greedy continuations of prompts: what a model writes where nothing holds it to a text.

The tokens come out of the loop of prefill and decode steps that the stage `speed` times. Prompts of equally many tokens go through
it together, since padding would change numbers. A batch that they do not fill is filled up with the last of them: each prompt is
continued in a batch of one size, and an engine that compiles sees few shapes. The token that ends a text is one like others: a model
that ends at once would otherwise say nothing of how it goes on.

Where the two likeliest tokens of a reference are hardly told apart, rounding decides: a lossless method may part from it there, and
nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.measure import protocols
from slimbench.harness.measure.dynamic.hooks import Count, watched
from slimbench.harness.measure.loaded import Generates, Scores
from slimbench.harness.schema.generation import AskedPrompts, GenerationResult
from slimbench.harness.schema.work import DRAFT
from slimbench.harness.store.partial import Part
from slimbench.methods.base import Unsupported
from slimbench.tasks.prompts import Prompts

_BATCH = 8
_UNITS = 2


def measure(
    model: Generates,
    tokenizer: Any,
    asked: Prompts,
    suite: SuiteConfig,
    on_progress: Callable[[int, int], None],
    part: Part | None = None,
    ties: bool = False,
) -> tuple[GenerationResult, int]:
    """Continue prompts by `suite.continuations` tokens.

    Args:
        tokenizer: That of the source model.
        on_progress: Called with prompts done and prompts in all.
        part: Keeps each batch; what it has of an earlier attempt is not written again.
        ties: Look for the places that are undecided, where the engine shows logits.

    Returns:
        The result, and how many tokens went through the model.

    Raises:
        methods.base.Unsupported: A prompt and its continuation are longer than the model was made for.
    """
    length, part, batch = suite.continuations or 0, part or Part(), model.batch(_BATCH)
    start = [tokenizer.bos_token_id] if suite.add_bos else []
    ids = [start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in asked.texts]
    if (most := max(map(len, ids)) + length) > model.max_length:
        raise Unsupported(f"the longest prompt and its continuation are {most} tokens, the model takes {model.max_length}")
    written: dict[int, list[int]] = {}
    through, passes = 0, list[int]()
    on_progress(0, len(ids))
    for places in _batches(ids, batch):
        rows = torch.tensor([ids[place] for place in places] + [ids[places[-1]]] * (batch - len(places)))
        found = part.once(rows.numpy().tobytes(), len(places), partial(_written, model, rows, length), lambda kept: isinstance(kept, dict))
        written |= dict(zip(places, found["tokens"], strict=False))
        passes += found["passes"]
        through += batch * (rows.shape[1] + length - 1)
        on_progress(len(written), len(ids))
    tokens = [written[place] for place in range(len(ids))]
    near: list[list[int]] = []
    if ties and isinstance(model, Scores) and model.scoring == "exact":
        texts = zip(ids, tokens, strict=True)
        near = [part.once(["ties", prompt, found], 0, partial(_ties, model, prompt, found)) for prompt, found in texts]
        through += sum(len(prompt) + length - 1 for prompt in ids)
    result = GenerationResult(
        protocol=f"greedy-{protocols.GENERATION}",
        asked=AskedPrompts(sha256=asked.sha256, kinds=list(asked.kinds), texts=list(asked.texts)),
        length=length,
        batch=batch,
        tokens=tokens,
        passes=sum(passes) if passes else None,
        texts=[tokenizer.decode(found, clean_up_tokenization_spaces=False) for found in tokens],
        ties=near,
    )
    return result, through


def unguessed(result: GenerationResult) -> str | None:
    """A flag where a draft acts and each token had a pass of its own: then nothing is shown of guesses."""
    behind = (result.length - 1) * len(result.tokens)
    alone = behind and result.passes is not None and result.passes >= behind
    return f"no guess shows in continuations: {behind:,} tokens came by {result.passes:,} passes" if alone else None


def _written(model: Generates, rows: torch.Tensor, length: int) -> dict[str, list[Any]]:
    """The continuations of a batch, and where the model guesses and shows its module, how many passes behind the prompt's gave them."""
    module, count = getattr(model, "module", None), Count()
    with ExitStack() as hooks:
        if DRAFT in model.slots and module is not None:
            with suppress(Unsupported):  # blocks of another kind, by which no pass is told
                hooks.enter_context(watched(module, count, known=()))
        tokens = model.generate(rows, length)
    return {"tokens": tokens, "passes": [len(count.passes) - 1] if count.passes else []}


def _batches(ids: list[list[int]], most: int) -> list[list[int]]:
    """The places of prompts that are continued together: equally long ones, the shortest first."""
    alike: dict[int, list[int]] = defaultdict(list)
    for place, tokens in enumerate(ids):
        alike[len(tokens)].append(place)
    return [places[first : first + most] for _, places in sorted(alike.items()) for first in range(0, len(places), most)]


def undecided(logits: torch.Tensor) -> torch.Tensor:
    """Whether the two largest logits [..., V] lie at most two units in the last place apart, those of their dtype at the largest; [...]."""
    return as_likely(logits, logits.topk(2, -1).indices[..., 1])


def as_likely(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Whether tokens [...] lie at most two units in the last place below the largest of logits [..., V]; [...]."""
    first, found = logits.max(-1).values.double(), logits.gather(-1, chosen[..., None])[..., 0].double()
    unit = torch.finfo(logits.dtype).eps * torch.exp2(torch.frexp(first).exponent.double() - 1)
    return first - found <= _UNITS * unit


def _ties(model: Scores, prompt: list[int], written: list[int]) -> list[int]:
    """The places of a continuation that are undecided, seen in one pass over it and its prompt."""
    logits = model.logits(torch.tensor([prompt + written[:-1]]), len(prompt) - 1)
    return [int(place) for place in undecided(logits[0]).nonzero()]

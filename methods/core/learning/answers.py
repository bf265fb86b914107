"""Prompts with their responses as tokens, and what a model learns of them: the response alone, as long as it is.

An answer is int64 [3, length]:

    [0]     ids: the prompt in the model's own template, the response, the token that ends it
    [1]     1 where a token is of the prompt, or of what is given of the response, 2 where it is of the response, 3 where that is the
            right answer, with which it may end, 0 behind all
    [2]     which task the answer is of, everywhere the same

What is longer than `length` is cut off behind; an answer of whose response nothing is left is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.util.writing.teaching import Example, chat_ids

PROMPT, RESPONSE, ANSWER = 1, 2, 3


def encode(examples: Sequence[Example], tokenizer: Any, length: int, tasks: Sequence[str]) -> Tensor:
    """Examples as answers [n, 3, longest].

    Args:
        length: Tokens of the longest, at most.
        tasks: Names; an example's task is an index among them.

    Raises:
        Unsupported: Of no response anything is left.
    """
    rows = [row for example in examples if (row := _encoded(example, tokenizer, length, tasks)) is not None]
    if not rows:
        raise Unsupported(f"no prompt of the {len(examples)} examples is shorter than length={length}, so no response is left")
    return fitted(rows, max(row.shape[1] for row in rows))


def encode_each(examples: Sequence[Example], tokenizer: Any, length: int, tasks: Sequence[str]) -> dict[Example, Tensor]:
    """Each example as an answer [3, longest], all of one length; one of whose response nothing is left is left out."""
    rows = {example: row for example in examples if (row := _encoded(example, tokenizer, length, tasks)) is not None}
    width = max((row.shape[1] for row in rows.values()), default=0)
    return {example: fitted([row], width)[0] for example, row in rows.items()}


def beside(groups: Sequence[Sequence[Example]], tokenizer: Any, length: int, tasks: Sequence[str], part: int) -> Tensor:
    """Answers that are learned together, [n, 3 · members, longest], one above the other.

    Args:
        groups: The members of each; a group is left out where one of them has not all tokens of a part, or not as many as the first.
        part: `RESPONSE`, the right answer included, or `ANSWER` alone.

    Raises:
        Unsupported: No group is left.
    """
    rows = encode_each(list(dict.fromkeys(example for group in groups for example in group)), tokenizer, length, tasks)
    found = []
    for group in groups:
        members = [rows[example] for example in group if example in rows]
        if len(members) == len(group) and len({int((row[1] >= part).sum()) for row in members}) == 1:
            found.append(torch.cat(members))
    found = [group for group in found if bool((group[1] >= part).any())]
    if not found:
        raise Unsupported(f"of {len(groups)} groups of answers none is left whole within length={length}")
    return torch.stack(found)


def fitted(rows: Sequence[Tensor], width: int) -> Tensor:
    """Answers of different lengths as [n, 3, width], filled up with nothing."""
    found = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
    found[:, 2] = found[:, 2, :1]
    return found


def _encoded(example: Example, tokenizer: Any, length: int, tasks: Sequence[str]) -> Tensor | None:
    """An example as an answer [3, its length]; None where nothing of its response is left."""
    prompt = chat_ids(tokenizer, (("user", example.prompt),))
    if example.given:
        prompt += list(tokenizer(example.given, add_special_tokens=False)["input_ids"])
        example = replace(example, response=f" {example.response}")
    before, answer = _pieces(example)
    response, right = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else [] for text in (before, answer))
    end = [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    ids = (prompt + response + right + end)[:length]
    if len(ids) <= len(prompt):
        return None
    parts = [PROMPT] * len(prompt) + [RESPONSE] * len(response) + [ANSWER] * len(right) + [RESPONSE] * len(end)
    return torch.tensor([ids, parts[:length], [tasks.index(example.task)] * len(ids)])


def _pieces(example: Example) -> tuple[str, str]:
    """A response up to the right answer that it ends with, and this with the white space before it, as tokenizers have it.

    They are made tokens apart, so that an answer is always the same ones.
    """
    if not example.gold or not example.response.endswith(example.gold):
        return example.response, ""
    before = example.response[: -len(example.gold)].rstrip()
    return before, example.response[len(before) :]


def targets(answers: Tensor) -> Tensor:
    """True where the next token is of the response, [n, length − 1]."""
    return answers[:, 1, 1:] >= RESPONSE


def answer_loss(logits: Tensor, answers: Tensor, weights: Mapping[int, float] | None = None) -> Tensor:
    """−log p of the tokens of responses, a scalar: Σ over tasks of a weight times the mean over the tokens of its answers in the batch.

    Args:
        logits: z [n, length, vocabulary], or without the last position, which predicts nothing that is there.
        answers: [n, 3, length].
        weights: By task, those of tasks that the batch has none of are not used; None: the mean over all tokens alike.
    """
    from torch.nn import functional

    losses = functional.cross_entropy(logits[:, : answers.shape[2] - 1].float().transpose(1, 2), answers[:, 0, 1:], reduction="none")
    counted = targets(answers)
    if weights is None:
        return losses[counted].mean()
    parts = [(weight, counted & (answers[:, 2, 1:] == task)) for task, weight in weights.items()]
    return torch.stack([weight * losses[of].mean() for weight, of in parts if bool(of.any())]).sum()

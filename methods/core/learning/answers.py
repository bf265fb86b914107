"""Prompts with their responses as tokens, and what a model learns of them: the response alone, as long as it is.

An answer is int64 [3, length]:

    [0]     ids: the prompt in the model's own template, the response, the token that ends it
    [1]     1 where a token is of the prompt, 2 where it is of the response, 3 where that is the right answer, with which it may end,
            0 behind all
    [2]     which task the answer is of, everywhere the same

What is longer than `length` is cut off behind; an answer of whose response nothing is left is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.util.teaching import Example, chat_ids

PROMPT, RESPONSE, ANSWER = 1, 2, 3


def encode(examples: Sequence[Example], tokenizer: Any, length: int, tasks: Sequence[str]) -> Tensor:
    """Examples as answers [n, 3, longest].

    Args:
        length: Tokens of the longest, at most.
        tasks: Names; an example's task is an index among them.

    Raises:
        Unsupported: Of no response anything is left.
    """
    rows = []
    for example in examples:
        prompt = chat_ids(tokenizer, (("user", example.prompt),))
        before, answer = _pieces(example)
        response, right = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else [] for text in (before, answer))
        end = [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
        ids = (prompt + response + right + end)[:length]
        if len(ids) > len(prompt):
            parts = [PROMPT] * len(prompt) + [RESPONSE] * len(response) + [ANSWER] * len(right) + [RESPONSE] * len(end)
            rows.append((ids, parts[:length], tasks.index(example.task)))
    if not rows:
        raise Unsupported(f"no prompt of the {len(examples)} examples is shorter than length={length}, so no response is left")
    found = torch.zeros(len(rows), 3, max(len(ids) for ids, _, _ in rows), dtype=torch.int64)
    for row, (ids, parts, task) in zip(found, rows, strict=True):
        row[0, : len(ids)], row[1, : len(ids)], row[2] = torch.tensor(ids), torch.tensor(parts), task
    return found


def _pieces(example: Example) -> tuple[str, str]:
    """A response up to the right answer that it ends with, and this; they are made tokens apart, so that it is always the same ones."""
    found = bool(example.gold) and example.response.endswith(example.gold)
    return (example.response[: -len(example.gold)], example.gold) if found else (example.response, "")


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

"""Facts asked for behind long contexts that were read before: what a policy of attention or cache has thrown away cannot be answered.

A context goes through the model at once, as a prompt, and a policy does to it what it does to prompts. Each question then goes on from a
copy of what the engine holds, so that one pass over the context serves all of its questions and none sees another; token by token where
the policy decides after each. The answer is greedy, and right if it begins with the digits of the fact. What the engine holds of the
context is counted before the questions, and behind them some steps of decoding are timed.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from slimbench.harness.config.sections.suite import RetrievalConfig
from slimbench.harness.measure import protocols
from slimbench.harness.measure.dynamic.readings import Readings
from slimbench.harness.measure.loaded import Branches, Step
from slimbench.harness.measure.perplexity import public_name, token_stream
from slimbench.harness.measure.timer import timer
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.store.partial import Part
from slimbench.methods.base import Unsupported
from slimbench.tasks import retrieval
from slimbench.tasks.retrieval import Context, Question

_STEPS = 8
"""Steps of decoding that are timed behind a context, after one that is not."""


class Contexts:
    """The contexts of one length, as token ids.

    Args:
        tokenizer: The tokenizer of the source model.
        length: Tokens of each context, the one that begins a text not counted.
        add_bos: Put that before each.

    Attributes:
        contexts: Each with its questions.
        answer: Tokens that are written for a question: those of the longest right answer, and one that must not go on with digits.

    Raises:
        tasks.errors.DataError: The corpus cannot be read, or is too short.
    """

    def __init__(self, tokenizer: Any, config: RetrievalConfig, length: int, add_bos: bool = False) -> None:
        tokens, self.text_hash = token_stream(config.corpus, tokenizer)
        ends = {token for token in np.unique(tokens).tolist() if retrieval.ends_sentence(tokenizer.decode([token]))}

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        recipe = retrieval.Recipe(length, config.contexts, config.needles, config.questions, config.seed)
        self.contexts = retrieval.contexts(config.corpus, tokens, encode, ends, recipe)
        self.config, self.length, self.tokenizer = config, length, tokenizer
        self.start = [tokenizer.bos_token_id] if add_bos else []
        self.answer = 1 + max(len(encode(f" {question.gold}")) for context in self.contexts for question in context.questions)

    def ids(self, context: Context) -> torch.Tensor:
        """What is read before the questions, int64 [1, T]."""
        return torch.tensor([[*self.start, *context.ids]])

    def is_right(self, written: list[int], question: Question) -> bool:
        """Whether these tokens begin with the right digits."""
        return retrieval.is_right(self.tokenizer.decode(written, clean_up_tokenization_spaces=False), question.gold)


def measure(
    model: Branches,
    asked: Contexts,
    on_progress: Callable[[int, int], None],
    part: Part | None = None,
    readings: Readings | None = None,
) -> tuple[RetrievalResult, int]:
    """Ask for the facts of all contexts of a length.

    Args:
        on_progress: Called with contexts done and contexts in all.
        part: Keeps each context; what it has of an earlier attempt is not read again.
        readings: Contexts that were read before, and are read once for all policies that decide after them; None: each is read anew.

    Returns:
        The result, and how many tokens went through the model.

    Raises:
        methods.base.Unsupported: The policy or the engine does not allow that, or a context is longer than the model was made for.
    """
    model.check_scoring("exact", "chunk", "step", "suffix")
    questions = [(number, question) for number, context in enumerate(asked.contexts) for question in context.questions]
    room = max(_STEPS + 2, asked.answer + max(len(question.ids) for _, question in questions))
    if (most := len(asked.start) + asked.length + room) > model.max_length:
        raise Unsupported(f"a context of {asked.length:,} tokens and what follows are {most:,}, the model takes {model.max_length:,}")
    part, found, through, known = part or Part(), [], 0, len(asked.start) + asked.length
    on_progress(0, len(asked.contexts))
    for context in asked.contexts:
        key = [context.ids, [question.ids for question in context.questions]]
        found.append(part.once(key, 1, partial(_read_and_ask, model, asked, context, room, readings)))
        behind_each = sum(len(question.ids) + asked.answer - 1 for question in context.questions) + _STEPS + 1
        through += (0 if found[-1].get("reused") else known) + behind_each
        on_progress(len(found), len(asked.contexts))
    answers = [answer for one in found for answer in one["answers"]]
    held = [one["cache_bytes"] for one in found if one["cache_bytes"] is not None]
    result = RetrievalResult(
        protocol=f"retrieval-{protocols.RETRIEVAL}",
        corpus=public_name(asked.config.corpus),
        corpus_sha256=asked.text_hash,
        length=asked.length,
        needles=asked.config.needles,
        items_sha256=retrieval.sha256(asked.contexts),
        context=[number for number, _ in questions],
        depth=[round(question.depth, 4) for _, question in questions],
        correct=[int(asked.is_right(answer, question)) for answer, (_, question) in zip(answers, questions, strict=True)],
        answers_sha256=hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        cache_bytes=max(held, default=None),
        exact_keys=model.exact_share([(known, known + 1)], known),
        step_ms=[one["step_ms"] for one in found],
    )
    return result, through


def _read_and_ask(model: Branches, asked: Contexts, context: Context, room: int, readings: Readings | None) -> dict[str, Any]:
    """Token ids of the answers to the questions of a context, bytes that are held of it, median milliseconds of a step behind it, and
    whether an earlier pass over it was used.
    """
    ids = asked.ids(context)
    read, reused = readings.prefill(model, ids, room) if readings else (model.prefill(ids, room), False)
    held = model.cache_bytes(read.state)
    answers = [_answer(model, model.branch(read.state), question, asked.answer) for question in context.questions]
    step_ms = _milliseconds(model, Step(read.token, model.branch(read.state)))
    return {"answers": answers, "cache_bytes": held, "step_ms": step_ms, "reused": reused}


def _answer(model: Branches, state: Any, question: Question, tokens: int) -> list[int]:
    """What is written greedily behind a question, so many tokens."""
    ids = torch.tensor([question.ids])
    for piece in ids.split(1 if model.scoring == "step" else ids.shape[1], 1):
        logits, state = model.extend(piece, state)
    step = Step(logits[:, -1:].argmax(-1), state)
    written = [int(step.token)]
    while len(written) < tokens:
        step = model.decode_step(step)
        written.append(int(step.token))
    return written


def _milliseconds(model: Branches, step: Step) -> float:
    """Median time of some steps of decoding."""
    clock, taken = timer(model.device), list[float]()
    for repeat in range(_STEPS + 1):
        model.synchronize()
        start = clock.mark(model.synchronize)
        step = model.decode_step(step)
        took = clock.milliseconds(start, clock.mark(model.synchronize))
        if repeat:
            taken.append(took)
    return statistics.median(taken)

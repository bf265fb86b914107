"""How near a student comes to its teacher on prompts that no student saw: the examples that a recipe holds out.

Of each, the teacher's response is scored token by token behind the prompt in the model's own template, and behind what is given of the
response, as far as the model takes it; those of its tokens that are the model's likeliest are counted.
And the model answers itself, by the likeliest token each time, which is held against the response by ROUGE-L (F measure, without stems),
and against the right answer where there is one: it is right if what is written ends with it, whatever the case and the full stop behind it.
It is of the recipe's form if it came to an end and has the words that all responses of its task have, in their order.

A model can learn a teacher's manner and nothing else (Gudibande et al., arXiv 2305.15717), so these figures stand beside perplexity and
accuracy and in no ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from slimbench.harness.measure import protocols
from slimbench.harness.measure.loaded import Generates, Loaded, Scores, label_logprobs
from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.store.partial import Part
from slimbench.methods.base import Unsupported
from slimbench.tasks.teaching.recipe import Recipe
from slimbench.util.writing.answers import ends_with, rouge_l
from slimbench.util.writing.teaching import Example, chat_ids

MOST = 128
ANSWER_TOKENS = 96


def measure(
    loaded: Loaded,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    text_sha256: str,
    on_progress: Callable[[int, int], None],
    part: Part | None = None,
) -> tuple[ImitationResult, int]:
    """Hold a model against what its teacher wrote.

    Args:
        examples: Those that are held out; the first 128 count.
        recipe: By which they were made.
        text_sha256: Hash of the whole text.
        on_progress: Called with examples done and examples in all.
        part: Keeps each example.

    Returns:
        The result, and how many tokens went through the model.

    Raises:
        methods.base.Unsupported: The engine does not score, or there is nothing to score.
    """
    model, writer, part = Scores.of(loaded), Generates.of(loaded), part or Part()
    asked = [example for example in examples[:MOST] if example.response]
    if not asked:
        raise Unsupported("no example is held out")
    end = [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    found: list[tuple[float, int, int, bool, str]] = []
    through = 0
    for done, example in enumerate(asked, 1):
        prompt = chat_ids(tokenizer, (("user", example.prompt),))
        text = f" {example.response}" if example.given else example.response
        given, response = (tokenizer(of, add_special_tokens=False, verbose=False)["input_ids"] for of in (example.given, text))
        prompt, response = prompt + given, response + end
        prompt = prompt[-max(1, model.max_length - max(len(response), ANSWER_TOKENS)) :]
        found.append(tuple(part.once([prompt, response, ANSWER_TOKENS], 1, partial(_of, model, writer, tokenizer, prompt, response, end))))
        through += 2 * len(prompt) + len(response) + ANSWER_TOKENS
        on_progress(done, len(asked))
    written = [text for *_, text in found]
    result = ImitationResult(
        protocol=f"imitation-{protocols.IMITATION}",
        recipe=recipe.name,
        text_sha256=text_sha256,
        tasks=[example.task for example in asked],
        nll=[nll for nll, *_ in found],
        tokens=[tokens for _, tokens, *_ in found],
        rouge_l=[rouge_l(example.response, text) for text, example in zip(written, asked, strict=True)],
        right=[ends_with(text, example.gold) if example.gold else None for text, example in zip(written, asked, strict=True)],
        agreed=[agreed for _, _, agreed, *_ in found],
        formed=[ended and recipe.fits(example.task, text) for (*_, ended, text), example in zip(found, asked, strict=True)],
    )
    return result, through


def _of(model: Scores, writer: Generates, tokenizer: Any, prompt: list[int], response: list[int], end: list[int]) -> list[Any]:
    """Sum of −log p of a response in nats, its tokens, those that are the likeliest; whether the model ends, and what it answers itself."""
    ids = torch.tensor([prompt + response])
    logits, labels = model.logits(ids, len(prompt) - 1)[:, :-1], ids[:, len(prompt) :]
    scores, agreed = label_logprobs(logits, labels), logits.argmax(-1).cpu() == labels
    written = writer.generate(torch.tensor([prompt]), ANSWER_TOKENS, end)[0]
    text = tokenizer.decode([token for token in written if token not in end], skip_special_tokens=True)
    ended = not end or end[0] in written
    return [-float(scores.sum()), len(response), int(agreed.sum()), ended, str(text).strip()]

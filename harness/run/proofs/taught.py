"""A text as a teacher would have written it, and a tokenizer, for methods that are tried on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimbench.harness.config.sections.teaching import recipe
from slimbench.util.writing.teaching import HELD_OUT, TRAIN, Completion, Example, Request, write_examples

_ITEMS = 6


def write(name: str, folder: Path) -> Path:
    """A few examples of each task of a recipe, several of each item, in a new folder."""
    folder.mkdir()
    tasks = [(form.task, bool(form.gold)) for form in recipe(name).examples]
    texts = [
        Example(f"What is {n} and {n}?", f"It is {'so' * (sample + 1)} {2 * n}", task, str(n), str(2 * n) if gold else "")
        for n in range(_ITEMS)
        for sample in range(2)
        for task, gold in dict.fromkeys(tasks)
    ]
    write_examples(texts, folder / TRAIN)
    write_examples(texts[:1], folder / HELD_OUT)
    (folder / "manifest.json").write_text(json.dumps({"teacher": "a check", "recipe": name}))
    return folder


class Willing:
    """A teacher that says something fit to whatever it is asked: marks to who wants marks, else a sentence with the last number in it."""

    identity = "a check"

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See `util.writing.teaching.Teacher`."""
        for index, request in enumerate(requests):
            prompt = request.chat[-1][1]
            numbers = re.findall(r"answer is (\d+)", prompt) or ["0"]
            said = "8 3" if "mark" in prompt else f"Ask {request.hash[:6]} of {request.hash[6:12]}. The answer is {numbers[-1]}"
            yield index, Completion(said, "stop", len(prompt), len(said))


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of one token a byte, as far as so many reach, and one for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    vocabulary = {character: index for index, character in enumerate([*alphabet, "<eos>"])}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)

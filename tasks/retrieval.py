"""Facts hidden in a text, and questions that are asked once all of it was read.

A context is a stretch of a corpus with some facts between its sentences, each of them

    The pass code of NAME is DIGITS. Remember: DIGITS is the pass code of NAME.

A question is its beginning, up to the digits, in a paragraph of its own behind the context. All facts of a context have the same words, and
names, digits, places and the order of the questions come from a seed: who has read the context cannot know which of its facts will be asked
for, so that what is thrown away before the question is thrown away blindly.

Source: the passkeys of Mohtashami and Jaggi, Landmark attention, arXiv 2305.16300, §4.2; several of them as in Hsieh et al., RULER, arXiv
2404.06654, §3. Texts and words are those of slimbench.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.tasks.errors import DataError
from slimbench.util.hashing import digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FACT = " The pass code of {name} is {digits}. Remember: {digits} is the pass code of {name}."
QUESTION = "\n\nThe pass code of {name} is"
_NAMES = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jacob Karen Laura Martin Nora Oscar Paula "
    "Quentin Rosa Simon Teresa Victor Wanda Xavier Yvonne Zoe Arthur Bella Carlos Diana Edgar Fiona George"
)
NAMES = tuple(_NAMES.split())
DIGITS = 5
VERSION = 1
"""Raised when other contexts come of the same arguments."""
MOST = len(NAMES)
"""Facts of a context at most: each has a name of its own."""
_ANSWER = re.compile(r"\s*(\d+)")
_END = re.compile(r"[.!?][\"'”’)]*\s*")


@dataclass(frozen=True)
class Recipe:
    """How contexts of one length are made.

    Attributes:
        length: Tokens of each.
        count: Contexts.
        needles: Facts in each.
        questions: Of these, asked for.
        seed: Draws all that is drawn.
    """

    length: int
    count: int
    needles: int
    questions: int
    seed: int


@dataclass(frozen=True)
class Question:
    """What is asked behind a context.

    Attributes:
        ids: Token ids that follow those of the context.
        gold: The digits that are right.
        depth: Where the fact begins, as a share of the context.
    """

    ids: tuple[int, ...]
    gold: str
    depth: float


@dataclass(frozen=True)
class Context:
    """Token ids of a text with facts in it, and the questions in the order in which they are asked."""

    ids: tuple[int, ...]
    questions: tuple[Question, ...]


def fingerprint() -> str:
    """Of the words and names that all contexts are made with, and of how."""
    return digest([VERSION, FACT, QUESTION, NAMES, DIGITS])


def sha256(contexts: Sequence[Context]) -> str:
    """Hash of all items: contexts, questions and right answers in their order."""
    items = [[context.ids, [[question.ids, question.gold] for question in context.questions]] for context in contexts]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def is_right(written: str, gold: str) -> bool:
    """Whether a text begins with these digits and no others behind them."""
    found = _ANSWER.match(written)
    return found is not None and found[1] == gold


def ends_sentence(text: str) -> bool:
    """Whether a sentence may end with the text of a token."""
    return _END.fullmatch(text) is not None


def contexts(
    corpus: str, tokens: NDArray[np.integer], encode: Callable[[str], list[int]], ends: Collection[int], recipe: Recipe
) -> tuple[Context, ...]:
    """Contexts from stretches of a text that do not overlap; the same for the same arguments.

    Args:
        corpus: How a message calls the text.
        tokens: The whole of it, int [n].
        encode: Token ids of a piece of text, without those that mark its beginning.
        ends: Ids with which a sentence may end: facts stand behind these, or at the beginning.

    Raises:
        DataError: The text has fewer stretches, or facts would be more than half of a context.
    """
    import numpy as np

    places = len(tokens) // recipe.length
    if places < recipe.count:
        raise DataError(f"corpus {corpus} has {len(tokens):,} tokens, fewer than {recipe.count} contexts of {recipe.length:,}")
    rng = np.random.default_rng([recipe.seed, recipe.length])
    starts = np.sort(rng.choice(places, recipe.count, replace=False)) * recipe.length
    return tuple(_context(tokens[start : start + recipe.length].tolist(), encode, frozenset(ends), recipe, rng) for start in starts)


def _context(
    stretch: list[int], encode: Callable[[str], list[int]], ends: frozenset[int], recipe: Recipe, rng: np.random.Generator
) -> Context:
    """A context of which a stretch, as long as that, has the other sentences."""
    names = [NAMES[place] for place in rng.permutation(MOST)[: recipe.needles]]
    lowest = 10 ** (DIGITS - 1)
    codes = [str(lowest + drawn) for drawn in rng.choice(9 * lowest, recipe.needles, replace=False)]
    facts = [encode(FACT.format(name=name, digits=code)) for name, code in zip(names, codes, strict=True)]
    filler = stretch[: recipe.length - sum(map(len, facts))]
    if 2 * len(filler) < recipe.length:
        raise DataError(
            f"facts are more than half of a context of {recipe.length:,} tokens; take fewer than {recipe.needles}, or longer contexts"
        )
    allowed = [0, *(place for place, token in enumerate(filler, 1) if token in ends)]
    wanted = [(part + rng.random()) / recipe.needles * len(filler) for part in range(recipe.needles)]
    ids, begins, done = list[int](), list[int](), 0
    for fact, place in zip(facts, (allowed[bisect.bisect_right(allowed, at) - 1] for at in wanted), strict=True):
        ids += filler[done:place]
        begins.append(len(ids))
        ids += fact
        done = place
    ids += filler[done:]
    asked = rng.permutation(recipe.needles)[: recipe.questions]
    questions = [Question(tuple(encode(QUESTION.format(name=names[i]))), codes[i], begins[i] / recipe.length) for i in asked]
    return Context(tuple(ids), tuple(questions))

"""How alike texts are: ROUGE-L (Lin 2004), its F measure with equal weights, without stems, by the library `rouge_score`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Text:
    """A text and how often each of its words occurs."""

    text: str
    counts: Counter[str]

    @classmethod
    def of(cls, text: str) -> Text:
        return cls(text, Counter(words(text)))


def alike(text: Text, others: Iterable[Text], limit: float) -> bool:
    """Whether ROUGE-L of a text with one of others is above a limit.

    With n and m words of which k are common it is at most 2 k / (n + m); where that is not above the limit nothing else is computed.
    """
    size = text.counts.total()
    near = (other for other in others if 2 * (text.counts & other.counts).total() > limit * (size + other.counts.total()))
    return any(rouge_l(text.text, other.text) > limit for other in near)


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L of two texts, 0..1."""
    return float(_scorer().score(one, other)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: lower case, letters and digits alone."""
    from rouge_score.tokenizers import DefaultTokenizer

    return list(DefaultTokenizer(use_stemmer=False).tokenize(text))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])

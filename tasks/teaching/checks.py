"""What is kept of what a teacher wrote, and why the rest is not; every reason is counted.

An answer is data of a stranger. Before anything else is asked of it, it must be an answer at all: not empty, not longer than its limit
allows, without control characters, and without the marks by which templates of chats tell roles apart, with which a text could speak in
another's name to a model that is trained on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from slimbench.tasks.teaching.parts import Keep, Row
from slimbench.util.teaching import Completion, Sampling

CHARACTERS_PER_TOKEN = 32
"""A token of ordinary text has four; an answer of more than this many for each token of its limit is none."""

_MARKS = re.compile(r"<\|[^|>\n]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>", re.IGNORECASE)
_CANARY = re.compile(r"canary\s+guid", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def unfit(answer: Completion, sampling: Sampling) -> str | None:
    """Why an answer is none, or None where it is one."""
    if answer.finish in ("malformed", "refused"):
        return answer.finish
    if len(answer.text) > sampling.max_tokens * CHARACTERS_PER_TOKEN:
        return "longer than its limit"
    if not answer.text.strip():
        return "empty"
    if _CONTROL.search(answer.text):
        return "control characters"
    if _CANARY.search(answer.text):
        return "canary of a benchmark"
    return "marks of a chat" if _MARKS.search(answer.text) else None


class Checks:
    """The checks of one stage, with what passed them before."""

    def __init__(self, keep: Mapping[str, Keep]) -> None:
        self._keep = dict(keep)
        self._kept: dict[str, list[Text]] = {name: [] for name, rule in self._keep.items() if rule.unlike is not None}

    def know(self, row: Row) -> None:
        """Take a row as one that later ones must be unlike."""
        for name, kept in self._kept.items():
            kept.append(Text.of(row[name]))

    def refused(self, row: Row, answer: Completion | None = None) -> str | None:
        """Why a row does not stay, or None; a row that stays is one that later ones must be unlike."""
        for name, rule in self._keep.items():
            if reason := self._against(name, rule, row, answer):
                return reason
        self.know(row)
        return None

    def _against(self, name: str, rule: Keep, row: Row, answer: Completion | None) -> str | None:
        text = row[name]
        count, letters = len(text.split()), [c for c in text if c.isalpha()]
        if rule.finished and answer is not None and answer.finish == "length":
            return "cut at its limit"
        if rule.words and not rule.words[0] <= count <= rule.words[1]:
            return f"{name}: number of words"
        if rule.english and (not letters or sum(c.isascii() for c in letters) < rule.english * len(letters)):
            return f"{name}: not English"
        if any(re.search(pattern, text, re.IGNORECASE) for pattern in rule.without):
            return f"{name}: has what it must not"
        if not all(re.search(pattern, text, re.IGNORECASE) for pattern in rule.having):
            return f"{name}: lacks what it must have"
        if rule.one_of and plain(text) not in map(plain, rule.one_of):
            return f"{name}: none of the choices"
        if rule.at_least is not None and (number(text) is None or number(text) < rule.at_least):  # type: ignore[operator]
            return f"{name}: no number" if number(text) is None else f"{name}: too small"
        if rule.equals and not same(text, row[rule.equals]):
            return f"{name}: not {rule.equals}"
        if rule.other_than and same(text, row[rule.other_than]):
            return f"{name}: the same as {rule.other_than}"
        if rule.unlike is not None and alike(Text.of(text), self._kept[name], rule.unlike):
            return f"{name}: like an earlier one"
        return None


def plain(text: str) -> str:
    """A short answer as it is compared: without case, white space around it, quotes and the full stop behind it."""
    return text.strip().strip("\"'`*").rstrip(".").strip().casefold()


def number(text: str) -> Fraction | None:
    """The number that a short answer is, None where it is none."""
    found = _NUMBER.fullmatch(plain(text).lstrip("$€£").rstrip("%").strip())
    try:
        return Fraction(found[0].replace(",", "")) if found else None
    except (ValueError, ZeroDivisionError):
        return None


def same(one: str, other: str) -> bool:
    """Whether two short answers say the same."""
    first, second = number(one), number(other)
    return first == second if first is not None and second is not None else plain(one) == plain(other)


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
    """ROUGE-L (Lin 2004), its F measure with equal weights, without stems."""
    return float(_scorer().score(one, other)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: lower case, letters and digits alone."""
    from rouge_score.tokenizers import DefaultTokenizer

    return list(DefaultTokenizer(use_stemmer=False).tokenize(text))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])

"""What an answer of a model is, before anything is asked of it, when it is the right one, and how alike two are.

An answer is data of a stranger. It must be an answer at all: not empty, not longer than its limit allows, without control characters and
floods of white space, and without the marks by which templates of chats tell roles apart, with which a text could speak in another's name
to a model that is trained on it. It must not order its reader about, nor be code: no recipe asks for a language but the arithmetic of
`tasks.teaching.programs`. Patterns find what is plainly so, and no more. How alike texts are is ROUGE-L (Lin 2004), its F measure with
equal weights, without stems.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from slimbench.util.writing.teaching import Completion, Sampling

CHARACTERS_PER_TOKEN = 12
"""A token of ordinary text has four; an answer of more than this many for each token of its limit is none."""

_MARKS = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>|</?s>|<(?:eos|bos|pad|unk)>|\[/?INST\]|\[/?TOOL_\w+\]|<</?SYS>>|\[\|\w+\|\]|<(?:start|end)_of_turn>",
    re.IGNORECASE,
)
_CANARY = re.compile(r"canary\s{1,9}guid", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FLOOD = re.compile(r"\s{40}")
_ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\s+(?:\w+\s+){0,3}(?:previous|prior|above|earlier|preceding|your|system|safety)\s+(?:\w+\s+){0,2}"
    r"(?:instructions?|prompts?|directions|rules|guidelines)\b|\b(?:reveal|print|repeat|show)\s+(?:me\s+)?(?:your|the)\s+system\s+prompt\b"
    r"|\byou\s+are\s+now\s+(?:in\s+)?(?:dan|developer\s+mode|jailbroken|unrestricted)\b",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"^[ \t]*(?:```(?!py)\w|import\s+[\w.]+[ \t]*(?:$|[;,]|as\s)|from\s+[\w.]+\s+import\s"
    r"|def\s+(?!solution\b)\w+\s*\(|print\(|#!\s*/|#include\s*[<\"]|function\s+\w+\s*\([^)\n]{0,80}\)\s*\{|(?:\$\s*)?(?:sudo\s+\w|rm\s+-[rf]|(?:curl|wget)\s+(?:-|https?:)))"
    r"|\b(?:os\.(?:system|popen)|subprocess\.\w+|eval|exec|__import__|console\.log)\(|<script\b|<\?php\b",
    re.MULTILINE | re.IGNORECASE,
)
_NONE = (
    ("control characters", _CONTROL),
    ("white space", _FLOOD),
    ("canary of a benchmark", _CANARY),
    ("marks of a chat", _MARKS),
    ("orders its reader about", _ORDERS),
    ("code", _CODE),
)


def unfit(answer: Completion, sampling: Sampling) -> str | None:
    """Why an answer is none, or None where it is one."""
    if answer.finish in ("malformed", "refused"):
        return answer.finish
    if len(answer.text) > sampling.max_tokens * CHARACTERS_PER_TOKEN:
        return "longer than its limit"
    if not answer.text.strip():
        return "empty"
    return next((reason for reason, pattern in _NONE if pattern.search(answer.text)), None)


def plain(text: str) -> str:
    """A short answer as it is compared: without case, and without white space, quotes, marks of emphasis and full stops around it."""
    return text.strip().lstrip("\"'`* ").rstrip("\"'`*. \n").casefold()


def ends_with(text: str, gold: str) -> bool:
    """Whether an answer ends with the right one: as its own word or number, not as the end of a longer one."""
    said, right = plain(text), plain(gold)
    if not right or not said.endswith(right):
        return False
    before = said[: -len(right)]
    return not before or not (before[-1].isalnum() or before[-1] in "-.,/" or (before[-1] == "−"))


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
    return any(rouge_l(text.text, other.text) > limit for other in others if _at_most(text, other) > limit)


def likeness(texts: Iterable[Text], others: Sequence[Text]) -> float:
    """The largest ROUGE-L of one of some texts with one of others, 0..1; 0 where there is no pair.

    As in `alike`, only pairs are computed that may be above the largest one before them.
    """
    found = 0.0
    for text in texts:
        bounds = [(_at_most(text, other), place) for place, other in enumerate(others)]
        for bound, place in sorted(bounds, reverse=True):
            if bound <= found:
                break
            found = max(found, rouge_l(text.text, others[place].text))
    return found


def _at_most(one: Text, other: Text) -> float:
    return 2 * (one.counts & other.counts).total() / max(1, one.counts.total() + other.counts.total())


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

"""What is kept of what a teacher wrote, and why the rest is not; each reason is counted. What an answer is, `util.writing.answers` says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from slimbench.tasks.teaching.parts import Keep, Row
from slimbench.util.writing.answers import Text, alike, plain
from slimbench.util.writing.teaching import Completion

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


class Checks:
    """The checks of one stage, with what passed them before."""

    def __init__(self, keep: Mapping[str, Keep]) -> None:
        self._keep = dict(keep)
        self._kept: dict[str, list[Text]] = {name: [] for name, rule in self._keep.items() if rule.unlike is not None}

    def know(self, row: Row) -> None:
        """Take a row as one that later ones must be unlike."""
        for name, kept in self._kept.items():
            kept.append(Text.of(row.get(name, "")))

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
        if rule.outside and plain(text) in map(plain, row[rule.outside].split("\n")):
            return f"{name}: one of {rule.outside}"
        if rule.equals and not same(text, row[rule.equals]):
            return f"{name}: not {rule.equals}"
        if rule.other_than and same(text, row[rule.other_than]):
            return f"{name}: the same as {rule.other_than}"
        if rule.unlike is not None and alike(Text.of(text), self._kept[name], rule.unlike):
            return f"{name}: like an earlier one"
        return None


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

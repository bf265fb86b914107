"""Texts for people: the nearest valid choice, labels as parts of paths, and texts of strangers without what a terminal acts on."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from hashlib import sha256

_MOST_LISTED = 24


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the choices, for the end of a message; of many choices those that come nearest."""
    known = sorted(set(choices), key=_by_number)
    if hint := closest(word, known):
        return hint
    if len(known) > _MOST_LISTED:
        return f"; of {len(known)} choices the nearest are {', '.join(difflib.get_close_matches(word, known, n=6, cutoff=0))}"
    return f"; choices: {', '.join(known)}" if known else ""


def closest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no choice is like the word."""
    close = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _by_number(word: str) -> list[tuple[int, str]]:
    """The order of people: 32 before 128, `rtn-4bit` before `rtn-16bit`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", word)]


_LONGEST_NAME = 80


@functools.lru_cache(maxsize=4096)
def slug(label: str) -> str:
    """A label as one safe path component; long labels keep a hash of what was cut."""
    name = re.sub(r"[^A-Za-z0-9+_=.,-]+", "-", label).strip(".-") or "unnamed"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{sha256(label.encode()).hexdigest()[:8]}"


_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """A text without escape sequences, control characters (but for line feed and tab), marks of direction and lone surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _SEQUENCE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def csv_text(text: str) -> str:
    """A text that no spreadsheet runs as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def one_line(text: str) -> str:
    """A text as one line that any terminal shows as it is."""
    return " ".join(plain(text).split())

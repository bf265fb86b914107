"""Names for people: the nearest valid choice, and labels as parts of paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from hashlib import sha256


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of choices, for the end of a message."""
    known = sorted(set(choices), key=_by_number)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choices: {', '.join(known)}" if known else ""


def _by_number(word: str) -> list[tuple[int, str]]:
    """The order of people: 32 before 128, `rtn-4bit` before `rtn-16bit`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", word)]


_LONGEST_NAME = 80


def slug(label: str) -> str:
    """A label as one safe path component; long labels keep a hash of what was cut."""
    name = re.sub(r"[^A-Za-z0-9+_=.,-]+", "-", label).strip(".-") or "unnamed"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{sha256(label.encode()).hexdigest()[:8]}"

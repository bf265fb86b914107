"""Errors of data and assets: each message is one line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """Text, tasks or files are missing or unfit."""


class AssetError(DataError):
    """An asset is unknown, or could not be fetched whole."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of choices, for the end of a message."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choices: {', '.join(known)}" if known else ""

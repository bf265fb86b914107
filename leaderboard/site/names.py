"""Names of the pages. Made of letters, digits and a hash, never of raw text: nothing in a record can point outside the folder."""

from __future__ import annotations

import re
from hashlib import sha256

from slimbench.leaderboard.rows.row import Row

_LONGEST = 40


def slug(text: str) -> str:
    """A text as a file name: what can be read of it, and a hash that tells it from texts that read the same."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LONGEST].rstrip("-")
    return f"{name or 'unnamed'}-{_hash(text)[:6]}"


def cell_id(row: Row) -> str:
    """What identifies the page of a cell: a hash of its keys and hardware."""
    return _hash("\n".join(row.place))[:12]


def cell(row: Row) -> str:
    return f"cell/{cell_id(row)}.html"


def model(name: str) -> str:
    return f"model/{slug(name)}.html"


def method(name: str) -> str:
    return f"method/{slug(name)}.html"


def _hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

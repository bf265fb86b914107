"""Hashes of values and of files."""

from __future__ import annotations

import hashlib
import json
from hashlib import sha256
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Sixteen hex digits of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def short_hash(*parts: object) -> str:
    """Twelve hex digits that identify the given values."""
    return sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:12]


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

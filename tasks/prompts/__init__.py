"""Prompts that a model goes on from freely: five kinds of twenty, written for slimbench and under its licence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimbench.tasks.errors import DataError

PACKAGED = Path(__file__).parent / "prompts.yaml"
_LONGEST = 2000


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order.

    Attributes:
        kinds: What each is, such as `question`.
        texts: Each as it is given to a tokenizer.
    """

    kinds: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of kinds and texts in their order; how the file writes them down changes nothing."""
        return hashlib.sha256(json.dumps([self.kinds, self.texts]).encode()).hexdigest()


def load(file: Path = PACKAGED) -> Prompts:
    """The prompts of a YAML file: under the name of each kind the list of its texts.

    Raises:
        DataError: The file is not readable or not of that form, or a text is empty, begins or ends with white space (where a tokenizer cuts
            otherwise than in running text), is longer than 2,000 characters or stands there twice.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"prompts {file.name}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"prompts {file.name}: the name of each kind with the list of its texts is needed")
    asked: list[tuple[str, str]] = []
    for kind, texts in content.items():
        if not isinstance(kind, str) or not isinstance(texts, list) or not texts:
            raise DataError(f"prompts {file.name}: {kind!r} is no name of a kind with a list of texts")
        asked += [(kind, _checked(text, f"prompts {file.name}: text {number} of {kind}")) for number, text in enumerate(texts, 1)]
    kinds, given = zip(*asked, strict=True)
    twice = next((number for number, text in enumerate(given) if text in given[:number]), None)
    if twice is not None:
        raise DataError(f"prompts {file.name}: {given[twice][:40]!r} of {kinds[twice]} stands there twice")
    return Prompts(kinds, given)


def _checked(text: Any, place: str) -> str:
    if not isinstance(text, str) or not text:
        raise DataError(f"{place} is no text; quote it")
    if text != text.strip():
        raise DataError(f"{place} begins or ends with white space")
    if len(text) > _LONGEST:
        raise DataError(f"{place} has {len(text):,} characters, {_LONGEST:,} at most are allowed")
    return text

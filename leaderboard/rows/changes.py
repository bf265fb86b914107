"""What of a suite is the user's own: its settings beside those of the shipped suite of that name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.config.sections.suite import RetrievalConfig
from slimbench.harness.config.sources import choice

_APART = ("name", "batch_tokens")
"""What changes no number."""
_LONGEST = 40


def protocol(section: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a suite that define its numbers, local files without their path: the text, not its place, makes a table.

    What is None is off, as in keys: a record from before there was such a setting stands in the same table.
    """
    fields = {name: value for name, value in section.items() if name not in _APART and value is not None}
    return {name: _placeless(name, value) for name, value in fields.items()}


def changes(section: Mapping[str, Any]) -> str | None:
    """`corpus=file:corpus.txt, windows=4`: where a suite differs from the shipped one of its name; None where it does not."""
    return ", ".join(_differences(section, _shipped(str(section.get("name"))))) or None


def _differences(section: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    for name, value in section.items():
        if name not in shipped or name in _APART or _listed(value) == _listed(shipped[name]):
            continue
        if isinstance(value, dict):
            usual = shipped[name] if isinstance(shipped[name], dict) else dict.fromkeys(RetrievalConfig.model_fields)
            yield from (f"{name}.{text}" for text in _differences(value, usual))
        else:
            yield f"{name}={_written(name, value)}"


@cache
def _shipped(name: str) -> dict[str, Any]:
    """The suite of that name, all its settings; empty where there is none."""
    try:
        return SuiteConfig.model_validate(choice("suite", name)).model_dump()
    except (ConfigError, ValueError):
        return {}


def _placeless(name: str, value: Any) -> Any:
    """The value of a setting without where its file lies."""
    if name == "include_path" and isinstance(value, list) and len(value) < 2:
        return _placeless(name, value[0] if value else None)  # as it was written when there could be but one
    if name in ("corpus", "include_path") and isinstance(value, list):
        return [_placeless(name, spec) for spec in value]
    if isinstance(value, dict):
        return {key: _placeless(key, part) for key, part in value.items()}
    return "file:" if _is_place(name, value) else value


def _is_place(name: str, value: Any) -> bool:
    """Whether a value names something on the user's disk: a corpus by `file:`, a folder of tasks by anything but an asset."""
    if not isinstance(value, str):
        return False
    return value.startswith("file:") if name == "corpus" else name == "include_path" and ":" not in value


def _listed(value: Any) -> Any:
    """A choice of one thing may be written without a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _written(name: str, value: Any) -> str:
    """A value as on the command line; of what lies on a disk its name alone, of a long list how much there is."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        text = f"[{','.join(_written(name, item) for item in value)}]"
        return text if len(text) <= _LONGEST else f"[{len(value)} of them]"
    text = "null" if value is None else str(value)
    if _is_place(name, value):
        return f"file:{PurePosixPath(text.removeprefix('file:')).name}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

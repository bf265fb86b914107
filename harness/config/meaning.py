"""What settings mean: the `Attributes` sections of the docstrings of the classes that hold them."""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any, Literal

_ENTRY = re.compile(r"(\w+)(?: \([^)]*\))?: (.*)")


def meanings(cls: type) -> dict[str, str]:
    """The meaning of each attribute, one line each; a class's own words hold before those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of an `Attributes:` section."""
    lines = iter(docstring.splitlines())
    found: dict[str, str] = {}
    last = ""
    for line in lines:
        if line.strip() == "Attributes:":
            break
    for line in lines:
        if line and not line.startswith("    "):
            break
        if entry := _ENTRY.fullmatch(line[4:]):
            last, found[entry[1]] = entry[1], entry[2]
        elif line.strip() and last:
            found[last] += f" {line.strip()}"
    return found


_MANY = {int: "integers", float: "numbers", str: "texts"}


def choices(annotation: Any) -> str:
    """The values that a type allows, in words: `2, 3, 4 or 8`, `any integer`, and `null` where None is one of them."""
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is typing.Annotated:
        return choices(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is Literal:
        return _joined([_plain(value) for value in typing.get_args(annotation)])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return _joined([part for each in typing.get_args(annotation) for part in choices(each).split(" or ")])
    if typing.get_origin(annotation) is tuple:
        return f"a list of {_MANY.get(typing.get_args(annotation)[0], 'values')}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}.get(annotation, "")


def _plain(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _joined(words: list[str]) -> str:
    *first, last = [word for each in words for word in each.split(", ")]
    return f"{', '.join(first)} or {last}" if first else last

"""Templates and what all pages share. Every text of a record goes through autoescape."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from slimbench.leaderboard.tables.format import shorten

HERE = Path(__file__).parent
_BREAK = re.compile(r"(?<=[+,(/_:])")
_QUOTE = re.compile(r"`([^`]+)`")
LONGEST_NAME = 120
LONGEST_REMARK = 240
NAVIGATION = (
    ("index.html", "Ranking"),
    ("models.html", "Models"),
    ("methods.html", "Methods"),
    ("figures.html", "Figures"),
    ("apart.html", "Told apart"),
    ("coverage.html", "Coverage"),
    ("guide.html", "Guide"),
)


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    made.filters |= {
        "name": lambda text: shorten(text, LONGEST_NAME),
        "remark": lambda text: shorten(text, LONGEST_REMARK),
        "breaks": _breaks,
        "quoted": quoted,
        "dedent": dedent,
    }
    made.globals |= {"navigation": NAVIGATION}
    return made


def page(template: str, path: str, title: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        template: Its file name below `templates/`.
        path: Where it will lie in the folder of the board: links lead from there.
        title: What it is about; cut to a readable length.
    """
    root = "../" * path.count("/")
    return environment().get_template(template).render(root=root, path=path, title=shorten(title, LONGEST_NAME), **values)


def quoted(text: str) -> Markup:
    """The text, escaped, with what stands between backticks as code."""
    return Markup(_QUOTE.sub(r"<code>\1</code>", str(escape(text))))


def _breaks(text: str) -> Markup:
    """The text, escaped, with places where a long name may go on in the next line."""
    return Markup("<wbr>").join(_BREAK.split(text))

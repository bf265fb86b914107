"""Pages of the methods: what each is, from the registry, and its results on every model. Imports no model library."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from slimbench.harness.config.meaning import meanings
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.steps import names as names_of
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.lines import Line, heads
from slimbench.leaderboard.site.pages import page, quoted
from slimbench.leaderboard.site.standing import beside_rounding
from slimbench.leaderboard.tables.format import shorten

_LONGEST_DOC = 4000
_WRITTEN_HERE = "written here from the paper"


@dataclass(frozen=True)
class About:
    """What is known of a method: nothing but its name where only records name it."""

    name: str
    command: str = ""
    family: str = ""
    title: str = ""
    year: int | None = None
    reference: str = ""
    lead: str = ""
    doc: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    settings: Sequence[tuple[str, str, str]] = ()


@cache
def registry() -> tuple[list[About], list[tuple[str, str]]]:
    """Every method of the configuration, and each that could not be loaded with the reason."""
    from slimbench.harness.config.registry import entry
    from slimbench.harness.config.sources import shipped

    found, broken = [], []
    for name in shipped("method"):
        try:
            found.append(_about(entry(name)))
        except Exception as error:  # one broken file must not take the board down
            broken.append((name, f"{type(error).__name__}: {error}"))
    return found, broken


def _about(entry: Any) -> About:
    method = entry.method
    citation = method.citation
    facts = {
        "Family": method.family,
        "Paper": f"{citation.title}, {citation.year}" + (f", arXiv:{citation.arxiv}" if citation.arxiv else ""),
        "Reference implementation": _WRITTEN_HERE if method.reference == "paper" else method.reference,
        "Needs": entry.needs if isinstance(entry.needs, str) else ", ".join(map(str, entry.needs)),
        "Format of the artefact": method.produces,
        "Stands for": ", ".join(citation.covers),
        "Module": type(method).__module__,
    }
    module = _paragraphs(sys.modules[type(method).__module__].__doc__)
    meaning = meanings(type(method))
    return About(
        name=entry.name,
        command=shlex.join(["slimbench", "run", f"method={entry.pipeline}"]),
        family=method.family,
        title=citation.title,
        year=citation.year,
        reference=method.reference,
        lead=module[0] if module else "",
        doc=[paragraph for paragraph in _paragraphs(type(method).__doc__) if not paragraph.startswith("Attributes:")],
        notes=module[1:],
        facts=[(name, value) for name, value in facts.items() if value],
        settings=[(name, value, quoted(meaning.get(name, ""))) for name, value in entry.shipped.items()],
    )


def _paragraphs(doc: str | None) -> list[str]:
    text = shorten(inspect.cleandoc(doc or ""), _LONGEST_DOC)
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def users(board: Board) -> dict[str, list[Row]]:
    """The rows in whose pipeline a method stands, by its name."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in board.rows:
        for name in steps(board, row):
            found[name].append(row)
    return found


def steps(board: Board, row: Row) -> list[str]:
    """Names of the methods of a row's pipeline."""
    bearer = board.bearer(row)
    return list(dict.fromkeys(clean(name) for name in names_of(bearer.cell))) if bearer else []


def index(abouts: Iterable[About], broken: Sequence[tuple[str, str]], used: dict[str, list[Row]]) -> str:
    methods = [
        {
            "name": about.name,
            "href": names.method(about.name),
            "family": about.family or "–",
            "title": about.title or "only records name it",
            "year": about.year,
            "reference": _WRITTEN_HERE if about.reference == "paper" else about.reference,
            "cells": len(used.get(about.name, ())),
            "models": len({row.model for row in used.get(about.name, ())}),
        }
        for about in abouts
    ]
    return page("methods.html.j2", "methods.html", "Methods", methods=methods, broken=broken)


def render(board: Board, about: About, rows: Sequence[Row], lines: dict[str, Line]) -> str:
    """The page of one method with its rows, set by set."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.table_key].append(row)
    sections = [
        {
            **setting,
            "lines": [lines[names.cell(row)] for row in groups[key]],
            "heads": heads(board, number),
            "standing": [found for row in groups[key] if row.rank is not None and (found := beside_rounding(board, row))],
        }
        for number, (table, setting) in enumerate(zip(board.tables, board.settings, strict=True))
        if (key := table.rows[0].table_key) in groups
    ]
    return page("method.html.j2", names.method(about.name), about.name, name=about.name, about=about, sections=sections)

"""Every text of a flag that the code can write, read from its source."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from functools import cache

from tests.support.paths import ROOT

SOURCES = ("harness", "leaderboard", "methods", "tasks", "src/slimbench/util")
FILLED = "7"
"""What stands for a value that is filled in."""
WRITERS = {
    "harness/measure/dynamic/causality.py": ("Seen.flags",),
    "harness/measure/dynamic/drawn.py": ("Drawn.flag",),
    "harness/measure/dynamic/texts.py": ("untimed", "unexercised"),
    "harness/measure/dynamic/unseen.py": ("uncalled", "untold"),
    "harness/measure/dynamic/work.py": ("without_pass",),
    "harness/measure/generation.py": ("unguessed",),
    "harness/measure/machine.py": ("LoadWatch.read",),
    "harness/schema/evidence.py": ("simulation",),
    "harness/store/partial.py": ("Journal.remarks",),
    "leaderboard/flags/collect.py": ("_cut_off", "_grid_of_the_source"),
    "leaderboard/flags/declared.py": ("declared", "_training"),
    "leaderboard/flags/facts.py": ("of_speed", "_guessed", "_above_the_bytes", "of_quality", "never_exercised"),
    "leaderboard/flags/joined.py": ("strangers", "_elsewhere", "_of_other_bytes", "other_code"),
    "leaderboard/rows/results/quality.py": ("losses",),
}
"""Functions all of whose texts with a space are flags, beside those that have `flags` in their name."""
READERS = {
    "harness/cli/methods.py": "prints those of a check",
    "harness/cli/records.py": "prints those of rows",
    "harness/launch/alternating.py": "prints those of a record",
    "harness/measure/hardware.py": "instructions of a processor",
    "harness/schema/hardware.py": "instructions of a processor",
    "leaderboard/compare/compare.py": "reads those of rows",
    "leaderboard/compare/crossover.py": "reads those of rows",
    "leaderboard/compare/retrieval.py": "reads those of rows",
    "leaderboard/compare/verdict.py": "prints those of rows",
    "leaderboard/flags/kinds.py": "tells them apart",
    "leaderboard/advice.py": "prints those of a row",
    "leaderboard/recommend.py": "reads and prints those of rows",
    "leaderboard/site/standing.py": "reads those of rows",
    "leaderboard/site/cell.py": "prints those of a row",
    "leaderboard/site/facts.py": "prints those of a row",
    "leaderboard/site/lines.py": "prints those of a row",
    "leaderboard/site/ranking.py": "reads those of a row",
    "leaderboard/rows/results/retrieval.py": "reads those of a row",
    "leaderboard/figures/measures.py": "reads those of rows",
    "leaderboard/tables/tables.py": "reads those of rows",
    "leaderboard/tables/columns.py": "prints those of a row",
    "leaderboard/tables/readme.py": "of a regular expression",
    "leaderboard/tables/verdict.py": "reads those of a row",
    "leaderboard/verdicts/gate.py": "prints those of a row",
    "leaderboard/verdicts/judged.py": "reads those of a row",
    "leaderboard/tracking/wandb.py": "sends those of a row",
}
"""Modules that name flags and write none."""


@cache
def texts() -> dict[str, str]:
    """Each text, with what is filled in as `7`, and the module that writes it."""
    found: dict[str, str] = {}
    for file in sorted(path for top in SOURCES for path in (ROOT / top).rglob("*.py")):
        module = file.relative_to(ROOT).as_posix()
        for text in _of_module(module, ast.parse(file.read_text())):
            found.setdefault(text, module)
    return found


def modules() -> set[str]:
    """The modules in which something is called `flags`."""
    files = [path for top in SOURCES for path in (ROOT / top).rglob("*.py")]
    return {file.relative_to(ROOT).as_posix() for file in files if any(map(_is_flags, ast.walk(ast.parse(file.read_text()))))}


def _of_module(module: str, tree: ast.Module) -> Iterator[str]:
    if module in READERS:
        return
    for name, function in _functions(tree):
        whole = name in WRITERS.get(module, ()) or "flags" in function.name
        for statement in _statements(function):
            if whole or any(map(_is_flags, ast.walk(statement))):
                yield from _templates(statement)


def _functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = f"{inside}.{node.name}".strip(".")
            if isinstance(node, ast.FunctionDef):
                yield name, node
            yield from _functions(node, name)


def _statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """The simple statements of a function, its docstring apart, and those of no function inside it."""
    pending: list[ast.AST] = list(function.body[1:] if ast.get_docstring(function) else function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt | ast.excepthandler | ast.match_case)]
        if parts:
            pending += parts
        elif isinstance(node, ast.stmt):
            yield node


def _is_flags(node: ast.AST) -> bool:
    return (
        (isinstance(node, ast.Name) and node.id == "flags")
        or (isinstance(node, ast.Attribute) and node.attr == "flags")
        or (isinstance(node, ast.keyword) and node.arg == "flags")
        or (isinstance(node, ast.Constant) and node.value == "flags")
        or (isinstance(node, ast.FunctionDef) and "flags" in node.name)
    )


def _templates(node: ast.AST) -> Iterator[str]:
    """The texts in a statement, outermost ones only."""
    if isinstance(node, ast.JoinedStr | ast.Constant | ast.IfExp | ast.BoolOp):
        versions = list(_versions(node))
        if isinstance(node, ast.JoinedStr | ast.Constant):
            yield from (text for text in versions if " " in text)
            return
    for child in ast.iter_child_nodes(node):
        yield from _templates(child)


def _versions(node: ast.AST) -> Iterator[str]:
    """What an expression may give as a text."""
    if isinstance(node, ast.Constant):
        yield node.value if isinstance(node.value, str) else FILLED
    elif isinstance(node, ast.IfExp):
        yield from itertools.chain(_versions(node.body), _versions(node.orelse))
    elif isinstance(node, ast.JoinedStr):
        yield from map("".join, itertools.product(*map(list, map(_versions, node.values))))
    elif isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp | ast.JoinedStr):
        yield from _versions(node.value)
    else:
        yield FILLED


def called(module: str, name: str) -> set[str]:
    """The functions that a function of a module calls, by their last name."""
    (function,) = [found for known, found in _functions(ast.parse((ROOT / module).read_text())) if known == name]
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}

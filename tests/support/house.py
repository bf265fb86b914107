"""Holds the house to its plan: `python tests/support/house.py` prints one line for each fault and ends with 1 if there is one.

No import circles, no module that the check of arrows does not see, no long module, no crowded room.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import grimp

MOST_LINES = 400
MOST_MODULES = 14
MOST_ALIKE = 24
ALIKE = {
    "harness/cli": "a command",
    "harness/engines": "an engine",
    "harness/measure": "a measurement",
    "leaderboard/figures": "a kind of figure",
    "leaderboard/site": "a kind of page",
    "methods/formats": "a format",
    "methods/quantization/weight": "a technique",
    "methods/quantization/activation": "a technique",
}
"""Rooms of one file a thing, and the thing."""


def missing(files: list[str], modules: set[str]) -> Iterator[str]:
    """Files that git holds and the graph of imports does not.

    Args:
        files: Python files below the import name, such as `slimbench/harness/run/cell.py`.
        modules: Dotted names.
    """
    for file in files:
        name = ".".join(PurePosixPath(file).with_suffix("").parts).removesuffix(".__init__")
        if name not in modules:
            yield f"{file}: import-linter does not see it; does its folder lack an __init__.py?"


def circles(imports: Mapping[str, set[str]]) -> Iterator[str]:
    """Groups of modules that import each other, by whatever way: Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            position = stack.index(module)
            yield stack[position:]
            del stack[position:]

    for module in sorted(imports):
        if module not in index:
            yield from (f"import circle: {' ↔ '.join(sorted(group))}" for group in visit(module) if len(group) > 1)


def long(lines: Mapping[str, int]) -> Iterator[str]:
    for file, count in lines.items():
        if count > MOST_LINES:
            yield f"{file}: {count} lines; a module has at most {MOST_LINES}"


def crowded(files: list[str]) -> Iterator[str]:
    for room, count in Counter(str(PurePosixPath(file).parent) for file in files if not file.endswith("/__init__.py")).items():
        if count > (most := MOST_ALIKE if room in ALIKE else MOST_MODULES):
            yield f"{room}: {count} modules; a room has at most {most}"


def faults(root: Path) -> Iterator[str]:
    """One line for each fault of the house below a folder."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [file for file in listed if not file.startswith("tests/") and (root / file).is_file()]
    graph = grimp.build_graph("slimbench", cache_dir=None)
    yield from missing([f"slimbench/{file.removeprefix('src/slimbench/')}" for file in files], graph.modules)
    yield from circles({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    yield from long({file: len((root / file).read_text().splitlines()) for file in files})
    yield from crowded(files)
    yield from (f"{room}: named among the rooms of one file a thing, but it is gone" for room in ALIKE if not (root / room).is_dir())


if __name__ == "__main__":
    lines = list(faults(Path(__file__).parents[2]))
    print("\n".join(lines) or "the house is in order")
    sys.exit(bool(lines))

"""The shell blocks of README and docs: which there are, how each is checked, and the commands in them.

A block begins with ```` ```sh MARK ````. `run`: it is executed, on a tiny model. `plan`: its cells are composed. `parse`: its commands and
options exist.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

MARKS = ("run", "plan", "parse")
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md"), key=lambda file: (file.stem != "use", file.stem)),
]
"""In the order in which a reader works through them: what `use.md` measures, the others look at."""
_BLOCK = re.compile(r"^```sh(?P<mark>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block of a file; `line` is where it begins."""

    file: Path
    line: int
    mark: str
    body: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Its commands as words, comments left out."""
        lines = [line.strip() for line in self.body.replace("\\\n", " ").splitlines()]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(*marks: str) -> list[Block]:
    """The blocks of all documents that have one of the marks; all of them if none is named."""
    found = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            found.append(Block(file, text.count("\n", 0, match.start()) + 1, match["mark"].strip(), match["body"]))
    return [block for block in found if not marks or block.mark in marks]

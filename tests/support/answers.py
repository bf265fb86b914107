"""What the command line answers to words, in this process and in an empty folder."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from slimbench.harness.cli import main as cli
from slimbench.harness.launch import sweep
from slimbench.util.text import plain


@dataclass(frozen=True)
class Answer:
    """The exit code, what was printed, and the paths that are in the folder afterwards and were not before."""

    code: int
    out: str
    err: str
    written: list[str]

    @property
    def is_one_line(self) -> bool:
        """The standard error holds one line that any terminal shows as it is."""
        line = self.err.removesuffix("\n")
        return line.startswith("error: ") and line.isprintable() and plain(line) == line and "Traceback" not in line


def answer(words: Sequence[str], folder: Path) -> Answer:
    """Give words to `slimbench` in a folder. What they would launch is not: it fails the test."""
    out, err, before = io.StringIO(), io.StringIO(), _below(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["slimbench", *words])
        patch.setattr(sweep, "launch", _launched)
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Answer(code, out.getvalue(), err.getvalue(), sorted(_below(folder) - before))


def _launched(*_: object) -> None:
    raise AssertionError("something was launched")


def _below(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)}

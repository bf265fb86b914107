"""What counts as the code behind a function, on small modules of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.util import syntax

MODULES = {
    "own_method.py": '''
"""Words."""
from __future__ import annotations
from dataclasses import dataclass
from own_helper import halve
import own_effect

LIMIT = 3
OTHER = 4

@dataclass(frozen=True)
class Method:
    """Words."""
    name = "toy"
    bits: int = LIMIT

    def compress(self, x):
        # a comment
        return round(halve(x))

def unrelated():
    return OTHER
''',
    "own_helper.py": "def halve(x):\n    return x / 2\n\ndef third(x):\n    return x / 3\n",
    "own_effect.py": "import torch\ntorch.set_default_dtype(torch.float32)\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(syntax, "_hashes", {})
    monkeypatch.setattr(syntax, "_LOOK_S", -1.0)
    return tmp_path


def code() -> str:
    return syntax.code_hash(["own_method.Method"], [])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("own_method.py", "round(", "int("),
        ("own_method.py", "LIMIT = 3", "LIMIT = 5"),
        ("own_helper.py", "x / 2", "x / 4"),
        ("own_effect.py", "float32", "float64"),
        ("own_method.py", "from own_helper import halve", "from own_helper import third as halve"),
    ],
)
def test_what_it_reaches_counts(folder: Path, file: str, old: str, new: str) -> None:
    before = code()
    (folder / file).write_text(MODULES[file].replace(old, new))
    assert code() != before
    (folder / file).write_text(MODULES[file])
    assert code() == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("own_method.py", "OTHER = 4", "OTHER = 5"),
        ("own_method.py", "# a comment", ""),
        ("own_method.py", "Words.", "Other words."),
        ("own_method.py", '"toy"', '"toy-2"'),
        ("own_method.py", "bits: int", "bits: 'int'"),
        ("own_helper.py", "x / 3", "x / 4"),
        ("own_method.py", "from own_helper import halve\n", "import own_helper\n"),
    ],
)
def test_the_rest_does_not(folder: Path, file: str, old: str, new: str) -> None:
    before = code()
    text = MODULES[file].replace(old, new)
    (folder / file).write_text(text.replace("halve(x))", "own_helper.halve(x))") if "import own_helper\n" in new else text)
    assert code() == before


def test_a_file_that_is_compiled_counts_with_what_it_includes(folder: Path) -> None:
    (folder / "own_method.py").write_text("SOURCE = 'kernel.cu'\n\ndef Method():\n    return SOURCE\n")
    (folder / "kernel.cu").write_text('#include "head.cuh"\n')
    (folder / "head.cuh").write_text("1")
    before = code()
    (folder / "head.cuh").write_text("22")
    assert code() != before


def test_a_target_without_source_is_said(folder: Path) -> None:
    with pytest.raises(LookupError, match="defines no 'Absent'"):
        syntax.code_hash(["own_method.Absent"], [])
    with pytest.raises(LookupError, match="'no_such_module' has no source"):
        syntax.code_hash(["no_such_module.Absent"], [])

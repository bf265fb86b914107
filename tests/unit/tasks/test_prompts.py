"""The packaged prompts, and files of prompts that are none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from slimbench.tasks import prompts
from slimbench.tasks.errors import DataError


def test_there_are_five_kinds_of_twenty_and_each_goes_on_in_mid_text() -> None:
    packaged = prompts.load()
    assert set(Counter(packaged.kinds).values()) == {20} and len(set(packaged.kinds)) == 5
    assert len(set(packaged.texts)) == len(packaged.texts) == len(packaged.kinds)
    assert all(text.isascii() and 20 < len(text) < 200 for text in packaged.texts)
    assert "under its licence (Apache-2.0)" in prompts.PACKAGED.read_text().splitlines()[0]


def test_the_hash_is_of_kinds_and_texts_not_of_how_they_are_written(tmp_path: Path) -> None:
    def sha256(text: str) -> str:
        (tmp_path / "prompts.yaml").write_text(text)
        return prompts.load(tmp_path / "prompts.yaml").sha256

    first = sha256("a: ['one', 'two']\nb: ['three']\n")
    assert sha256("# other words\na:\n  - one\n  - two\nb:\n  - three\n") == first
    others = ["a: ['two', 'one']\nb: ['three']\n", "a: ['one', 'two', 'three']\n", "a: ['one', 'two!']\nb: ['three']\n"]
    assert len({first, *map(sha256, others)}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not readable as YAML"),
        ("", "the name of each kind with the list of its texts is needed"),
        ("- one\n", "the name of each kind with the list of its texts is needed"),
        ("a: one\n", "'a' is no name of a kind with a list of texts"),
        ("a: []\n", "'a' is no name of a kind with a list of texts"),
        ("1: [one]\n", "1 is no name of a kind with a list of texts"),
        ("a: [one, 2]\n", "text 2 of a is no text; quote it"),
        ("a: [one, '']\n", "text 2 of a is no text; quote it"),
        ("a: ['one ']\n", "text 1 of a begins or ends with white space"),
        (f"a: ['{'x' * 2001}']\n", "text 1 of a has 2,001 characters, 2,000 at most are allowed"),
        ("a: [one]\nb: [one]\n", "'one' of b stands there twice"),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        prompts.load(tmp_path / "mine.yaml")
    assert str(caught.value).startswith(f"prompts mine.yaml: {message}") and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts none\.yaml: not readable"):
        prompts.load(tmp_path / "none.yaml")

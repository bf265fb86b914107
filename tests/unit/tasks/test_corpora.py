"""Corpora and calibration windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from slimbench.tasks import calibration, corpora
from slimbench.tasks.corpora import DataError


def test_file_is_one_document(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("First.\n\nSecond ü.\n", encoding="utf-8")
    corpus = corpora.load(f"file:{file}")
    assert corpus.documents == ["First.\n\nSecond ü.\n"] and corpus.text == corpus.documents[0]
    assert corpus.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_folder_has_a_document_a_file_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    corpus = corpora.load(f"file:{tmp_path}")
    assert corpus.documents == ["a.txt", "b.txt"] and corpus.text == "a.txt\n\nb.txt"


def test_fingerprint_of_a_file_follows_its_content(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("same")
    second.write_text("same")
    before = corpora.fingerprint(f"file:{first}")
    assert before == corpora.fingerprint(f"file:{second}")
    first.write_text("other")
    assert corpora.fingerprint(f"file:{first}") != before


def test_fingerprints_of_hub_data_follow_the_revision():
    specs = ["hf:org/set:main:test:text", "hf:org/set@v2:main:test:text", "hf:org/set:main:train:text"]
    assert len({corpora.fingerprint(spec) for spec in specs}) == 3


def test_fingerprints_of_named_corpora_need_no_fetch_and_differ():
    names = list(corpora.catalogue())
    assert len({corpora.fingerprint(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lee-new", "no corpus 'lee-new'; did you mean 'lee-news'"),
        ("file:{folder}/tex.txt", r"there is no file .*tex\.txt; did you mean 'text\.txt'"),
        ("file:{folder}/empty", r"empty has no \.txt file"),
        ("file:{folder}/blank.txt", "holds no text"),
        ("file:{folder}/latin.txt", "is no UTF-8 text"),
        ("hf:org/set", "is not of the form hf:PATH"),
        ("hf:org/set:config:test:", "is not of the form hf:PATH"),
    ],
)
def test_mistakes_are_one_line(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        corpora.load(spec.format(folder=tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of four rows in the hub's layout, and a cache of its own for it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "part").mkdir(parents=True)
    rows = [{"text": text, "id": index} for index, text in enumerate(["", " = Title = \n", "Body.\n", "More."])]
    (folder / "part" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_hub_rows_keep_their_order_and_the_empty_ones(data_set):
    spec = f"hf:{data_set}:part/rows.jsonl:test:text"
    assert corpora.load(spec).text == "\n\n = Title = \n\n\nBody.\n\n\nMore."
    assert corpora.load(spec.replace(":test:", ":test[1:3]:")).documents == [" = Title = \n", "Body.\n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [((":text", ":txt"), "has no field 'txt'; did you mean 'text'"), (("rows.jsonl", "absent.jsonl"), "cannot load '.*absent")],
)
def test_wrong_hub_specs_are_one_line(data_set, change, message):
    with pytest.raises(DataError, match=message) as error:
        corpora.load(f"hf:{data_set}:part/rows.jsonl:test:text".replace(*change))
    assert "\n" not in str(error.value)


def test_sentences_become_paragraphs_without_the_remains_of_markup():
    sentences = "Rome (; ) is a city.\nIt is old (; 753 BC).\nKyiv () is another (really).\n"
    assert corpora._join_sentences(sentences, "0 1 1") == "Rome is a city. It is old (753 BC).\nKyiv is another (really)."


def test_stories_are_taken_once_and_without_their_answers(tmp_path):
    file = tmp_path / corpora.MYSTERIES
    file.parent.mkdir(parents=True)
    stories = [{"input": text, "target_scores": {"the butler": 1}} for text in (" A crime. Who? ", "Another. Who?", " A crime. Who? ")]
    file.write_text(json.dumps({"examples": stories}))
    assert corpora.READERS["stories"](tmp_path) == ["A crime. Who?", "Another. Who?"]


def test_wikipedia_reader_takes_english_articles_of_some_length(tmp_path):
    file = tmp_path / corpora.WIKIPEDIA
    file.parent.mkdir(parents=True)
    texts = [f"{index} " + "x" * (10 if index % 10 == 5 else 600) for index in range(3000)]
    file.write_text(json.dumps({"examples": [{"input": text + "\n", "target": "1"} for text in texts]}))
    numbers = [int(article.split()[0]) for article in corpora._read_wikipedia(tmp_path)]
    expected = [index for index in range(1000, 2000) if index % 10 != 5][::8]
    assert numbers == expected


@pytest.fixture(scope="module")
def tokenizer():
    """Words `w0`, `w1`, … have the ids 0, 1, …; the end of sequence is 1000."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(1000)} | {"<end>": 1000}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def words(tmp_path: Path) -> str:
    """Two documents, `w0 … w48` and `w49 … w97`: with their ends, 100 tokens."""
    for name, start in (("a", 0), ("b", 49)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{index}" for index in range(start, start + 49)))
    return f"file:{tmp_path}"


def test_windows_are_disjoint_and_cover_the_stream(words, tokenizer):
    windows = calibration.sample(words, tokenizer, samples=10, length=10, seed=0)
    stream = [*range(49), 1000, *range(49, 98), 1000]
    assert windows.shape == (10, 10) and str(windows.dtype) == "torch.int64"
    assert sorted(windows.tolist()) == sorted(stream[start : start + 10] for start in range(0, 100, 10))


def test_seed_gives_the_order_and_fewer_samples_are_the_first(words, tokenizer):
    whole = calibration.sample(words, tokenizer, 10, 10, seed=0)
    assert (calibration.sample(words, tokenizer, 4, 10, seed=0) == whole[:4]).all()
    assert not (calibration.sample(words, tokenizer, 10, 10, seed=1) == whole).all()


def test_too_short_a_corpus_says_how_much_there_is(words, tokenizer):
    with pytest.raises(DataError, match="gives 3 windows of 30 tokens, fewer than calibration_samples=4"):
        calibration.sample(words, tokenizer, samples=4, length=30, seed=0)


def test_calibration_fingerprint_covers_text_and_sampling(words, tmp_path):
    base = calibration.fingerprint(words, 4, 10, 0)
    others = [calibration.fingerprint(words, *change) for change in ((5, 10, 0), (4, 11, 0), (4, 10, 1))]
    (tmp_path / "c.txt").write_text("w5")
    assert len({base, *others, calibration.fingerprint(words, 4, 10, 0)}) == 5

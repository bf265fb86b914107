"""Text for perplexity and calibration: named corpora, local files and hub data sets behind one function.

A spec is a name from `corpora.yaml`, `file:PATH` (one text, or a folder of `.txt`, a document each) or
`hf:PATH[@REVISION]:CONFIG:SPLIT:FIELD`, in which a CONFIG with a slash names a data file inside the data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import yaml

from slimbench.tasks import assets, hub
from slimbench.tasks.errors import DataError
from slimbench.util.hashing import hash_file
from slimbench.util.text import closest, nearest

__all__ = ["Corpus", "DataError", "NamedCorpus", "catalogue", "fingerprint", "load"]

CATALOGUE = Path(__file__).with_name("corpora.yaml")
SEPARATOR = "\n\n"
HUB_SPEC = re.compile(r"hf:(?P<path>[^:@]+)(@(?P<revision>[^:]+))?:(?P<config>[^:]*):(?P<split>[^:\[]+(\[[^\]]*\])?):(?P<field>[^:]+)")

WIKIPEDIA = "bigbench-1.0.0/bigbench/benchmark_tasks/paragraph_segmentation/task.json"
MYSTERIES = "bigbench-1.0.0/bigbench/benchmark_tasks/minute_mysteries_qa/multiplechoice/task.json"
WIKIPEDIA_ENGLISH = slice(1000, 2000)  # the file holds nine languages, 1,000 documents each; English is the second
WIKIPEDIA_MIN_CHARS = 500
WIKIPEDIA_STRIDE = 8
READER_VERSION = 1  # raise it when a reader gives other text for the same asset


@dataclass(frozen=True)
class Corpus:
    """Documents in their order.

    Attributes:
        name: The spec that gave it.
        separator: What stands between two documents in `text`.
        sha256: Hash of `text` in UTF-8, in hex.
    """

    name: str
    documents: list[str] = field(repr=False)
    separator: str

    @cached_property
    def text(self) -> str:
        return self.separator.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class NamedCorpus:
    """An entry of the catalogue; `reader` is needed for assets only."""

    description: str
    source: str
    separator: str
    reader: str | None = None


@cache
def catalogue() -> dict[str, NamedCorpus]:
    """The named corpora."""
    raw = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {name: NamedCorpus(**fields) for name, fields in raw.items()}


def load(spec: str) -> Corpus:
    """The documents that a spec names; fetches what is missing.

    Raises:
        DataError: Unknown name, missing file, unreachable data set, or no text in it.
    """
    separator = SEPARATOR
    if spec.startswith("file:"):
        documents = [_read_text(file) for file in _files(spec)]
    elif spec.startswith("hf:"):
        documents = _hub_documents(spec)
    else:
        entry = _named(spec)
        separator = entry.separator
        documents = _asset_documents(entry) if entry.reader else _hub_documents(entry.source)
    if not any(document.strip() for document in documents):
        raise DataError(f"corpus '{spec}' holds no text")
    return Corpus(spec, documents, separator)


def fingerprint(spec: str) -> str:
    """16 hex digits that identify the content of a corpus, without fetching or reading more than local files.

    A hub data set is identified by its spec, so by its revision; name one to pin it.

    Raises:
        DataError: Unknown name, missing file, or nothing in it.
    """
    if spec.startswith("file:"):
        files = _files(spec)
        if not any(_read_text(file).strip() for file in files):
            raise DataError(f"corpus '{spec}' holds no text")
        identity: list[object] = [hash_file(file) for file in files]
    elif spec.startswith("hf:"):
        _parse(spec)
        identity = [spec, SEPARATOR]
    else:
        entry = _named(spec)
        pinned = assets.catalogue()[entry.source.removeprefix("asset:")].fingerprint if entry.reader else entry.source
        identity = [pinned, entry.reader, entry.separator, READER_VERSION]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def source(spec: str) -> str:
    """Where a corpus comes from: `asset:NAME`, `file:PATH` or a hub data set.

    Raises:
        DataError: Unknown name.
    """
    return spec if spec.startswith(("file:", "hf:")) else _named(spec).source


def is_fetched(spec: str) -> bool:
    """Whether `load` would need no network for a corpus on the hub."""
    part = _parse(source(spec))
    return hub.is_fetched(str(part["path"]), part["config"] or None, part["revision"])


def size(spec: str) -> int | None:
    """Bytes to download of a corpus on the hub, where it tells."""
    part = _parse(source(spec))
    return hub.size(str(part["path"]), part["config"] or None, part["revision"])


def _named(spec: str) -> NamedCorpus:
    known = catalogue()
    if spec not in known:
        if "/" in spec or Path(spec).exists():
            raise DataError(f"no corpus '{spec}'; did you mean 'file:{spec}'?")
        raise DataError(f"no corpus '{spec}'{nearest(spec, [*known, 'file:PATH', 'hf:PATH:CONFIG:SPLIT:FIELD'])}")
    return known[spec]


def _files(spec: str) -> list[Path]:
    path = Path(spec.removeprefix("file:")).expanduser()
    if os.path.isdir(path):  # false for what cannot be a path at all
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"folder {path} has no .txt file")
        return files
    if not os.path.isfile(path):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}{closest(path.name, siblings)}")
    return [path]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text (byte {error.start})") from error


def _asset_documents(entry: NamedCorpus) -> list[str]:
    return READERS[entry.reader or ""](assets.fetch(entry.source.removeprefix("asset:")))


def _read_lines(file: Path, encoding: str = "utf-8") -> list[str]:
    """One document a line."""
    return [line.strip() for line in file.read_text(encoding=encoding).splitlines() if line.strip()]


def _read_wikipedia(folder: Path) -> list[str]:
    """English articles of BIG-bench's paragraph_segmentation task, as running text.

    Every eighth article of at least 500 characters is taken whole, so that the corpus has the size of WikiText-2's test set.
    """
    examples = json.loads((folder / WIKIPEDIA).read_text(encoding="utf-8"))["examples"][WIKIPEDIA_ENGLISH]
    articles = [_join_sentences(example["input"], example["target"]) for example in examples]
    return [article for article in articles if len(article) >= WIKIPEDIA_MIN_CHARS][::WIKIPEDIA_STRIDE]


def _read_stories(folder: Path) -> list[str]:
    """The stories of BIG-bench's minute_mysteries_qa task, each once, without their choices and answers."""
    examples = json.loads((folder / MYSTERIES).read_text(encoding="utf-8"))["examples"]
    return list(dict.fromkeys(example["input"].strip() for example in examples))


def _join_sentences(sentences: str, labels: str) -> str:
    """Running text from one sentence a line; label `1` marks the last sentence of a paragraph.

    Brackets that the extraction of the articles left empty, as in `Rome (; ) is`, are taken away.
    """
    lines = sentences.strip("\n").split("\n")
    text = "".join(line + ("\n" if label == "1" else " ") for line, label in zip(lines, labels.split(), strict=True))
    return re.sub(r"\(\s*[;,]\s*", "(", re.sub(r"\s*\(\s*[;,]?\s*\)", "", text)).strip()


READERS: dict[str, Callable[[Path], list[str]]] = {
    "lines": _read_lines,
    "latin-1 lines": partial(_read_lines, encoding="latin-1"),
    "stories": _read_stories,
    "wikipedia": _read_wikipedia,
}


def _parse(spec: str) -> dict[str, str | None]:
    match = HUB_SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"'{spec}' is not of the form hf:PATH[@REVISION]:CONFIG:SPLIT:FIELD")
    return match.groupdict()


def _hub_documents(spec: str) -> list[str]:
    """The rows of one text field. Empty rows are kept: the papers' protocols join them too."""
    part = _parse(spec)
    column = str(part["field"])
    rows = hub.rows(str(part["path"]), part["config"] or None, str(part["split"]), part["revision"])
    if column not in rows.column_names:
        raise DataError(f"'{spec}' has no field '{column}'{nearest(column, rows.column_names)}")
    return [str(row) for row in rows[column]]

"""Passages that a query finds in a corpus, by BM25 (Robertson and Zaragoza 2009) of the library bm25s."""

from __future__ import annotations

from functools import cache
from typing import Any

from slimbench.tasks import corpora
from slimbench.tasks.errors import DataError

WORDS = 60
"""Of a passage; documents are cut into as many as they fill."""


def found(corpus: str, query: str, count: int) -> list[str]:
    """The passages that fit a query best, the best last, as many as there are at most."""
    import bm25s

    texts, index = _indexed(corpus)
    tokens: Any = bm25s.tokenize([query], show_progress=False)
    places, _ = index.retrieve(tokens, k=min(count, len(texts)), show_progress=False)
    return [texts[int(place)] for place in reversed(places[0])]


def cut(document: str, words: int) -> list[str]:
    """A document in passages of so many words each, one after the other; the last has what is left."""
    said = document.split()
    return [" ".join(said[first : first + words]) for first in range(0, len(said), words)]


@cache
def _indexed(corpus: str) -> tuple[list[str], Any]:
    try:
        import bm25s
    except ImportError as error:
        raise DataError("retrieval needs bm25s: install [teaching]") from error
    texts = [text for document in corpora.load(corpus).documents for text in cut(document, WORDS)]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    return texts, index

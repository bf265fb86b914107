"""Tokens are cached by the whole tokenizer and held against their hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimbench.harness.measure import perplexity
from slimbench.util.files import cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))


def tokenizer(normalizer: Any = None, digits: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; of the same vocabulary and class whatever comes before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"12": len(alphabet)}, merges=[("1", "2")]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def streams(text: Path, *tokenizers: Any) -> list[list[int]]:
    return [perplexity.token_stream(f"file:{text}", tokenizer)[0].tolist() for tokenizer in tokenizers]


def test_another_normaliser_or_splitting_rule_gives_other_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In 12 Days")
    plain, lower, digits = streams(text, tokenizer(), tokenizer(normalizers.Lowercase()), tokenizer(digits=True))
    assert len(plain) == 9 and len(digits) == 10
    assert lower != plain
    assert streams(text, tokenizer()) == [plain]


def test_a_library_of_another_version_tokenizes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = perplexity.tokenizer_identity(tokenizer())
    assert perplexity.tokenizer_identity(tokenizer()) == before
    monkeypatch.setattr(perplexity.importlib.metadata, "version", lambda name: "0")
    assert perplexity.tokenizer_identity(tokenizer()) != before


def test_what_the_last_call_left_in_the_tokenizer_does_not_count() -> None:
    used = tokenizer()
    used("In 12 Days", truncation=True, max_length=2)
    assert perplexity.tokenizer_identity(used) == perplexity.tokenizer_identity(tokenizer())


def test_damaged_tokens_are_made_again(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In 12 Days")
    (good,) = streams(text, tokenizer())
    file = next((cache_dir() / "tokens").glob("*/*.npy"))
    np.save(file, np.zeros(len(good), dtype=np.int32))
    assert streams(text, tokenizer()) == [good]


def test_a_tokenizer_without_a_compiled_part_is_known_by_all_its_files() -> None:
    class Slow:
        """Of one vocabulary, whatever its rules."""

        is_fast = False

        def __init__(self, rules: str) -> None:
            self.rules = rules

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __len__(self) -> int:
            return 1

        def save_pretrained(self, folder: str) -> list[str]:
            (file := Path(folder) / "merges.txt").write_text(self.rules)
            return [str(file)]

    one, same, other = (perplexity.tokenizer_identity(Slow(rules)) for rules in ("a b", "a b", "b a"))
    assert one == same != other

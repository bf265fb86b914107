"""Calibration text inside test text: what is shared is found, what is not is not."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from slimbench.tasks.overlap import ngrams, overlap
from tests.support.paths import ROOT


def text(tokens: int, seed: int, vocabulary: int = 49_152) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, tokens)


def by_hand(test: list[np.ndarray], calibration: list[np.ndarray], n: int) -> float:
    """The same fraction from tuples of tokens."""
    grams = [[tuple(row[i : i + n].tolist()) for row in rows for i in range(len(row) - n + 1)] for rows in (test, calibration)]
    known = set(grams[1])
    return sum(gram in known for gram in grams[0]) / len(grams[0])


def test_the_same_text_is_all_shared_and_other_text_not_at_all() -> None:
    windows = text(4096, seed=0).reshape(8, 512)
    assert overlap(windows, windows) == 1.0
    assert overlap(windows, text(65_536, seed=1).reshape(128, 512)) == 0.0


def test_one_shared_sentence_is_found_wherever_it_stands() -> None:
    windows, calibration = text(4096, seed=0).reshape(8, 512), text(8192, seed=1).reshape(16, 512)
    windows[3, 100:130] = calibration[7, 411:441]
    assert overlap(windows, calibration) == (30 - 13 + 1) / (8 * (512 - 13 + 1))
    calibration[7, 425] += 1  # 14 and 15 tokens on both sides of the changed one: 2 + 3 n-grams
    assert overlap(windows, calibration) == (2 + 3) / (8 * (512 - 13 + 1))


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_it_equals_a_count_of_tuples(n: int) -> None:
    """Few different tokens, so that many n-grams are shared by chance, and rows of different lengths."""
    rng = np.random.default_rng(n)
    test, calibration = ([rng.integers(0, 2, length) for length in lengths] for lengths in ((3, 40, 700), (50, 1, 900)))
    expected = by_hand(test, calibration, n)
    assert expected > 0
    assert overlap(test, calibration, n) == pytest.approx(expected, abs=1e-12)


def test_no_ngram_crosses_a_border() -> None:
    ids = text(26, seed=0)
    assert overlap([ids[6:19]], [ids]) == 1.0
    assert overlap([ids[6:19]], [ids[:13], ids[13:]]) == 0.0


def test_order_of_tokens_counts() -> None:
    ids = text(13, seed=0)
    assert ngrams(ids) != ngrams(ids[::-1])
    assert ngrams(ids) != ngrams(np.roll(ids, 1))


def test_padding_is_no_text() -> None:
    padding = np.full(20, -1)
    ids = text(13, seed=0)
    assert len(ngrams(padding)) == 0
    assert (ngrams(np.concatenate([ids, padding])) == ngrams(ids)).all()
    assert overlap([np.concatenate([ids, padding])], [np.concatenate([text(13, seed=1), padding])]) == 0.0


def test_too_short_for_any_ngram() -> None:
    assert ngrams(text(12, seed=0)).shape == (0,)
    assert ngrams(text(13, seed=0)).shape == (1,)
    assert overlap([text(12, seed=0)], [text(100, seed=0)]) is None
    assert overlap([text(100, seed=0)], [text(12, seed=0)]) == 0.0
    assert overlap([text(100, seed=0)], []) == 0.0


@pytest.mark.parametrize("vocabulary", [2, 300, 150_000])
def test_different_ngrams_have_different_hashes(vocabulary: int) -> None:
    ids = text(100_000, seed=2, vocabulary=vocabulary).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(ids, 13)
    assert len(np.unique(ngrams(ids))) == len(np.unique(windows, axis=0))


def test_a_test_set_takes_less_than_a_second() -> None:
    windows, calibration = text(251_904, seed=0).reshape(-1, 512), text(65_536, seed=1).reshape(-1, 512)
    began = time.process_time()
    assert overlap(windows, calibration) == 0.0
    assert time.process_time() - began < 1.0


def test_it_needs_no_torch() -> None:
    code = "import sys, slimbench.tasks.overlap; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

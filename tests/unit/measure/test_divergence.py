"""Divergence: exact where everything is kept, a lower bound where not, nothing for a model against itself."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
import torch

from slimbench.harness.measure import divergence
from slimbench.harness.measure.divergence import Comparison, Recorder
from slimbench.harness.measure.loaded import label_logprobs

WINDOWS, LABELS, VOCABULARY = 3, 20, 300


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a reference and of a noisy copy, and labels."""
    generator = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(WINDOWS, LABELS, VOCABULARY, generator=generator)
    noisy = reference + torch.randn(reference.shape, generator=generator)
    return reference, noisy, torch.randint(0, VOCABULARY, (WINDOWS, LABELS), generator=generator)


def recorded(reference: torch.Tensor, labels: torch.Tensor, top_k: int) -> str:
    key = uuid4().hex
    recorder = Recorder(key, labels.numel(), top_k, VOCABULARY)
    label_logprobs(reference, labels, recorder)
    assert not divergence.exists(key)
    recorder.close()
    assert divergence.exists(key)
    return key


def compared(key: str, candidate: torch.Tensor, labels: torch.Tensor) -> Comparison:
    comparison = Comparison(key)
    label_logprobs(candidate, labels, comparison)
    return comparison


def test_with_the_whole_vocabulary_it_is_the_textbook_formula(logits: tuple[torch.Tensor, ...]) -> None:
    reference, noisy, labels = logits
    found = compared(recorded(reference, labels, VOCABULARY), noisy, labels).result(WINDOWS)
    p, q = (x.double().log_softmax(-1) for x in (reference, noisy))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean(1).tolist())
    true_p, true_q = (x.exp().gather(2, labels[..., None])[..., 0] for x in (p, q))
    assert found.delta_p == pytest.approx((true_p - true_q).abs().mean(1).tolist(), rel=1e-4)
    assert found.tail_error == pytest.approx(0, abs=1e-5)


def test_a_tail_only_lowers_it_and_says_by_how_much(logits: tuple[torch.Tensor, ...]) -> None:
    reference, noisy, labels = logits
    exact = compared(recorded(reference, labels, VOCABULARY), noisy, labels).result(WINDOWS).kl_mean
    means, errors = [], []
    for top_k in (4, 16, 64):
        found = compared(recorded(reference, labels, top_k), noisy, labels).result(WINDOWS)
        means.append(found.kl_mean)
        errors.append(found.tail_error)
        assert found.exact_positions == WINDOWS * LABELS
        assert found.kl_mean + found.tail_error == pytest.approx(exact, rel=1e-4)  # type: ignore[operator]
    assert means == sorted(means)
    assert errors == sorted(errors, reverse=True)
    assert means[-1] < exact


@pytest.mark.parametrize("top_k", [1, 32, VOCABULARY])
def test_a_model_does_not_differ_from_itself(logits: tuple[torch.Tensor, ...], top_k: int) -> None:
    reference, _, labels = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in logits)
    found = compared(recorded(reference, labels, top_k), reference, labels).result(WINDOWS)
    assert (found.kl_mean, found.kl_p99, found.tail_error) == (0, 0, 0)
    assert found.top1_agreement == [1] * WINDOWS
    assert found.delta_p == [0] * WINDOWS


def test_an_interrupted_recording_leaves_nothing(cache: Path) -> None:
    recorder = Recorder(uuid4().hex, 10, 4, VOCABULARY)
    assert recorder.folder.is_dir()
    recorder.discard()
    assert not recorder.folder.exists()
    assert not divergence.exists(recorder.key)


def test_of_two_writers_one_wins(logits: tuple[torch.Tensor, ...]) -> None:
    reference, _, labels = logits
    key = recorded(reference, labels, 8)
    late = Recorder(key, labels.numel(), 8, VOCABULARY)
    label_logprobs(reference, labels, late)
    late.close()
    assert divergence.exists(key)
    assert not late.folder.exists()


@pytest.mark.parametrize("name", ["logp", "index", "tail", "label", "first", "exact"])
def test_distributions_with_other_bytes_than_written_are_not_there(logits: tuple[torch.Tensor, ...], name: str) -> None:
    reference, _, labels = logits
    key = recorded(reference, labels, 8)
    file = divergence.location(key) / f"{name}.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-4] + bytes(byte ^ 1 for byte in good[-4:]))
    assert not divergence.exists(key)
    file.write_bytes(good)
    assert divergence.exists(key)

"""The noise floor of the KL: the textbook formula, zero where nothing differs, and what differs is what is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimbench.harness.measure import noise
from slimbench.harness.store.partial import Part

VOCABULARY = 50


class Model:
    """Logits that are a table's, plus what a batch of a size does to them."""

    def __init__(self, table: torch.Tensor, by_batch: float = 0.0) -> None:
        self.table, self.by_batch, self.batches = table, by_batch, list[int]()

    def batch(self, wanted: int) -> int:
        return wanted

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(ids))
        logits = self.table[ids]
        logits[..., 0] += self.by_batch * len(ids)
        return logits


@pytest.fixture
def windows() -> Any:
    ids = torch.randint(0, VOCABULARY, (7, 512), generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(ids=ids, wanted=SimpleNamespace(seqlen=512), logits=lambda model, batch: model(batch))


def test_it_is_the_textbook_formula_over_the_whole_vocabulary(windows: Any) -> None:
    table, other = torch.randn(2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).unbind()
    model = Model(table)
    batches, another = noise.measure(model, windows, 5, {"float32": lambda: Model(other)}, lambda *_: None, Part())  # type: ignore[arg-type, dict-item]
    p, q = (x[windows.ids[:5]].double().log_softmax(-1) for x in (table, other))
    assert another.what == "float32" and another.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean(1).tolist())
    assert another.kl_mean == pytest.approx(sum(another.kl) / 5)
    assert batches.what == "batches of 1" and batches.kl == [0.0] * 5
    assert set(model.batches) == {2, 1}, "the same windows in twos, as they are scored, and one by one"


def test_what_the_size_of_a_batch_does_is_seen(windows: Any) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    (batches,) = noise.measure(Model(table, by_batch=0.1), windows, 4, {}, lambda *_: None, Part())  # type: ignore[arg-type]
    assert all(kl > 1e-6 for kl in batches.kl)

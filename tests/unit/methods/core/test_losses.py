"""The losses are what their formulas say, in float32 and of the right positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimbench.methods.core.losses import cross_entropy, next_token, soft_cross_entropy


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_a_text_is_predicted_token_by_token_from_what_stands_before() -> None:
    z, ids = logits(0), torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    surprise = [-float(z[s, t].log_softmax(-1)[ids[s, t + 1]]) for s in range(2) for t in range(4)]
    assert float(next_token(z, ids)) == pytest.approx(sum(surprise) / 8, rel=1e-5)
    assert float(cross_entropy(z[:, :-1], ids[:, 1:], "sum")) == pytest.approx(sum(surprise), rel=1e-5)


def test_soft_cross_entropy_is_least_for_the_teacher() -> None:
    teacher, other = logits(0), logits(1)
    want = -(teacher.softmax(-1) * other.log_softmax(-1)).sum(-1).mean()
    assert float(soft_cross_entropy(other, teacher)) == pytest.approx(float(want), rel=1e-5)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    assert float(soft_cross_entropy(teacher, teacher)) == pytest.approx(float(entropy), rel=1e-5)
    assert soft_cross_entropy(teacher, teacher) < soft_cross_entropy(other, teacher)


def test_losses_of_bfloat16_logits_are_of_their_float32_values() -> None:
    z, ids = logits(0, torch.bfloat16), torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    assert next_token(z, ids).dtype is torch.float32
    assert torch.equal(next_token(z, ids), next_token(z.float(), ids))
    assert torch.equal(soft_cross_entropy(z, logits(1)), soft_cross_entropy(z.float(), logits(1)))

"""The cubic schedule by its table, masks that grow by it, and the gradients that pass a mask."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.core.learning.gradual import Cubic, Growing, straight_through


def test_the_schedule_is_the_papers() -> None:
    schedule = Cubic(0.2, 0.8, 10, 30)
    assert [schedule.at(step) for step in (0, 10, 30, 99)] == pytest.approx([0.2, 0.2, 0.8, 0.8])
    assert schedule.at(15) == pytest.approx(0.8 - 0.6 * 0.75**3)
    assert schedule.at(20) == pytest.approx(0.8 - 0.6 * 0.5**3)


class Magnitude(Growing):
    def scores(self) -> Mapping[str, Tensor]:
        return {name: value.detach().abs() for name, value in self.parameters.items()}


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_masks_grow_to_the_weight(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(rows, 12, generator=generator)) for name, rows in (("a", 5), ("b", 9))}
    hooks = Magnitude(parameters, schedule=Cubic(0.0, 0.5, 0, 6), every=2, scope=scope)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1)
    seen = []
    for step in range(8):
        for value in parameters.values():
            value.grad = torch.randn(value.shape, generator=generator)
        hooks.after_backward(step)
        optimizer.step()
        hooks.after_step(step, optimizer)
        seen.append(sum(int((value == 0).sum()) for value in parameters.values()))
    wanted = {done: 0.5 - 0.5 * (1 - done / 6) ** 3 for done in (2, 4, 6)}

    def total(share: float) -> int:
        return round(share * 168) if scope == "model" else sum(round(share * rows * 12) for rows in (5, 9))

    assert seen == [0] + [total(wanted[2])] * 2 + [total(wanted[4])] * 2 + [total(0.5)] * 3
    for name, value in parameters.items():
        assert all((moment[hooks.masks[name]] == 0).all() for moment in optimizer.state[value].values() if moment.dim())
    if scope == "row":
        assert {int(count) for count in (parameters["b"] == 0).sum(1)} == {6}


def test_a_pattern_holds_from_the_first_choice_on() -> None:
    parameters = {"a": nn.Parameter(torch.randn(4, 8))}
    hooks = Magnitude(parameters, schedule=Cubic(0.5, 0.5, 0, 1), scope="layer", pattern="2:4")
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    hooks.after_step(0, optimizer)
    assert ((parameters["a"] == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_scores_get_the_gradient_of_pruned_weights_too() -> None:
    weight, scores = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    kept = (scores > 0).float().detach()
    made = straight_through(weight, kept, scores)
    assert torch.equal(made, weight * kept)
    outer = torch.randn(3, 4)
    (made * outer).sum().backward()
    assert torch.allclose(scores.grad, outer * weight.detach())  # type: ignore[arg-type]
    assert torch.allclose(weight.grad, outer * kept, atol=1e-6)  # type: ignore[arg-type]

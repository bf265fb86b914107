"""What methods do between the parts of a training step: groups, hooks in order, weights locked at zero, and exact resumption of it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel
from slimbench.methods.core.learning.hooks import Group, Hooks, Locked, regroup
from slimbench.methods.core.training import Trained, TrainingSettings, batch, cut, objective, train
from tests.support import tiny

SETTINGS = TrainingSettings(steps=12, batch_size=2, length=16, learning_rate=1e-2, weight_decay=0.1, checkpoint_every=2, loss="nll")
NUMBERS = TrainingSettings(steps=4, batch_size=2, length=4, learning_rate=0.1, weight_decay=0.1, clip=0.5, warmup=0, schedule="linear")
ROWS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [9, 9, 9, 9]])


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


class Drift(Locked):
    """Locks more of a weight every third step by random numbers and pulls it towards a mean of its gradients; some names have a group."""

    mean: Tensor
    rounds = 0

    def groups(self) -> Sequence[Group]:
        return (
            Group(("model.norm.weight",), factor=10.0, weight_decay=0.0),
            Group(("model.layers.0.input_layernorm.weight",), maximize=True),
        )

    def after_backward(self, step: int) -> None:
        super().after_backward(step)
        (name,) = self.masks
        gradient = self.parameters[name].grad
        assert gradient is not None
        self.mean = 0.9 * getattr(self, "mean", torch.zeros_like(gradient)) + 0.1 * gradient

    def after_step(self, step: int, optimizer: Any) -> None:
        (name,) = self.masks
        if step % 3 == 2:
            self.rounds += 1
            self.masks = {name: self.masks[name] | (torch.rand(self.masks[name].shape) < 0.1)}
        self.parameters[name].detach().sub_(0.1 * self.mean)
        super().after_step(step, optimizer)

    def state(self) -> dict[str, Tensor]:
        (mask,) = self.masks.values()
        return {"mask": mask, "mean": getattr(self, "mean", torch.zeros(1)), "rounds": torch.tensor(self.rounds)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        (name,) = self.masks
        super().load({name: state["mask"]})
        self.mean, self.rounds = state["mean"], int(state["rounds"])


def run(dense: DenseModel) -> tuple[dict[str, Tensor], Trained, Drift]:
    model = dense.load(dtype=torch.float32)
    parameters, name = dict(model.named_parameters()), "model.layers.1.mlp.up_proj.weight"
    parameters[name].data[:, ::2] = 0
    drift = Drift({name: parameters[name]}, {name: parameters[name].detach() == 0})
    windows = cut(tiny.tokens(samples=4, length=40).ids, SETTINGS.length)
    done = train(SETTINGS, parameters, objective(SETTINGS, model, dense), windows, dense, drift)
    return {key: value.detach() for key, value in parameters.items()}, done, drift


def test_interrupted_and_resumed_equals_uninterrupted(dense: DenseModel, tmp_path: Path) -> None:
    """Killed in step 7 of 12: masks that grow, a mean of gradients, a count and the parameters end with the same bits."""

    def kill(done: float, total: float) -> None:
        if done == 7:
            raise Killed

    want, whole, kept = run(dense)
    with pytest.raises(Killed):
        run(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill))
    seen: list[float] = []
    got, resumed, again = run(dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done)))
    assert seen == list(range(7, 13)), "it goes on from the checkpoint of step 6"
    assert resumed == whole and all(torch.equal(got[name], want[name]) for name in want)
    assert kept.rounds == again.rounds == 4 and kept.count == again.count > want["model.layers.1.mlp.up_proj.weight"].numel() / 2
    assert all(torch.equal(again.state()[name], value) for name, value in kept.state().items())
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_another_state_at_the_start_is_another_run(dense: DenseModel, tmp_path: Path) -> None:
    def fit(masked: int) -> list[float]:
        w, seen = nn.Parameter(torch.arange(4.0)), list[float]()
        kept = dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done))
        settings = dataclasses.replace(NUMBERS, checkpoint_every=2)
        train(settings, {"w": w}, lambda ids: (w - ids).square().sum(), ROWS, kept, Locked({"w": w}, {"w": torch.arange(4) < masked}))
        return seen

    assert [fit(1), fit(1), fit(2)] == [[1, 2, 3, 4], [], [1, 2, 3, 4]]


def apart(w: Tensor, ids: Tensor) -> Tensor:
    return (w - ids.float()).square().mean()


def test_hooks_that_do_nothing_change_no_bit(dense: DenseModel) -> None:
    ended = []
    for hooks in (None, Hooks()):
        w = nn.Parameter(torch.linspace(-1, 1, 4))
        train(NUMBERS, {"w": w}, partial(apart, w), ROWS, dense, hooks)
        ended.append(w.detach())
    assert torch.equal(*ended)


def test_groups_have_rates_decays_and_directions_of_their_own(dense: DenseModel) -> None:
    """Torch's own AdamW, called by hand on one parameter after the other, gives the same."""

    class Grouped(Hooks):
        def groups(self) -> Sequence[Group]:
            return (Group(("b",), factor=3.0), Group(("c",), weight_decay=0.7), Group(("d",), factor=0.5, maximize=True))

    ours = {name: nn.Parameter(torch.tensor([1.0, -2.0])) for name in "abcd"}
    settings = dataclasses.replace(NUMBERS, clip=None)
    train(
        settings,
        ours,
        lambda ids: torch.stack([(p - ids.float().mean()).square().mean() for p in ours.values()]).sum(),
        ROWS,
        dense,
        Grouped(),
    )
    for name, factor, decay, sign in (("a", 1.0, 0.1, 1), ("b", 3.0, 0.1, 1), ("c", 1.0, 0.7, 1), ("d", 0.5, 0.1, -1)):
        alone = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([alone], weight_decay=decay)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = factor * 0.1 * (1 - step / 4)
            optimizer.zero_grad()
            (sign * (alone - batch(ROWS, settings, step).float().mean()).square().mean()).backward()
            optimizer.step()
        torch.testing.assert_close(ours[name].detach(), alone.detach(), rtol=0, atol=1e-6)


def test_an_option_that_the_optimizer_has_not_is_an_error() -> None:
    value = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="SparseAdam has no weight_decay"):
        regroup(torch.optim.SparseAdam([value]), {"w": value}, [Group(("w",), weight_decay=0.1)])


def test_gradients_are_seen_before_they_are_clipped_and_parameters_after_their_update(dense: DenseModel) -> None:
    w, seen = nn.Parameter(torch.ones(4)), []

    class Watch(Hooks):
        def after_backward(self, step: int) -> None:
            assert w.grad is not None
            seen.append((step, "before", float(w.grad.norm()), w.detach().clone()))

        def after_step(self, step: int, optimizer: Any) -> None:
            assert w.grad is not None
            seen.append((step, "after", float(w.grad.norm()), w.detach().clone()))

    train(NUMBERS, {"w": w}, partial(apart, w), ROWS, dense, Watch())
    assert [(step, when) for step, when, *_ in seen] == [(step, when) for step in range(4) for when in ("before", "after")]
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert before[2] > 0.5 >= after[2] - 1e-6 and not torch.equal(before[3], after[3])
    assert torch.equal(seen[1][3], seen[2][3]) and torch.equal(seen[-1][3], w)


def test_locked_weights_count_for_nothing(dense: DenseModel) -> None:
    """The others learn as if they were alone: gradients are clipped by their norm, and decay and moments revive no zero."""
    target = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, -2.0]])
    zero = torch.tensor([[True, False, False], [False, True, False]])
    whole = nn.Parameter(torch.linspace(0.5, 1.5, 6).view(2, 3).masked_fill(zero, 0.0))
    alone = nn.Parameter(whole.detach()[~zero].clone())
    settings, moments = dataclasses.replace(NUMBERS, steps=9), []

    class Watched(Locked):
        def after_step(self, step: int, optimizer: Any) -> None:
            super().after_step(step, optimizer)
            moments.append([optimizer.state[whole][key].clone() for key in ("exp_avg", "exp_avg_sq")])

    locked = Watched.zeros({"w": whole})
    assert locked.count == 2
    train(settings, {"w": whole}, lambda ids: (whole - target).square().sum() * ids.float().mean(), ROWS, dense, locked)
    train(settings, {"w": alone}, lambda ids: (alone - target[~zero]).square().sum() * ids.float().mean(), ROWS, dense)
    assert torch.equal(whole == 0, zero) and not whole.detach()[zero].signbit().any()
    torch.testing.assert_close(whole.detach()[~zero], alone.detach(), rtol=0, atol=1e-6)
    assert all(not moment[zero].any() and moment[~zero].all() for pair in moments for moment in pair)


def test_what_a_new_mask_takes_has_no_moment_left(dense: DenseModel) -> None:
    w = nn.Parameter(torch.ones(4))
    masks = [torch.tensor([False] * 4), torch.tensor([True, True, False, False]), torch.tensor([False, True, False, False])]
    seen = []

    class Changing(Locked):
        def after_step(self, step: int, optimizer: Any) -> None:
            self.masks = {"w": masks[min(step, 2)]}
            super().after_step(step, optimizer)
            seen.append((w.detach().clone(), optimizer.state[w]["exp_avg"].clone()))

    train(NUMBERS, {"w": w}, partial(apart, w), ROWS, dense, Changing({"w": w}, {"w": masks[0]}))
    gone = [masks[0].tolist(), masks[1].tolist(), masks[1].tolist(), masks[2].tolist()]  # what is let go moves from the next step on
    assert [(value == 0).tolist() for value, _ in seen] == [(moment == 0).tolist() for _, moment in seen] == gone

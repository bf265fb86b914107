"""The training loop: schedule, batches, and a run that is interrupted and resumed ends like one that ran through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel
from slimbench.methods.core.learning.terms import hearing, term
from slimbench.methods.core.training import Trained, TrainingSettings, batch, cut, objective, train
from slimbench.util import checkpoints as _checkpoints
from tests.support import tiny

SETTINGS = TrainingSettings(steps=7, batch_size=3, length=16, learning_rate=1e-3, checkpoint_every=2, loss="nll")


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def kill_after(step: int) -> Callable[[float, float], None]:
    def progress(done: float, total: float) -> None:
        if done == step:
            raise Killed

    return progress


def fit(dense: DenseModel, settings: TrainingSettings = SETTINGS, noisy: bool = True) -> tuple[dict[str, Tensor], Trained]:
    """Train the tiny model; with noise in the loss, so that the state of the random numbers matters."""
    model = dense.load(dtype=torch.float32)
    parameters = dict(model.named_parameters())
    plain = objective(settings, model, dense)
    noise = nn.Dropout(0.5)
    done = train(settings, parameters, (lambda ids: noise(plain(ids) + torch.zeros(8)).mean()) if noisy else plain, windows(), dense)
    return {name: p.detach() for name, p in parameters.items()}, done


def windows() -> Tensor:
    return cut(tiny.tokens(samples=4, length=40).ids, SETTINGS.length)


@pytest.mark.parametrize("killed_at", [1, 4, 5])
def test_interrupted_and_resumed_equals_uninterrupted(dense: DenseModel, tmp_path: Path, killed_at: int) -> None:
    want, whole = fit(dense)
    with pytest.raises(Killed):
        fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill_after(killed_at)))
    seen: list[float] = []
    got, resumed = fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done)))
    assert seen == list(range((killed_at - 1) // 2 * 2 + 1, SETTINGS.steps + 1))
    assert resumed == whole and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("every_s", "resumed_at"), [(0.0, 5), (3600.0, 1)])
def test_where_steps_are_long_the_clock_says_when_to_save(
    dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, resumed_at: int
) -> None:
    monkeypatch.setattr(_checkpoints, "_EVERY_S", every_s)
    monkeypatch.setattr(_checkpoints, "_WORK_PER_SAVING", 0)
    seldom = dataclasses.replace(SETTINGS, checkpoint_every=100)
    want, whole = fit(dense, seldom)
    with pytest.raises(Killed):
        fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill_after(5)), seldom)
    seen: list[float] = []
    got, resumed = fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done)), seldom)
    assert seen[0] == resumed_at
    assert resumed == whole and all(torch.equal(got[name], want[name]) for name in want)


def corrupt(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))


def truncate(folder: Path) -> None:
    (folder / "training.json").write_text((folder / "training.json").read_text()[:-5])


def lose(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [corrupt, truncate, lose])
def test_a_damaged_checkpoint_is_ignored(dense: DenseModel, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    want, _ = fit(dense)
    with pytest.raises(Killed):
        fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill_after(5)))
    damage(tmp_path)
    seen: list[float] = []
    got, _ = fit(dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done)))
    assert seen[0] == 1 and all(torch.equal(got[name], want[name]) for name in want)


def test_a_foreign_checkpoint_is_ignored(dense: DenseModel, tmp_path: Path) -> None:
    fit(dataclasses.replace(dense, checkpoints=tmp_path), dataclasses.replace(SETTINGS, learning_rate=2e-3))
    other = tiny.save_model(tmp_path / "other", seed=1)
    fit(dataclasses.replace(other, checkpoints=tmp_path / "kept"))
    for kept in (tmp_path, tmp_path / "kept"):
        seen: list[float] = []
        fit(dataclasses.replace(dense, checkpoints=kept, progress=lambda done, _, seen=seen: seen.append(done)))
        assert seen[0] == 1


def test_a_checkpoint_dies_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the tensors and the facts of a newer state, the older one is still there; no pickle is written."""
    _checkpoints.save(tmp_path, "training", "me", {"a": torch.ones(3)}, {"step": 1})

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(_checkpoints.json, "dumps", die)
        with pytest.raises(Killed):
            _checkpoints.save(tmp_path, "training", "me", {"a": torch.zeros(3)}, {"step": 2})
    found = _checkpoints.load(tmp_path, "training", "me")
    assert found is not None and found[1] == {"step": 1} and torch.equal(found[0]["a"], torch.ones(3))
    assert _checkpoints.load(tmp_path, "training", "you") is None
    _checkpoints.save(tmp_path, "training", "me", {"a": torch.zeros(3)}, {"step": 2})
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"} and len(list(tmp_path.iterdir())) == 2


def test_rate_rises_then_falls() -> None:
    settings = TrainingSettings(steps=20, warmup=0.25, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert rates[10] == pytest.approx((1 + math.cos(math.pi / 3)) / 2) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0
    assert TrainingSettings(steps=20, warmup=0, schedule="linear", learning_rate=1.0).rate(5) == 0.75
    assert TrainingSettings(steps=20, schedule="constant", learning_rate=0.5).rate(19) == 0.5


def test_every_round_sees_every_window_once_in_another_order() -> None:
    numbers, settings = torch.arange(6)[:, None], dataclasses.replace(SETTINGS, batch_size=4)
    rows = torch.cat([batch(numbers, settings, step) for step in range(6)]).flatten().tolist()
    rounds = [rows[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(r) == list(range(6)) for r in rounds) and len({tuple(r) for r in rounds}) > 1
    assert rows != torch.cat([batch(numbers, dataclasses.replace(settings, seed=1), s) for s in range(6)]).flatten().tolist()


def test_windows_are_cut_without_overlap() -> None:
    assert cut(torch.arange(20).view(2, 10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert cut(torch.arange(6).view(2, 3), 8).shape == (2, 3)


def test_the_step_is_adamw_with_clipped_gradients(dense: DenseModel) -> None:
    """One parameter, a quadratic loss: torch's own optimizer and clipping, called by hand, give the same."""
    settings = TrainingSettings(steps=3, batch_size=2, length=4, learning_rate=0.1, weight_decay=0.1, clip=0.5, warmup=0, schedule="linear")
    rows = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [9, 9, 9, 9]])
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    train(settings, {"w": ours}, lambda ids: ((ours - ids.float()) ** 2).mean(), rows, dense)
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.1)
    for step, rate in enumerate((0.1, 0.1 * 2 / 3, 0.1 / 3)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        ((theirs - batch(rows, settings, step).float()) ** 2).mean().backward()
        nn.utils.clip_grad_norm_([theirs], 0.5)
        optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-7) and not torch.equal(ours, torch.ones(4))


def test_two_models_are_clipped_apart(dense: DenseModel) -> None:
    """How steep the other one's loss is changes nothing of a model; with one norm of both it would."""
    settings = TrainingSettings(steps=4, batch_size=2, length=4, learning_rate=0.1, clip=0.5, warmup=0, schedule="constant")
    rows = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [9, 9, 9, 9]])

    def learned(apart: tuple[str, ...], beside: bool = True) -> list[Tensor]:
        w, v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def loss(ids: Tensor) -> Tensor:
            return ((w - ids) ** 2).mean() + (((v - ids) ** 4).mean() if beside else 0.0)

        train(settings, {"w": w} | ({"peer.w": v} if beside else {}), loss, rows, dense, apart=apart)
        return [w.detach(), v.detach()]

    alone, (first, second), together = learned((), beside=False)[0], learned(("peer.w",)), learned(())
    assert torch.equal(first, alone) and not torch.equal(second, torch.ones(4))
    assert float((together[0] - alone).abs().max()) > 1e-4


def test_pieces_add_up_to_the_batch(dense: DenseModel) -> None:
    float32 = dataclasses.replace(dense, dtype="float32")
    whole, facts = fit(float32, noisy=False)
    pieces, _ = fit(float32, dataclasses.replace(SETTINGS, accumulate=2), noisy=False)
    assert all(torch.allclose(pieces[name], whole[name], atol=1e-4) for name in whole)
    assert facts.tokens == 7 * 3 * 16 and facts.parameters == sum(p.numel() for p in whole.values())


def test_the_loss_falls_and_the_curve_is_short(dense: DenseModel) -> None:
    _, done = fit(dense, dataclasses.replace(SETTINGS, steps=120, batch_size=2), noisy=False)
    assert len(done.curve) == 100 and done.curve[0][0] == 1 and done.curve[-1][0] == 120
    assert done.loss_after < done.curve[0][1] - 0.5


def test_parts_of_a_loss_have_their_own_course_through_pieces_and_an_interruption(dense: DenseModel, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=2)

    def fitted(dense: DenseModel, name: Callable[..., Tensor] = term) -> Trained:
        model = dense.load(dtype=torch.float32)
        plain, turn = objective(settings, model, dense), iter(range(100))

        def loss(ids: Tensor) -> Tensor:
            value = plain(ids)
            often = name("first half", value / 4) + name("first half", value / 4)
            return often + (name("second half", value / 2) if next(turn) < 6 else value / 2)

        return train(settings, dict(model.named_parameters()), loss, windows(), dense)

    whole = fitted(dense)
    assert list(whole.terms) == ["first half", "second half"]
    assert [step for step, _ in whole.terms["second half"]] == [1, 2, 3], "two pieces a step, six of which have it"
    assert [step for step, _ in whole.terms["first half"]] == list(range(1, 8)) and "loss_terms" in whole.told
    for (step, lost), (_, half) in zip(whole.curve, whole.terms["first half"], strict=True):
        assert half == pytest.approx(lost / 2, abs=2e-6), step
    with pytest.raises(Killed):
        fitted(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill_after(3)))
    resumed = fitted(dataclasses.replace(dense, checkpoints=tmp_path))
    assert resumed.terms["first half"] == whole.terms["first half"] and resumed.curve == whole.curve
    unnamed = fitted(dense, lambda _, value: value)
    assert unnamed == dataclasses.replace(whole, terms={}) and "loss_terms" not in unnamed.told
    with hearing() as outside:
        fitted(dense)
    assert set(outside) == {"first half"}, "what the loop hears is its own, but for the last look after it"


def test_training_draws_no_random_numbers_from_outside(dense: DenseModel) -> None:
    state = torch.get_rng_state()
    fit(dense)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_that_explodes_is_an_error(dense: DenseModel) -> None:
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="the loss is nan in step 1 of 7"):
        train(SETTINGS, {"w": w}, lambda ids: (w * float("nan")).sum(), windows(), dense)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"accumulate": 9}, "must not exceed the batch_size"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"clip": 0.0}, "clip must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**setting)

"""What maps behind exits learn: loss and gradient against loops over exits, texts and tokens, and what they predict of other texts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic.hooks import counted
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.core import losses
from slimbench.methods.dynamic.early_exit import EarlyExits, start
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.exit import EarlyExit
from tests.support import tiny
from tests.support.mutants import mutant
from tests.support.policies import sharp, under

BLOCKS, EXITS, WORDS = 5, (1, 2, 4), 32
LEARNING: dict[str, Any] = {"exits": EXITS, "steps": 60, "batch_size": 4, "length": 32, "learning_rate": 0.03, "sinks": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=BLOCKS, initializer_range=0.1)


def chain(texts: int, length: int, seed: int) -> Tensor:
    """Texts in which three of four words are those that always follow the one before."""
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, WORDS, (texts,), generator=draw)]
    for _ in range(length - 1):
        other, known = torch.randint(0, WORDS, (texts,), generator=draw), torch.rand(texts, generator=draw) < 0.75
        words.append(torch.where(known, (5 * words[-1] + 3) % WORDS, other))
    return torch.stack(words, 1)


def written_out(
    model: Any, ids: Tensor, exits: tuple[int, ...], maps: dict[str, Tensor], kind: str, asked: Collection[int] = range(99)
) -> Tensor:
    """−ln q(next) or Σ_v p(v) (ln p(v) − ln q(v)), mean over exits, texts and tokens asked, in float64; p is the model's, q of an exit."""
    with torch.no_grad():
        whole = model.double()(ids, output_hidden_states=True)
    scale, head, lost = model.model.norm.weight, model.lm_head.weight, []
    for place in exits:
        for text, states, ends in zip(ids, whole.hidden_states[place], whole.logits, strict=True):
            for at, (state, end) in enumerate(zip(states, ends, strict=True)):
                if at not in asked:
                    continue
                moved = state + maps[f"{place}.weight"] @ state + maps[f"{place}.bias"]
                logits = head @ (scale * moved / (moved.square().mean() + model.config.rms_norm_eps).sqrt())
                q, p = (of - of.exp().sum().log() for of in (logits, end))
                if kind == "distillation":
                    lost.append((p.exp() * (p - q)).sum())
                elif at + 1 < len(text):
                    lost.append(-q[text[at + 1]])
    return torch.stack(lost).mean()


CASES, KINDS = range(6), ("nll", "distillation")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_papers(case: int, kind: Any, dense: DenseModel) -> None:
    draw, model = torch.Generator().manual_seed(case), sharp(num_hidden_layers=BLOCKS, vocab_size=48).requires_grad_(False)
    for value in model.parameters():
        value.mul_(torch.rand(value.shape, generator=draw) + 0.5)
    exits = ((1,), (4,), (1, 2), (2, 3, 4), EXITS, (1, 2, 3, 4))[case]
    ids = torch.randint(0, 48, (1 + case % 3, 3 + case), generator=draw)
    maps = start(exits, model)
    for value in maps.values():
        value.data = torch.randn(value.shape, generator=draw) / 10
    twins = {name: value.detach().double().requires_grad_(True) for name, value in maps.items()}
    found = EarlyExits(loss=kind, exits=exits)._loss(model, exits, maps, dense)(ids)
    found.backward()
    wanted = written_out(model, ids, exits, twins, kind)
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    for name, value in maps.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad.double(), twins[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    assert all(value.grad is None for value in model.parameters())


LOSS = EarlyExits, EarlyExits._loss
BOTH: dict[str, tuple[Any, Callable[..., Any], str, str]] = {
    "the other sign": (*LOSS, "torch.stack(found).sum()", "-torch.stack(found).sum()"),
    "a sum over exits": (*LOSS, "one / len(exits)", "one"),
    "not of the first": (*LOSS, "in held.items()", "in [*held.items()][1:]"),
    "not of the last": (*LOSS, "in held.items()", "in [*held.items()][:-1]"),
    "one block later": (*LOSS, "blocks[place - 1]", "blocks[place]"),
    "no norm": (*LOSS, "head(model.base_model.norm(moved))", "head(moved)"),
    "no state": (*LOSS, "moved = state + ", "moved = "),
    "no bias": (*LOSS, ', parameters[f"{place}.bias"])', ", 0 * parameters[f'{place}.bias'])"),
}
MUTANTS = {
    "nll": {
        "the other loss": (*LOSS, 'self.loss == "nll"', 'self.loss != "nll"'),
        "its own word": (*LOSS, "ids[:, at + 1]", "ids[:, at]"),
        "a word later": (*LOSS, "cross_entropy(logits, ids[:, at + 1])", "cross_entropy(logits[:, :-1], ids[:, at[:-1] + 2])"),
        "a sum over words": (*LOSS, "ids[:, at + 1])", "ids[:, at + 1], 'sum')"),
    },
    "distillation": {
        "of the likeliest word alone": (*LOSS, "divergence(logits, wanted)", "cross_entropy(logits, wanted.argmax(-1))"),
        "the other direction": (*LOSS, "divergence(logits, wanted)", "divergence(logits, wanted, 'reverse')"),
        "another temperature": (*LOSS, "divergence(logits, wanted)", "divergence(logits, wanted, temperature=2.0)"),
        "from a word earlier": (*LOSS, "divergence(logits, wanted)", "divergence(logits[:, 1:], wanted[:, :-1])"),
        "a mean over words": (losses, losses._divergence, ".sum(-1).mean()", ".mean()"),
    },
}
SEVERAL = ("a sum over exits", "not of the first", "not of the last")
"""They are other losses where there are several exits."""
ALL = [(kind, name, *place) for kind in KINDS for name, place in (BOTH | MUTANTS[kind]).items()]


@pytest.mark.parametrize(("kind", "name", "place", "function", "piece", "other"), ALL, ids=[f"{kind}: {name}" for kind, name, *_ in ALL])
def test_a_loss_that_is_not_the_papers_is_noticed(
    kind: str,
    name: str,
    place: Any,
    function: Callable[..., Any],
    piece: str,
    other: str,
    dense: DenseModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, function.__name__, mutant(function, piece, other))
    for case in CASES[2:] if name in SEVERAL else CASES:
        with pytest.raises(AssertionError):
            test_loss_and_gradient_are_the_papers(case, kind, dense)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_of_some_positions_is_the_loss_of_these_and_others_are_drawn_each_time(kind: Any, dense: DenseModel) -> None:
    model, draw = sharp(num_hidden_layers=BLOCKS, vocab_size=48).requires_grad_(False), torch.Generator().manual_seed(0)
    maps = {name: torch.nn.Parameter(torch.randn(value.shape, generator=draw) / 10) for name, value in start(EXITS, model).items()}
    ids, method = torch.randint(0, 48, (2, 9), generator=draw), EarlyExits(loss=kind, exits=EXITS, positions=3)
    loss, seen = method._loss(model, EXITS, maps, dense), set[tuple[int, ...]]()
    for seed in range(24):
        torch.manual_seed(seed)
        asked = tuple(method._asked(ids).tolist())
        torch.manual_seed(seed)
        found = loss(ids)
        assert len(set(asked)) == 3 and sorted(asked) == list(asked)
        seen.add(asked)
        twins = {name: value.detach().double() for name, value in maps.items()}
        torch.testing.assert_close(found.double(), written_out(model, ids, EXITS, twins, kind, asked), rtol=1e-5, atol=0)
        model.float()
    assert len(seen) > 4
    assert {place for asked in seen for place in asked} == set(range(8 if kind == "nll" else 9))


def test_no_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"positions must be at least 1, or null for all of a sequence, not 0"):
        EarlyExits(positions=0)


def learned(dense: DenseModel, folder: Path, **settings: Any) -> EarlyExit:
    """The policy in the artefact of a run."""
    folder.mkdir()
    EarlyExits(**LEARNING | settings).compress(dense, Calibration(chain(16, 32, 0), "chain"), folder)
    (policy,), _ = policies.read(folder)
    assert isinstance(policy, EarlyExit)
    return policy


def at(place: int, policy: EarlyExit, model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of all tokens where each of them leaves at one exit."""
    leaving = under(model, replace(policy, criterion="maximum", threshold=0.0, exits=(place,)))
    found = torch.cat([leaving.logits(text) for text in ids.split(1)])
    assert leaving.module.base_model.exits.left == {place: ids.numel()}
    return found.double().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_predicts_other_texts_better_than_without_a_map(kind: str, dense: DenseModel, tmp_path: Path) -> None:
    raw, trained = learned(dense, tmp_path / "raw", steps=0), learned(dense, tmp_path / "trained", loss=kind)
    assert not raw.translators and len(trained.translators) == 2 * len(EXITS)
    model, ids = dense.load(), chain(8, 32, 1)
    p = TransformersModel(model, "cpu").logits(ids).double().log_softmax(-1)
    for place in EXITS:
        before, after = (at(place, policy, model, ids) for policy in (raw, trained))
        if kind == "nll":
            first, second = (float(-q[:, :-1].gather(-1, ids[:, 1:, None]).mean()) for q in (before, after))
        else:
            first, second = (float((p.exp() * (p - q)).sum(-1).mean()) for q in (before, after))
        assert second < 0.8 * first, f"exit {place}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("function", "piece", "other"),
    [
        (EarlyExits._loss, "torch.stack(found).sum()", "-torch.stack(found).sum()"),
        (EarlyExits.compress, "value.detach().to(", "start(policy.exits, model)[name].detach().to("),
    ],
    ids=["the other sign", "as they began"],
)
def test_maps_that_learned_nothing_are_noticed(
    kind: str, function: Callable[..., Any], piece: str, other: str, dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EarlyExits, function.__name__, mutant(function, piece, other))
    with pytest.raises(AssertionError, match="exit 1"):
        test_every_exit_predicts_other_texts_better_than_without_a_map(kind, dense, tmp_path)


@pytest.fixture(scope="module")
def trained(dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> EarlyExit:
    return learned(dense, tmp_path_factory.mktemp("trained") / "out", loss="nll")


@pytest.mark.parametrize(
    ("criterion", "thresholds"),
    [
        ("maximum", (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)),
        ("margin", (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)),
        ("entropy", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        ("state", (-1.0, 0.6, 0.7, 0.8, 0.9, 0.95)),
        ("patience", (0, 1, 2, 3)),
    ],
)
def test_the_surer_an_exit_must_be_the_more_blocks_run(
    criterion: Any, thresholds: tuple[float, ...], dense: DenseModel, trained: EarlyExit
) -> None:
    model, ids, ran = dense.load(), chain(1, 96, 2), list[float]()
    policy = replace(trained, criterion=criterion)
    for each in [*(replace(policy, threshold=threshold) for threshold in thresholds), policy.neutral()]:
        loaded = under(model, each)
        with counted(loaded.module) as count:
            loaded.logits(ids)
        left = loaded.module.base_model.exits.left
        assert count.blocks == sum(blocks * tokens for blocks, tokens in left.items())
        ran.append(count.blocks / ids.numel())
    assert ran == sorted(ran) and ran[0] == EXITS[0] and ran[-1] == BLOCKS
    assert len(set(ran)) >= 4

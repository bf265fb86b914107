"""Hard concrete gates: their law by draws and formulas, the direction of the Lagrangian, and a cut that agrees with the masked model."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.surgery import name_of
from slimbench.methods.core.architecture.units import Structures, price, structures
from slimbench.methods.core.learning.gates import Gates, HardConcrete, Pace, multiplied
from slimbench.methods.core.training import TrainingSettings, train
from tests.support import tiny
from tests.support.architectures import make

IDS = torch.arange(40).reshape(2, 20) % 90


def kinds_of(model: Any) -> dict[str, Structures]:
    return {name_of(model, kind.reads): kind for block in anatomy(model) for kind in structures(block)}


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("law", [HardConcrete(), HardConcrete(0.33, -0.2, 1.3)])
def test_the_law_is_that_of_the_paper(alpha: float, law: HardConcrete) -> None:
    even = torch.rand(200_000, generator=torch.Generator().manual_seed(3))
    drawn = law.draw(torch.full_like(even, alpha), even)
    u, wide = float(even[7]), law.high - law.low
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha) / law.temperature))
    assert float(drawn[7]) == pytest.approx(min(1.0, max(0.0, s * wide + law.low)), abs=1e-5)
    stays = 1 / (1 + math.exp(-(alpha - law.temperature * math.log(-law.low / law.high))))
    assert float((drawn > 0).float().mean()) == pytest.approx(stays, abs=0.005)
    assert float(law.stays(torch.tensor(alpha))) == pytest.approx(stays, abs=1e-6)
    assert float(law.settled(torch.tensor(alpha))) == pytest.approx(min(1.0, max(0.0, wide / (1 + math.exp(-alpha)) + law.low)), abs=1e-6)


def test_the_expected_share_is_the_counted_one_where_gates_are_shut_or_open() -> None:
    kinds = kinds_of(make("llama"))
    gates = Gates(kinds, 0.5, Pace(1))
    held = gone = 0
    with torch.no_grad():
        for index, (name, alpha) in enumerate(gates.alphas.items()):
            shut = torch.arange(len(alpha)) % (index + 2) == 0
            alpha.copy_(torch.where(shut, -50.0, 50.0))
            gone += int(shut.sum()) * price(kinds[name])
            held += len(alpha) * price(kinds[name])
    assert float(gates.gone()) == pytest.approx(gone / held, abs=1e-6)


def test_the_multipliers_climb_and_the_gates_follow_the_target(tmp_path: Path) -> None:
    tiny_dense = tiny.save_model(tmp_path, "float32")
    model = tiny_dense.load(dtype=torch.float32).requires_grad_(False)
    gates = Gates(kinds_of(model), 0.4, Pace(20, begin=6.0, rate=100.0, multiplier_rate=300.0))
    settings = TrainingSettings(steps=120, batch_size=2, length=16, learning_rate=1e-3, clip=None, schedule="constant", warmup=0)

    def loss(ids: Tensor) -> Tensor:
        with gates.drawn():
            logits = model(input_ids=ids, use_cache=False).logits
        return logits.square().mean() * 0 + gates.penalty()

    train(settings, gates.parameters, loss, IDS, tiny_dense, gates)
    gone, target, *_ = (list(column) for column in zip(*gates.path, strict=True))
    first = 1 - 1 / (1 + math.exp(-6 + 2 / 3 * math.log(1 / 11)))
    assert target[0] == pytest.approx(first + (0.4 - first) / 20, abs=1e-6) and target[19:] == pytest.approx([0.4] * 101)
    assert gates.path[0][2] < 0, "too little is gone: λ₁ falls, so that its product with the gap grows"
    assert gone[-1] == pytest.approx(0.4, abs=0.05)
    assert all(value >= 0 for *_, value in gates.path), "λ₂ of a square can only climb"


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_is_cut_is_what_was_masked(architecture: str) -> None:
    model = make(architecture)
    kinds = kinds_of(model)
    gates = Gates(kinds, 0.3, Pace(1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(2 * torch.randn(len(alpha), generator=generator))
    wanted = round(0.3 * gates.total)
    before, gone = model.num_parameters(), gates.chosen(wanted)
    settled = {name: gates.law.settled(alpha.detach()).masked_fill(gone[name], 0.0) for name, alpha in gates.alphas.items()}
    with torch.no_grad(), multiplied(kinds, settled):
        masked = model(IDS, use_cache=False).logits
    assert gates.finish(model, wanted).keys() == gone.keys()
    with torch.no_grad():
        assert (model(IDS, use_cache=False).logits - masked).abs().max() < 1e-4
    removed = sum(int(mask.sum()) * price_ for mask, price_ in zip(gone.values(), gates_prices(architecture), strict=True))
    assert before - model.num_parameters() == removed
    assert wanted <= removed < wanted + max(gates_prices(architecture)), "to less than one unit"


def test_a_unit_that_stays_is_never_multiplied_by_zero() -> None:
    model = make("llama")
    kinds = kinds_of(model)
    gates = Gates(kinds, 0.3, Pace(1, begin=-3.0))
    before = {name: kind.reads.weight.detach().clone() for name, kind in kinds.items()}
    gone = gates.finish(model, 1)
    assert sum(int(mask.sum()) for mask in gone.values()) == 1
    share = 1 / (1 + math.exp(3.0))
    assert 1.2 * share - 0.1 < 0, "ẑ is 0"
    for name, kind in kinds.items():
        if not bool(gone[name].any()):
            assert torch.allclose(kind.reads.weight, before[name] * share, atol=1e-6)


def gates_prices(architecture: str) -> list[int]:
    """Parameters of a unit of each kind, counted by hand from the shapes."""
    block = anatomy(make(architecture))[0]
    hidden, heads, groups = 64, block.attention.head_dim * block.attention.repeats, block.attention.head_dim
    biases = architecture == "opt"
    group = hidden * (heads + 2 * groups + heads) + biases * (heads + 2 * groups)
    channel = hidden * (2 if biases else 3) + biases
    return [group, channel] * 3


def test_no_more_than_there_is_can_go() -> None:
    gates = Gates(kinds_of(make("llama")), 0.3, Pace(1))
    with pytest.raises(Unsupported, match="one group of heads and one channel"):
        gates.finish(make("llama"), gates.total)


def test_a_drawn_model_differs_and_an_open_one_does_not() -> None:
    model = make("llama")
    gates = Gates(kinds_of(model), 0.3, Pace(1, begin=50.0))
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with gates.drawn():
            assert torch.equal(model(IDS, use_cache=False).logits, plain)
        for alpha in gates.alphas.values():
            alpha.zero_()
        with gates.drawn():
            assert not torch.allclose(model(IDS, use_cache=False).logits, plain)
        assert torch.equal(model(IDS, use_cache=False).logits, plain)


def test_a_claim_tells_fifty_rows_of_the_path_and_a_run_goes_on_where_it_was() -> None:
    gates, other = (Gates(kinds_of(make("llama")), 0.3, Pace(4, rate=2.0, multiplier_rate=3.0, square_rate=5.0)) for _ in range(2))
    assert [group.factor for group in gates.groups()] == [2.0, 3.0, 5.0]
    assert [group.maximize for group in gates.groups()] == [False, True, True]
    assert {name for group in gates.groups() for name in group.names} == gates.parameters.keys()
    targets = []
    for step in range(200):
        targets.append(gates.target())
        gates.after_step(step, None)  # type: ignore[arg-type]
    begun = float(gates.gone().detach())
    assert targets[:5] == pytest.approx([begun + (0.3 - begun) * share for share in (0.25, 0.5, 0.75, 1.0, 1.0)])
    rows = gates.told()["path"]
    assert len(rows) == 50 and [rows[0][0], rows[-1][0]] == [1, 200] and all(a[0] < b[0] for a, b in pairwise(rows))
    assert rows[-1][1] == round(gates.told()["expected_gone"], 6) == round(begun, 6)
    other.load(gates.state())
    assert (other.step, other.path, other.target()) == (gates.step, gates.path, gates.target())

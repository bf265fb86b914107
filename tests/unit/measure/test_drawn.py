"""Texts that are drawn: those that are not drawn from the model's own distribution are told, whatever guessed at them."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config import engines
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic.drawn import FAR, Drawn
from slimbench.harness.measure.dynamic.work import measure
from slimbench.harness.measure.loaded import Draws
from slimbench.harness.run.planning import obstacles
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.work import WorkResult
from slimbench.methods.base import Unsupported
from slimbench.methods.compact.streaming_llm import StreamingLLM
from slimbench.methods.formats.draft.policy import Exit, Lookup
from slimbench.methods.formats.draft.sampling import Sampling
from slimbench.methods.formats.policy import Policy
from tests.support.policies import sharp
from tests.support.running import cell


@pytest.fixture(scope="module")
def base() -> Any:
    return sharp(num_hidden_layers=3, vocab_size=64, max_position_embeddings=512)


def texts(count: int = 8, tokens: int = 24) -> Tensor:
    return torch.randint(0, 64, (count, tokens), generator=torch.Generator().manual_seed(5))


def counted(base: Any, *policies: Policy, temperature: float = 1.0, sampling: Sampling | None = None) -> WorkResult:
    model = copy.deepcopy(base)
    for policy in policies:
        policy.install(model)
    loaded = TransformersModel(model, "cpu")
    loaded.slots = [policy.slot for policy in policies]
    loaded.draw(temperature)
    if sampling:
        loaded._sampling = sampling
        if policies and policies[-1].slot == "draft":
            loaded._drafter.sampling = sampling
    return measure(loaded, texts(), None, lambda *_: None, 65)


def test_the_mean_and_the_variance_are_those_of_the_definition() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -torch.inf]])
    told = Drawn(0.5)
    told.add(logits, torch.tensor([1, 0]))
    excess = variance = 0.0
    for row, token in ((logits[0], 1), (logits[1], 0)):
        weights = [math.exp(float(x) / 0.5) for x in row]
        shares = [weight / sum(weights) for weight in weights]
        mean = sum(p * math.log(p) for p in shares if p)
        variance += sum(p * (math.log(p) - mean) ** 2 for p in shares if p)
        excess += math.log(shares[token]) - mean
    assert told.excess == pytest.approx(excess) and told.variance == pytest.approx(variance)
    assert told.deviations == pytest.approx(excess / math.sqrt(variance))
    assert Drawn(1.0).deviations == 0.0


def test_deviations_of_honest_draws_are_normal() -> None:
    """Of 400 texts of texts: mean 0 and deviation 1 within chance, and none is told."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        logits = 3 * torch.randn(200, 50, generator=draw)
        told = Drawn(0.8)
        told.add(logits, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=draw)[:, 0])
        found.append(told.deviations)
        assert told.flag is None
    assert abs(statistics.mean(found)) < 3 / math.sqrt(400) and statistics.stdev(found) == pytest.approx(1, abs=0.12)


LOOKUP, EXIT, STREAMING = Lookup(4, 1), Exit(3, 1), StreamingLLM(budget=16, sinks=2).policy()


@pytest.mark.parametrize("policies", [(), (LOOKUP,), (EXIT,), (STREAMING, LOOKUP)], ids=["alone", "lookup", "exit", "window and lookup"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_honest_texts_are_not_told(base: Any, policies: tuple[Policy, ...], temperature: float) -> None:
    found = counted(base, *policies, temperature=temperature)
    assert found.flags == [] and found.temperature == temperature and found.deviations is not None and abs(found.deviations) < FAR
    assert found.equal is found.parted_by_rounding is None, "there is no text that it would have to be"
    if policies and policies[-1].slot == "draft":
        assert sum(found.text_drafted) > sum(found.text_accepted) > 0 and (found.passes or 0) < found.tokens


class Credulous(Sampling):
    """Takes every guess."""

    def settled(self, guesses: Any, drafted: Any, logits: Tensor) -> list[int]:
        return [*guesses, int(self.drawn(logits[-1:]))]


class Likeliest(Sampling):
    """Says that it draws, and takes the likeliest."""

    def drawn(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)


class Warmer(Sampling):
    """Draws at another temperature than it says."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / (1.5 * self.temperature)).softmax(-1)


class Unpaid(Sampling):
    """Where a guess falls it draws from the whole distribution, and so takes what was guessed too often."""

    def settled(self, guesses: Any, drafted: Any, logits: Tensor) -> list[int]:
        kept = [*itertools.takewhile(lambda pair: float(torch.rand(())) < 0.9, zip(guesses, logits, strict=False))]
        return [*(guess for guess, _ in kept), int(self.drawn(logits[len(kept)][None]))]


LIES = [(Credulous, (LOOKUP,)), (Credulous, (EXIT,)), (Likeliest, ()), (Warmer, ()), (Warmer, (EXIT,)), (Unpaid, (EXIT,))]


@pytest.mark.parametrize(("lie", "policies"), LIES)
def test_texts_that_are_not_the_models_own_are_told(base: Any, lie: type[Sampling], policies: tuple[Policy, ...]) -> None:
    found = counted(base, *policies, sampling=lie(1.0, torch.device("cpu")))
    (flag,) = found.flags
    assert found.deviations is not None and abs(found.deviations) > FAR and (found.deviations > 0) == (lie is Likeliest)
    assert flag == f"texts are not drawn from the model: their log-probability lies {found.deviations:+.1f} deviations off its mean"


def test_what_an_engine_says_of_draws_is_what_its_models_do(overrides: list[str]) -> None:
    named = {engine.name for engine in engines.catalogue() if engine.draws}
    assert named == {"transformers", "offload"}
    reason = "speed.temperature=0.5: engine compiled writes the likeliest token alone; transformers, offload would draw"
    there = cell(overrides, "engine=compiled", "+speed.temperature=0.5")
    assert [obstacles.impossible(there, stage) for stage in Stage] == [None, None, reason]
    for more in (["engine=offload", "+speed.temperature=0.5"], ["engine=compiled"]):
        assert obstacles.impossible(cell(overrides, *more), Stage.SPEED) is None


def test_an_engine_that_only_chooses_says_so(base: Any) -> None:
    compiled = CompiledModel(copy.deepcopy(base), "cpu")
    with pytest.raises(Unsupported, match=r"^this engine does not draw tokens at a temperature$"):
        Draws.of(compiled).draw(1.0)

"""Texts that are drawn: those that are not drawn from the model's own distribution are told, whatever guessed at them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from slimbench.harness.config import engines
from slimbench.harness.config.targets import locate
from slimbench.harness.engines.compiled import CompiledEngine, CompiledModel
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel
from slimbench.harness.measure.dynamic.drawn import RARE, Drawn
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


def test_places_means_and_covariances_are_those_of_the_definition() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1], [1.0, 0.0, -torch.inf, 0.5]])
    told, excess, covariance = Drawn(2.0), np.zeros(10), np.zeros((10, 10))
    told.add(logits, torch.tensor([1, 0]))
    for row, token in ((logits[0].tolist(), 1), (logits[1].tolist(), 0)):
        weights = [math.exp(x / 2.0) for x in row]
        shares = [weight / sum(weights) for weight in weights]
        tenths = [min(9, int(10 * (sum(y for y in shares if y > x) + x / 2))) for x in shares]
        expected = [sum(x for x, tenth in zip(shares, tenths, strict=True) if tenth == place) for place in range(10)]
        for one in range(10):
            excess[one] += (tenths[token] == one) - expected[one]
            for other in range(10):
                covariance[one, other] += (one == other) * expected[one] - expected[one] * expected[other]
    assert told.ranks.excess == pytest.approx(excess) and told.ranks.covariance == pytest.approx(covariance)
    assert told.p is told.flag is None, "two tokens say nothing"


@pytest.mark.parametrize("sharpness", [1.0, 2.0, 4.0])
def test_of_honest_draws_the_probability_is_no_smaller_than_it_says(sharpness: float) -> None:
    """Whether tokens are all alike or all but certain: of 150 texts of texts none is told, and few lie in the last hundredths."""
    draw, found = np.random.default_rng(0), []
    for _ in range(150):
        logits = sharpness * draw.standard_normal((250, 40)) + 3 * draw.standard_normal(40)
        told, weights = Drawn(0.8), np.exp((logits - logits.max(-1, keepdims=True)) / 0.8)
        shares = weights / weights.sum(-1, keepdims=True)
        told.add(torch.from_numpy(logits), torch.tensor([int(draw.choice(40, p=each)) for each in shares]))
        assert told.flag is None
        found += [each for each in (told.ranks.p, told._names().p) if each is not None]
    assert len(found) > 200 and kstest(found, "uniform").pvalue > 1e-4


def test_of_certain_tokens_nothing_is_said_unless_others_come() -> None:
    sure, tokens = 100 * torch.eye(20), torch.arange(20)
    honest, lie = Drawn(1.0), Drawn(0.01)
    honest.add(sure, tokens)
    lie.add(sure, (tokens + 1) % 20)
    assert honest.p is honest.flag is lie.p is None
    assert lie.flag == "texts are not drawn from the model: 20 tokens are none that it could draw"


LOOKUP, EXIT, STREAMING = Lookup(4, 1), Exit(3, 1), StreamingLLM(budget=16, sinks=2).policy()


@pytest.mark.parametrize("policies", [(), (LOOKUP,), (EXIT,), (STREAMING, LOOKUP)], ids=["alone", "lookup", "exit", "window and lookup"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_honest_texts_are_not_told(base: Any, policies: tuple[Policy, ...], temperature: float) -> None:
    found = counted(base, *policies, temperature=temperature)
    assert found.flags == [] and found.temperature == temperature and found.drawn_p is not None and found.drawn_p > RARE
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


LIES = [(Credulous, (LOOKUP,)), (Credulous, (EXIT,)), (Likeliest, ()), (Warmer, ()), (Warmer, (EXIT,))]


@pytest.mark.parametrize(("lie", "policies"), LIES)
def test_texts_that_are_not_the_models_own_are_told(base: Any, lie: type[Sampling], policies: tuple[Policy, ...]) -> None:
    found = counted(base, *policies, sampling=lie(1.0, torch.device("cpu")))
    (flag,) = found.flags
    assert found.drawn_p is not None and found.drawn_p < RARE
    assert flag == f"texts are not drawn from the model: of its own {found.drawn_p:.1g} lie as far from what is expected"


def test_what_an_engine_says_of_draws_is_what_its_models_do(overrides: list[str]) -> None:
    classes = {engine.name: locate(engine.target) for engine in engines.catalogue()}
    able = {name for name, cls in classes.items() if issubclass(cls, TransformersEngine) and not issubclass(cls, CompiledEngine)}
    assert able == {engine.name for engine in engines.catalogue() if engine.draws} >= {"transformers", "offload", "gptqmodel"}
    reason = "speed.temperature=0.5: engine compiled writes the likeliest token alone; "
    there = cell(overrides, "engine=compiled", "+speed.temperature=0.5")
    assert [obstacles.impossible(there, stage) for stage in (Stage.COMPRESS, Stage.QUALITY)] == [None, None]
    told = obstacles.impossible(there, Stage.SPEED) or ""
    assert told.startswith(reason) and set(told.removeprefix(reason).removesuffix(" would draw").split(", ")) == able
    for more in (["engine=offload", "+speed.temperature=0.5"], ["engine=compiled"]):
        assert obstacles.impossible(cell(overrides, *more), Stage.SPEED) is None


def test_an_engine_that_only_chooses_says_so(base: Any) -> None:
    compiled = CompiledModel(copy.deepcopy(base), "cpu")
    with pytest.raises(Unsupported, match=r"^this engine does not draw tokens at a temperature$"):
        Draws.of(compiled).draw(1.0)

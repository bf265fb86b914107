"""Drawn tokens: whatever guesses at them, they are distributed as the model's own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.formats.draft.policy import DraftPolicy, Exit, Lookup
from slimbench.methods.formats.draft.sampling import Sampling
from slimbench.methods.formats.draft.speculation import Drafter, ModelDrafter
from tests.support import tiny

VOCABULARY, DRAWS = 6, 20_000


def sampling(temperature: float, seed: int = 0) -> Sampling:
    made = Sampling(temperature, torch.device("cpu"))
    made.begin(torch.tensor([[seed]]))
    return made


def fits(counts: Counter[Any], wanted: dict[Any, float]) -> float:
    """The p-value of counts under probabilities; kinds that are expected fewer than five times count together."""
    total = counts.total()
    assert set(counts) <= {kind for kind, share in wanted.items() if share > 0}
    rare = [kind for kind, share in wanted.items() if share * total < 5]
    seen = [counts[kind] for kind in wanted if kind not in rare]
    expected = [wanted[kind] * total for kind in wanted if kind not in rare]
    if (share := sum(wanted[kind] for kind in rare)) * total >= 5:
        seen.append(sum(counts[kind] for kind in rare))
        expected.append(share * total)
    return float(chisquare(seen, [each * sum(seen) / sum(expected) for each in expected]).pvalue)


KINDS = [("near", 0.5), ("itself", 1.0), ("certain", 0.7), ("looked up", 0.7)]
MORE = [("near", 1.0), ("near", 2.0), ("far", 1.0)]


@pytest.mark.parametrize(("kind", "temperature"), [*KINDS, *(pytest.param(*more, marks=pytest.mark.full) for more in MORE)])
def test_what_comes_of_two_guesses_is_distributed_as_without_them(kind: str, temperature: float) -> None:
    """Of 20,000 draws the first token, and the second and third behind the guesses that were taken, against the definition."""
    draw = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, VOCABULARY, generator=draw)
    drafted = {
        "near": logits[:2] + 0.3 * torch.randn(2, VOCABULARY, generator=draw),
        "far": 3 * torch.randn(2, VOCABULARY, generator=draw),
        "itself": logits[:2],
        "certain": torch.tensor([[-1e4] * VOCABULARY] * 2).index_fill(1, torch.tensor([2]), 0.0),
        "looked up": None,
    }[kind]
    made, firsts, seconds, thirds, kept = sampling(temperature), Counter[int](), Counter[int](), Counter[int](), 0
    for _ in range(DRAWS):
        guesses = [4, 1] if drafted is None else made.drawn(drafted).tolist()
        came = made.settled(guesses, drafted, logits)
        firsts[came[0]] += 1
        if len(came) > 1:
            assert came[0] == guesses[0]
            seconds[came[1]] += 1
        if len(came) > 2:
            assert came[1] == guesses[1]
            thirds[came[2]] += 1
            kept += 1
    p = (logits.double() / temperature).softmax(-1)
    q = torch.eye(VOCABULARY, dtype=torch.float64)[[4, 1]] if drafted is None else (drafted.double() / temperature).softmax(-1)
    for row, counts in enumerate((firsts, seconds, thirds)):
        if counts.total() > 100:
            assert fits(counts, dict(enumerate(p[row].tolist()))) > 1e-4
    rate = torch.minimum(p[:2], q).sum(-1)
    assert seconds.total() / DRAWS == pytest.approx(float(rate[0]), abs=0.015), "a guess stays with the probability Σ min(p, q)"
    assert kept / DRAWS == pytest.approx(float(rate.prod()), abs=0.015)


class Unpaid(Sampling):
    """Where a guess falls it draws from the whole distribution, and so takes what was guessed too often."""

    def settled(self, guesses: Sequence[int], drafted: Tensor | None, logits: Tensor) -> list[int]:
        came = super().settled(guesses, drafted, logits)
        return came if len(came) > len(guesses) else [*came[:-1], *self.drawn(logits[len(came) - 1][None]).tolist()]


@pytest.mark.parametrize("looked_up", [False, True])
def test_a_draw_from_all_where_a_guess_falls_is_told_by_the_same_check(looked_up: bool) -> None:
    logits = 2 * torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(3))
    made = Unpaid(1.0, torch.device("cpu"))
    made.begin(torch.tensor([[0]]))
    drafted = None if looked_up else 0.5 * logits[:1]
    came = Counter(made.settled([4] if drafted is None else made.drawn(drafted).tolist(), drafted, logits)[0] for _ in range(DRAWS))
    assert fits(came, dict(enumerate(logits.double().softmax(-1)[0].tolist()))) < 1e-6


def test_tokens_without_guesses_are_drawn_by_the_softmax() -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    made = sampling(0.7)
    counts = Counter(made.drawn(logits.expand(DRAWS, -1)).tolist())
    assert fits(counts, dict(enumerate((logits.double() / 0.7).softmax(-1)[0].tolist()))) > 1e-4
    assert (
        fits(Counter(sampling(1.0).drawn(logits.expand(DRAWS, -1)).tolist()), dict(enumerate((logits / 0.7).softmax(-1)[0].tolist())))
        < 1e-6
    )


def test_logits_with_one_token_alone_never_fail() -> None:
    """Where guess and model are certain of the same token nothing is left to draw from."""
    sure = torch.full((2, VOCABULARY), -torch.inf).index_fill(1, torch.tensor([3]), 0.0)
    assert sampling(1.0).settled([3], sure[:1], sure) == [3, 3] and sampling(1.0).settled([3], None, sure) == [3, 3]
    assert sampling(1.0).settled([2], None, sure) == [3]


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | shape))).eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(4 if "embed" not in name else 1)
    return model


def drawing(base: Any, policy: DraftPolicy | None, temperature: float = 1.0) -> TransformersModel:
    model = copy.deepcopy(base)
    if policy:
        policy.install(model)
    loaded = TransformersModel(model, "cpu")
    loaded.draw(temperature)
    return loaded


class Beside(ModelDrafter):
    """Guesses of the same model with its last block left out."""

    def __init__(self, model: Any, tokens: int) -> None:
        draft = copy.deepcopy(model)
        draft.model.layers, draft.config.num_hidden_layers = draft.model.layers[:2], 2
        super().__init__(model, tokens, draft)


def texts(model: TransformersModel, count: int, room: int) -> list[tuple[int, ...]]:
    """Texts behind one prompt: drawn anew each time, as if its prompt had been another."""
    prompt = torch.tensor([[1, 4, 2, 0, 1, 4]])
    inner, seeds = model._sampling, iter(range(count))  # type: ignore[attr-defined]
    begin = inner.begin  # type: ignore[union-attr]
    inner.begin = lambda ids: begin(torch.tensor([[next(seeds)]]))  # type: ignore[union-attr,method-assign]
    return [tuple(model.generate(prompt, room)[0]) for _ in range(count)]


def probabilities(base: Any, prompt: Sequence[int], tokens: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Of each text of so many tokens, by the definition."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for text, share in found.items():
            with torch.no_grad():
                logits = base(torch.tensor([[*prompt, *text]])).logits[0, -1].double()
            for token, weight in enumerate((logits / temperature).softmax(-1).tolist()):
                longer[*text, token] = share * weight
        found = longer
    return found


@pytest.mark.parametrize("kind", ["alone", "lookup", "exit", "model"])
def test_whole_texts_are_distributed_as_the_models_own(base: Any, kind: str) -> None:
    """Of three tokens behind a prompt: the first is drawn without guesses, the others with up to two."""
    policies = {"lookup": Lookup(2, 2), "exit": Exit(2, 1)}
    model = drawing(base, policies.get(kind))
    if kind == "model":
        model._drafter = model.module.drafter = Beside(model.module, 2)
        model.draw(1.0)
    found = Counter(texts(model, 2000, 3))
    wanted = probabilities(base, [1, 4, 2, 0, 1, 4], 3, 1.0)
    assert fits(found, wanted) > 1e-4
    assert len(found) > 50, "texts are many"


@pytest.mark.parametrize("policy", [None, Lookup(3, 2), Exit(3, 1)], ids=str)
def test_the_same_prompt_gives_the_same_text_and_a_low_temperature_the_likeliest(base: Any, policy: DraftPolicy | None) -> None:
    prompts = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2)).split(1)
    model = drawing(base, policy)
    first = [model.generate(ids, 20) for ids in prompts]
    assert first == [model.generate(ids, 20) for ids in prompts] and len({tuple(text[0]) for text in first}) == 4
    greedy = TransformersModel(base, "cpu")
    assert [drawing(base, policy, 1e-5).generate(ids, 20) for ids in prompts] == [greedy.generate(ids, 20) for ids in prompts]
    assert first != [greedy.generate(ids, 20) for ids in prompts]


def test_texts_of_a_batch_are_drawn_each_as_alone(base: Any) -> None:
    model, prompts = drawing(base, None), torch.tensor([[1, 4, 2, 0], [1, 4, 2, 3], [1, 4, 2, 0]])
    together = model.generate(prompts, 30)
    assert together == [model.generate(prompt, 30)[0] for prompt in prompts.split(1)]
    assert together[0] == together[2] != together[1]


def test_greedy_guesses_need_no_sampling(base: Any) -> None:
    model = copy.deepcopy(base)
    Exit(2, 1).install(model)
    drafter: Drafter = model.drafter
    assert drafter.sampling is None
    TransformersModel(model, "cpu").draw(0.5)
    assert drafter.sampling is not None and drafter.sampling.temperature == 0.5

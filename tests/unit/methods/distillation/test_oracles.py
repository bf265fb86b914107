"""Losses of distillation against those of the papers over numbers in float64, on random cases, and mutants of each that are noticed.

What an oracle is given of a model is what transformers gives of a second copy of it: hidden states, eager attentions, and what the
projections of queries, keys and values make.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from slimbench.methods.base import DenseModel
from slimbench.methods.core import losses, training
from slimbench.methods.core.learning import answers
from slimbench.methods.core.learning.answers import ANSWER, PROMPT, RESPONSE
from slimbench.methods.core.learning.states import States
from slimbench.methods.distillation import dynabert, hints, minilm, ted, tinybert
from slimbench.methods.distillation.distilbert import DistilBERT
from slimbench.methods.distillation.dynabert import DEPTHS, WIDTHS, DynaBERT
from slimbench.methods.distillation.gkd import GKD
from slimbench.methods.distillation.hints import FSP, FitNets
from slimbench.methods.distillation.homodistil import HomoDistil
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.distillation.minilm import MiniLM
from slimbench.methods.distillation.peers import MutualLearning
from slimbench.methods.distillation.taught import consistency, rounds
from slimbench.methods.distillation.taught.consistency import Consistency
from slimbench.methods.distillation.taught.context import ContextDistillation
from slimbench.methods.distillation.taught.in_context import InContext
from slimbench.methods.distillation.taught.instruct import InstructionTuning
from slimbench.methods.distillation.taught.rationale import RationaleTuning
from slimbench.methods.distillation.taught.rounds import Reflection
from slimbench.methods.distillation.taught.tasks import Scott, Socratic
from slimbench.methods.distillation.ted import TED
from slimbench.methods.distillation.tinybert import TinyBERT
from slimbench.util.writing.teaching import TRAIN, Example, write_examples
from tests.support import oracles, tiny
from tests.support.mutants import mutant

CASES, VOCABULARY = 20, 97


@dataclass(frozen=True)
class Pair:
    """A student and its teacher in float64, and a copy of each that only transformers touches."""

    dense: DenseModel
    student: Any
    teacher: Any
    copies: tuple[Any, Any]


@dataclass(frozen=True)
class World:
    """Models whose queries share keys, all of one vocabulary.

    Attributes:
        alike: A student of three blocks and its teacher of five, of one width.
        wider: The same student and a wider teacher, with as many heads.
        uneven: A student of half the width and half the heads.
        texts: Folders of examples by the names of their tasks.
    """

    alike: Pair
    wider: Pair
    uneven: Pair
    texts: dict[tuple[str, ...], Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("oracles")

    def saved(name: str, seed: int, **shape: Any) -> DenseModel:
        return tiny.save_model(folder / name, "float32", seed, vocab_size=VOCABULARY, initializer_range=0.25, **shape)

    def pair(student: DenseModel, teacher: DenseModel) -> Pair:
        dense = replace(student, original=teacher.path)
        models: list[Any] = [load(dtype=torch.float64).requires_grad_(False) for load in (dense.load, dense.load_original) * 2]
        for each in models[2:]:
            each.set_attn_implementation("eager")
        return Pair(dense, models[0], models[1], (models[2], models[3]))

    student = saved("student", 1, num_hidden_layers=3, intermediate_size=64)
    teacher, wider = saved("teacher", 2, num_hidden_layers=5), saved("wider", 3, num_hidden_layers=5, hidden_size=96)
    narrow = saved("narrow", 4, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    texts: dict[tuple[str, ...], Path] = {}
    tasks: list[tuple[str, ...]] = [("one",), ("label", "rationale"), ("counterfactual", "factual"), ("answers", "questions")]
    for names in tasks:
        texts[names] = folder / names[0]
        texts[names].mkdir()
        write_examples([Example("why", "so", task) for task in names], texts[names] / TRAIN)
    return World(pair(student, teacher), pair(student, wider), pair(narrow, teacher), texts)


class Draw:
    """One random case."""

    def __init__(self, case: int) -> None:
        self.generator = torch.Generator().manual_seed(case)

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens(self, *shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=self.generator)

    def ids(self) -> Tensor:
        """One to three sequences of three to eight tokens."""
        return self.tokens(self.whole(1, 3), self.whole(3, 8))

    def answer(self, response: Tensor | None = None, right: int = 0, task: int = 0) -> Tensor:
        """An answer [3, its length]: a prompt, a response of which the last but one are right, and its end."""
        said = self.tokens(self.whole(1, 4)) if response is None else response
        prompt = self.tokens(self.whole(1, 5))
        parts = [PROMPT] * len(prompt) + [RESPONSE] * len(said) + [ANSWER] * right + [RESPONSE]
        ids = torch.cat([prompt, said, self.tokens(right + 1)])
        return torch.stack([ids, torch.tensor(parts), torch.full_like(ids, task)])


def cases() -> Iterator[Draw]:
    return (Draw(case) for case in range(CASES))


def filled(rows: Sequence[Tensor]) -> Tensor:
    """Answers of unequal lengths [n, 3, longest], with nothing behind the shorter ones."""
    found = torch.zeros(len(rows), 3, max(row.shape[1] for row in rows), dtype=torch.int64)
    for place, row in enumerate(rows):
        found[place, :2, : row.shape[1]] = row[:2]
        found[place, 2] = row[2, 0]
    return found


def learned(of: Tensor) -> Tensor:
    return of[:, 1] >= RESPONSE


@dataclass(frozen=True)
class Seen:
    """What transformers gives of a model; queries, keys and values are what the projections make, rotated where an attention does it."""

    logits: Tensor
    states: Sequence[Tensor]
    attentions: Sequence[Tensor]
    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


def seen(model: Any, ids: Tensor) -> Seen:
    made: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    hooks = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(lambda _, __, out, held=held: held.append(out))
        for layer in model.model.layers
        for name, held in made.items()
    ]
    out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    width = model.model.layers[0].self_attn.head_dim
    queries, keys, values = ([of.unflatten(2, (-1, width)).transpose(1, 2) for of in held] for held in made.values())
    turns = model.model.rotary_emb(values[0], torch.arange(ids.shape[1])[None])
    rotated = [apply_rotary_pos_emb(query, key, *turns) for query, key in zip(queries, keys, strict=True)]
    turned = [[query for query, _ in rotated], [key for _, key in rotated]]
    return Seen(out.logits, out.hidden_states, out.attentions, turned[0], turned[1], values)


def both(pair: Pair, ids: Tensor) -> tuple[Seen, Seen]:
    with torch.no_grad():
        return seen(pair.copies[0], ids), seen(pair.copies[1], ids)


def logits(pair: Pair, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return pair.copies[0](ids, use_cache=False).logits, pair.copies[1](ids, use_cache=False).logits


def same(found: Any, expected: Tensor) -> None:
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


def given(values: Any, draw: Draw, size: float = 1.0) -> list[Tensor]:
    """Put random numbers into matrices that learn beside a student, and give them back; what they turn becomes so many times as large."""
    with torch.no_grad():
        return [value.copy_(size * draw.normal(*value.shape) / value.shape[0] ** 0.5).clone() for value in values]


def test_hinton(world: World) -> None:
    pair = world.alike
    for draw in cases():
        share, temperature, ids = draw.number(0.1, 0.9), draw.number(0.5, 4), draw.ids()
        method = LogitDistillation(teacher_share=share, teacher_temperature=temperature)
        (lesson,) = method.lessons(pair.student, pair.teacher, pair.dense)
        same(lesson.loss(ids), oracles.hinton(*logits(pair, ids), ids, share, temperature))


def test_distilbert(world: World) -> None:
    pair = world.alike
    for draw in cases():
        weights, temperature, ids = (draw.number(1, 6), draw.number(1, 3), draw.number(0.5, 5)), draw.number(0.5, 4), draw.ids()
        method = DistilBERT(
            prediction_weight=weights[0], text_weight=weights[1], direction_weight=weights[2], teacher_temperature=temperature
        )
        (lesson,) = method.lessons(pair.student, pair.teacher, pair.dense)
        ours, theirs = both(pair, ids)
        states = ours.states[-1], theirs.states[-1]
        same(lesson.loss(ids), oracles.distilbert((ours.logits, theirs.logits), states, ids, weights, temperature))


def layers(ours: Seen, theirs: Seen, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """TinyBERT's layers of three blocks under five."""
    places = (2, 4, 5)
    hidden = [(ours.states[block + 1], theirs.states[place]) for block, place in enumerate(places)]
    attention = []
    for block, place in enumerate(places):
        scores = []
        for of, layer in ((ours, block), (theirs, place - 1)):
            scores.append(oracles.scores(of.queries[layer], of.keys[layer]))
            last = torch.stack([torch.stack([head[-1].softmax(-1) for head in row]) for row in scores[-1]])
            torch.testing.assert_close(last, of.attentions[layer][:, :, -1], rtol=1e-5, atol=1e-6)
        attention.append((scores[0], scores[1]))
    return oracles.tinybert((ours.states[0], theirs.states[0]), hidden, attention, turns)


def test_tinybert_layers(world: World) -> None:
    pair = world.wider
    first, _ = TinyBERT().lessons(pair.student, pair.teacher, pair.dense)
    for draw in cases():
        ids = draw.ids()
        (hidden,), (embedding,) = given([first.beside["hidden_match"]], draw), given([first.beside["embedding_match"]], draw, 40.0)
        same(first.loss(ids), layers(*both(pair, ids), (hidden, embedding)))


def test_tinybert_predictions(world: World) -> None:
    pair = world.uneven
    for draw in cases():
        ids = draw.ids()
        same(TinyBERT().predictions(pair.student, pair.teacher, pair.dense)(ids), oracles.soft(*logits(pair, ids)))


def test_soft_labels(world: World) -> None:
    """What methods with a temperature of their own train by, of student and teacher of other sizes."""
    pair = world.uneven
    for draw in cases():
        ids, temperature = draw.ids(), draw.number(0.5, 4)
        settings: Any = SimpleNamespace(loss="distillation", teacher_temperature=temperature)
        found = training.objective(settings, pair.student, pair.dense, pair.teacher)(ids)
        same(found, temperature**2 * oracles.soft(*logits(pair, ids), temperature))


def test_homodistil(world: World) -> None:
    pair = world.alike
    for draw in cases():
        ids, weights = draw.ids(), (draw.number(0.3, 3), draw.number(0.3, 3))
        loss = HomoDistil(prediction_weight=weights[0], layer_weight=weights[1]).loss_of(pair.student, pair.teacher, pair.dense)
        ours, theirs = both(pair, ids)
        same(loss(ids), oracles.homodistil((ours.logits, theirs.logits), layers(ours, theirs), ids, weights))


def test_fitnets(world: World) -> None:
    pair = world.wider
    for draw in cases():
        ids, share, temperature = draw.ids(), draw.number(0.1, 0.9), draw.number(0.5, 4)
        method = FitNets(teacher_share=share, teacher_temperature=temperature)
        first, second = method.lessons(pair.student, pair.teacher, pair.dense)
        (regressor,) = given(first.beside.values(), draw)
        ours, theirs = both(pair, ids)
        same(first.loss(ids), oracles.hint(ours.states[1], theirs.states[2], regressor))
        same(second.loss(ids), oracles.hinton(ours.logits, theirs.logits, ids, share, temperature))


def test_fsp(world: World) -> None:
    pair, ends = world.alike, {1: ((0, 3), (0, 5)), 2: ((0, 2, 3), (0, 2, 5)), 3: ((0, 1, 2, 3), (0, 2, 3, 5))}
    for draw in cases():
        ids, count = draw.ids(), draw.whole(1, 3)
        first, second = FSP(pairs=count).lessons(pair.student, pair.teacher, pair.dense)
        found = both(pair, ids)
        same(first.loss(ids), oracles.flow(*([of.states[end] for end in at] for of, at in zip(found, ends[count], strict=True))))
        same(second.loss(ids), oracles.text(found[0].logits, ids))


def test_minilm(world: World) -> None:
    pair = world.wider
    (lesson,) = MiniLM().lessons(pair.student, pair.teacher, pair.dense)
    for draw in cases():
        ids = draw.ids()
        ours, theirs = both(pair, ids)
        same(lesson.loss(ids), oracles.minilm((ours.attentions[-1], theirs.attentions[-1]), (ours.values[-1], theirs.values[-1])))


def test_minilm_relations(world: World) -> None:
    pair = world.uneven
    for draw in cases():
        ids, count = draw.ids(), 2 ** draw.whole(0, 3)
        (lesson,) = MiniLM(relation_heads=count).lessons(pair.student, pair.teacher, pair.dense)
        ours, theirs = ([of.queries[-1], of.keys[-1], of.values[-1]] for of in both(pair, ids))
        same(lesson.loss(ids), oracles.minilm_relations(ours, theirs, count))


def test_ted(world: World) -> None:
    pair, places = world.alike, {2: ((2, 3), (3, 5)), 3: ((1, 2, 3), (2, 4, 5))}
    heads = [each.get_output_embeddings().weight.detach() for each in pair.copies]
    for draw in cases():
        ids, count, weights = draw.ids(), draw.whole(2, 3), (draw.number(0.5, 3), draw.number(0.5, 3))
        method = TED(pairs=count, prediction_weight=weights[0], layer_weight=weights[1])
        taught, learning, last = method.lessons(pair.student, pair.teacher, pair.dense)
        theirs, ours = given(taught.beside.values(), draw), given(learning.beside.values(), draw)
        made, wanted = both(pair, ids)
        states = [[of.states[place] for place in at] for of, at in zip((made, wanted), places[count], strict=True)]
        same(taught.loss(ids), oracles.ted_task(states[1], theirs, heads[1], ids))
        same(learning.loss(ids), oracles.ted_task(states[0], ours, heads[0], ids))
        aligned = oracles.ted((made.logits, wanted.logits), (states[0], states[1]), (ours, theirs), ids, weights)
        same(last.loss(ids), aligned)


def test_mutual(world: World) -> None:
    """The peer is the teacher without two of its blocks; each student's gradient is that of its own loss."""
    pair = world.alike
    student = copy.deepcopy(pair.student).requires_grad_(True)
    (lesson,) = MutualLearning().lessons(student, None, pair.dense)
    for value in lesson.beside.values():
        value.data = value.data.double()
    first, second = (copy.deepcopy(each).requires_grad_(True) for each in pair.copies)
    second.model.layers = torch.nn.ModuleList(second.model.layers[place] for place in (1, 3, 4))
    second.config.num_hidden_layers = 3
    learning = student.model.norm.weight, lesson.beside["peer.model.norm.weight"]
    for draw in cases():
        ids = draw.ids()
        found = lesson.loss(ids)
        one, other = (model(ids, use_cache=False).logits for model in (first, second))
        alone = oracles.mutual(one, other, ids), oracles.mutual(other, one, ids)
        same(found, alone[0] + alone[1])
        for value, model, loss in zip(learning, (first, second), alone, strict=True):
            (gradient,) = torch.autograd.grad(found, value, retain_graph=True)
            (wanted,) = torch.autograd.grad(loss, model.model.norm.weight, retain_graph=True)
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def part(model: Any, groups: int, channels: int, blocks: Sequence[int]) -> Any:
    """A copy of a model without what the other heads and channels make, and without the other blocks."""
    found = copy.deepcopy(model)
    found.model.layers = torch.nn.ModuleList(found.model.layers[place] for place in blocks)
    found.config.num_hidden_layers = len(blocks)
    with torch.no_grad():
        for layer in found.model.layers:
            layer.self_attn.o_proj.weight[:, groups * 2 * layer.self_attn.head_dim :] = 0
            layer.mlp.down_proj.weight[:, channels:] = 0
    return found.requires_grad_(False)


def test_dynabert(world: World) -> None:
    """Of three blocks with two groups of heads and 64 channels; the first part under five blocks, the second under what it began with."""
    pair, sizes = world.alike, {1.0: (2, 64), 0.75: (2, 48), 0.5: (1, 32), 0.25: (1, 16)}
    blocks, matched = {1.0: (0, 1, 2), 0.75: (0, 1), 0.5: (0, 2)}, {1.0: (0, 1, 2, 3), 0.75: (0, 1, 3), 0.5: (0, 2, 3)}
    assert tuple(sizes) == WIDTHS and tuple(blocks) == DEPTHS
    student, before = (pair.dense.load(dtype=torch.float64).requires_grad_(False) for _ in range(2))
    held = {width: part(before, *of, blocks[1.0]) for width, of in sizes.items()}
    first, second = DynaBERT(state_weight=0.3).lessons(student, pair.teacher, pair.dense)
    second.begin()
    for value in student.parameters():
        value.add_(0.1 * value.abs().mean() * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    smaller = {(width, depth): part(student, *of, kept) for depth, kept in blocks.items() for width, of in sizes.items()}
    for draw in cases():
        ids = draw.ids()
        made, wanted = {at: seen(model, ids) for at, model in smaller.items()}, seen(pair.copies[1], ids)
        taught = {width: seen(model, ids) for width, model in held.items()}
        targets = [wanted.states[place] for place in (0, 1, 3, 5)]
        widths = [(made[width, 1.0], wanted.logits, targets) for width in WIDTHS]
        depths = [
            (made[width, depth], taught[width].logits, [taught[width].states[place] for place in matched[depth]])
            for depth in DEPTHS
            for width in WIDTHS
        ]
        for lesson, pairs, weight in ((first, widths, 0.3), (second, depths, 1.0)):
            parts = [(of.logits, teacher, list(zip(of.states, states, strict=True))) for of, teacher, states in pairs]
            same(lesson.loss(ids), oracles.dynabert(parts, weight))


def test_gkd(world: World) -> None:
    pair = world.uneven
    for case, draw in enumerate(cases()):
        ids, mixture = draw.ids(), (draw.number(0.05, 0.95), 0.0, 1.0)[case % 3]
        prompt = draw.whole(1, ids.shape[1] - 1)
        method = GKD(student_share=0.0, mixture=mixture, prompt_tokens=prompt)
        (lesson,) = method.lessons(pair.student, pair.teacher, pair.dense)
        same(lesson.loss(ids), oracles.gkd(*logits(pair, ids), prompt, mixture))


def test_responses(world: World) -> None:
    """Of all tokens alike, and of tasks with weights; some batches have one task alone."""
    pair = world.alike
    for draw in cases():
        share = draw.number(0.1, 0.9)
        kinds: list[tuple[Any, tuple[str, ...], dict[int, float] | None]] = [
            (InstructionTuning(), ("one",), None),
            (RationaleTuning(recipe="step-by-step", label_share=share), ("label", "rationale"), {0: share, 1: 1 - share}),
            (Scott(counterfactual=share), ("counterfactual", "factual"), {0: share, 1: 1 - share}),
            (Socratic(), ("answers", "questions"), {0: 1.0, 1: 1.0}),
        ]
        rows = filled([draw.answer(right=draw.whole(0, 2), task=draw.whole(0, 1)) for _ in range(draw.whole(1, 4))])
        with torch.no_grad():
            made = pair.copies[0](rows[:, 0], use_cache=False).logits
        for method, tasks, weights in kinds:
            (lesson,) = method.lessons(pair.student, None, replace(pair.dense, taught=world.texts[tasks]))
            same(lesson.loss(rows), oracles.responses(made, rows[:, 0], learned(rows), rows[:, 2, 0].tolist(), weights))


def test_consistency(world: World) -> None:
    pair = world.alike
    for draw in cases():
        weight, count, right = draw.number(0.1, 2), draw.whole(1, 3), [draw.whole(1, 3) for _ in range(3)]
        whole = filled([draw.answer(right=right[row]) for _ in range(2) for row in range(count)])
        one, other = whole[:count], whole[count:]
        (lesson,) = Consistency(consistency=weight).lessons(pair.student, None, pair.dense)
        ids, said, meant = (
            [of[:, 0] for of in (one, other)],
            [learned(of) for of in (one, other)],
            [of[:, 1] == ANSWER for of in (one, other)],
        )
        with torch.no_grad():
            made = [pair.copies[0](of, use_cache=False).logits for of in ids]
        expected = oracles.consistency((made[0], made[1]), (ids[0], ids[1]), (said[0], said[1]), (meant[0], meant[1]), weight)
        same(lesson.loss(torch.cat([one, other], 1)), expected)


def test_in_context(world: World) -> None:
    pair = world.uneven
    for draw in cases():
        weight, rows = draw.number(0.1, 2), filled([draw.answer(right=draw.whole(0, 2)) for _ in range(draw.whole(1, 3))])
        (lesson,) = InContext(language=weight).lessons(pair.student, pair.teacher, pair.dense)
        expected = oracles.in_context(*logits(pair, rows[:, 0]), rows[:, 0], learned(rows), rows[:, 1] > 0, weight)
        same(lesson.loss(rows), expected)


def test_context(world: World) -> None:
    """The teacher is told more, so that the response stands at other places of its sequences."""
    pair = world.uneven
    for draw in cases():
        temperature, texts = draw.number(0.5, 4), [draw.tokens(draw.whole(1, 4)) for _ in range(draw.whole(1, 3))]
        whole = filled([draw.answer(text) for text in (*texts, *texts)])
        ours, theirs = whole[: len(texts)], whole[len(texts) :]
        method = ContextDistillation(temperature=temperature)
        found = method.loss_of(pair.student, pair.teacher, torch.cat([ours, theirs], 1), pair.dense)
        made, told = logits(pair, ours[:, 0])[0], logits(pair, theirs[:, 0])[1]
        same(found, oracles.context(made, told, learned(ours), learned(theirs), temperature))


def test_reflection(world: World) -> None:
    """Some rationales have no others beside them; their cross entropy is learned alone."""
    pair = world.alike
    for case, draw in enumerate(cases()):
        weight, margin, count = draw.number(0.2, 2), draw.number(0.02, 0.5), draw.whole(1, 3)
        members = [filled([draw.answer() for _ in range(count)]) for _ in range(3)]
        width = max(of.shape[2] for of in members)
        rows = torch.cat([torch.nn.functional.pad(of, (0, width - of.shape[2])) for of in members], 1)
        missing = [row for row in range(count) if case % 7 == 6 or (row and draw.whole(0, 2) == 0)]
        rows[missing, 3:] = 0
        ids, ends = [rows[:, at] for at in (0, 3, 6)], []
        with torch.no_grad():
            made = [pair.copies[0](of, use_cache=False, output_hidden_states=True) for of in ids]
        for at, out in zip((1, 4, 7), made, strict=True):
            lengths = (rows[:, at] > 0).sum(1).tolist()
            ends.append([out.hidden_states[-1][row, lengths[row] - 1] for row in range(count) if row not in missing])
        expected = oracles.responses(made[0].logits, ids[0], learned(rows[:, :3]))
        if ends[0]:
            expected = expected + weight * oracles.triplets(ends[0], ends[1], ends[2], margin)
        same(Reflection(contrast=weight, margin=margin).loss_of(pair.student, rows, pair.dense), expected)


def hint_with(piece: str, other: str) -> Callable[..., Any]:
    """The lessons of FitNets with one piece in another form, and their `super()` with its arguments."""
    whole = textwrap.dedent(inspect.getsource(FitNets.lessons))
    assert whole.count(piece) == 1
    return mutant(FitNets.lessons, whole, whole.replace(piece, other).replace("super()", "super(FitNets, self)"))


def test_another_hint_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [("0.5 * (", "0.5 * ("), ("0.5 * (", "("), (".square().sum(-1)", ".square()"), ("made[guided]", "made[guided - 1]")]
    first, *others = [hint_with(*each) for each in pieces]
    monkeypatch.setattr(FitNets, "lessons", first)
    test_fitnets(world)
    for other in others:
        monkeypatch.setattr(FitNets, "lessons", other)
        with pytest.raises(AssertionError):
            test_fitnets(world)


SWAPPED = ("made.logits[:, :-1], wanted.logits[:, :-1]", "wanted.logits[:, :-1], made.logits[:, :-1]")
SHIFTED = (losses, losses.next_token, "ids[:, 1:]", "ids[:, :-1]")
SHARED = (
    States,
    States.scores,
    "key.repeat_interleave(query.shape[1] // key.shape[1], 1)",
    "key.repeat(1, query.shape[1] // key.shape[1], 1, 1)",
)
MUTANTS: list[tuple[Callable[[World], None], Any, Callable[..., Any], str, str]] = [
    (test_hinton, LogitDistillation, LogitDistillation.loss_of, "alpha * tau**2 * self", "alpha * self"),
    (test_hinton, LogitDistillation, LogitDistillation.loss_of, "made[:, :-1], wanted[:, :-1]", "wanted[:, :-1], made[:, :-1]"),
    (test_hinton, *SHIFTED),
    (test_distilbert, DistilBERT, DistilBERT.lessons, "tau**2 * divergence", "divergence"),
    (test_distilbert, DistilBERT, DistilBERT.lessons, "temperature=tau)", "temperature=1.0)"),
    (test_distilbert, DistilBERT, DistilBERT.lessons, *SWAPPED),
    (test_distilbert, DistilBERT, DistilBERT.lessons, "made.hidden_states[-1]", "made.hidden_states[-2]"),
    (test_distilbert, *SHIFTED),
    (test_tinybert_layers, tinybert, tinybert.layer_loss, "math.ceil(", "math.floor("),
    (test_tinybert_layers, tinybert, tinybert.layer_loss, "scores[0][..., seen], scores[1][..., seen]", "scores[0], scores[1]"),
    (test_tinybert_layers, tinybert, tinybert.layer_loss, 'turned(first, "embedding_match")', 'turned(first, "hidden_match")'),
    (test_tinybert_layers, tinybert, tinybert.squared, ".mean()", ".sum()"),
    (test_tinybert_layers, States, States.scores, " / query.shape[3] ** 0.5", ""),
    (test_tinybert_layers, *SHARED),
    (test_tinybert_predictions, training, training.objective, "logits / temperature, wanted / temperature", "wanted, logits"),
    (
        test_tinybert_predictions,
        losses,
        losses.soft_cross_entropy,
        "teacher.flatten(0, -2).float().softmax(-1)",
        "teacher.flatten(0, -2).float().argmax(-1)",
    ),
    (test_soft_labels, training, training.objective, "temperature**2 * soft", "soft"),
    (test_soft_labels, training, training.objective, "wanted / temperature", "wanted"),
    (test_homodistil, HomoDistil, HomoDistil.loss_of, "self.prediction_weight * divergence", "divergence"),
    (test_homodistil, HomoDistil, HomoDistil.loss_of, ", weight=self.layer_weight", ""),
    (test_homodistil, HomoDistil, HomoDistil.loss_of, *SWAPPED),
    (test_fitnets, hints, hints.hidden_states, "return made, teacher", "return made[1:], teacher"),
    (test_fsp, FSP, FSP.flows, " / first.shape[1]", ""),
    (test_fsp, FSP, FSP.flows, "first.transpose(1, 2) @ second", "first.transpose(1, 2) @ first"),
    (test_fsp, FSP, FSP.lessons, ".sum((1, 2))", ".mean((1, 2))"),
    (test_fsp, *SHIFTED),
    (test_minilm, minilm, minilm.apart, "(p.exp() * (p - q)", "(q.exp() * (q - p)"),
    (test_minilm, minilm, minilm.apart, ".sum(-1).mean()", ".mean()"),
    (test_minilm, minilm, minilm.apart, "~visible(student)", "visible(student) & False"),
    (test_minilm, minilm, minilm.related, " / heads.shape[3] ** 0.5", ""),
    (test_minilm, MiniLM, MiniLM.relations, "related(value)", "related(key)"),
    (test_minilm, *SHARED),
    (test_minilm_relations, MiniLM, MiniLM._cut, "heads.transpose(1, 2).flatten(2)", "heads.permute(0, 2, 3, 1).flatten(2)"),
    (test_minilm_relations, MiniLM, MiniLM.relations, "(query, key, value)]", "(query, key, key)]"),
    (test_minilm_relations, minilm, minilm.related, "heads.shape[3] ** 0.5", "heads.shape[2] ** 0.5"),
    (test_ted, ted, ted.filtered, ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
    (test_ted, ted, ted.task_loss, "torch.stack(parts).sum()", "torch.stack(parts).mean()"),
    (test_ted, TED, TED.lessons, "math.ceil(", "math.floor("),
    (test_ted, TED, TED.aligned, "self.layer_weight * apart", "apart"),
    (test_ted, TED, TED.aligned, *SWAPPED),
    (
        test_mutual,
        MutualLearning,
        MutualLearning.lessons,
        "divergence(second[:, :-1], first[:, :-1])",
        "divergence(first[:, :-1], second[:, :-1])",
    ),
    (test_mutual, losses, losses._in_pieces, "teacher.detach()", "teacher"),
    (test_mutual, *SHIFTED),
    (test_dynabert, dynabert, dynabert.apart, "int(index / depth)", "index"),
    (test_dynabert, dynabert, dynabert.apart, "made.logits, wanted.logits", "wanted.logits, made.logits"),
    (test_dynabert, dynabert, dynabert.first, "round(width * units)", "units"),
    (test_dynabert, dynabert, dynabert.kept, "int(index / depth)", "index"),
    (test_dynabert, DynaBERT, DynaBERT.loss_of, "weight * states", "states"),
    (test_gkd, GKD, GKD.lessons, "mask=counts[:, 1:]", "mask=None"),
    (test_gkd, GKD, GKD.lessons, "mask=counts[:, 1:]", "mask=counts[:, :-1]"),
    (test_gkd, GKD, GKD.lessons, "made[:, :-1], wanted[:, :-1]", "wanted[:, :-1], made[:, :-1]"),
    (test_responses, answers, answers.answer_loss, "answers[:, 0, 1:]", "answers[:, 0, :-1]"),
    (test_responses, answers, answers.answer_loss, "losses[counted].mean()", "losses.mean()"),
    (test_responses, answers, answers.answer_loss, "weight * losses[of].mean()", "weight * losses[of].sum() / counted.sum()"),
    (test_responses, answers, answers.targets, ">= RESPONSE", ">= PROMPT"),
    (test_responses, answers, answers.targets, ">= RESPONSE", "== RESPONSE"),
    (test_responses, RationaleTuning, RationaleTuning.weights, '"rationale": 1 - self.label_share', '"rationale": self.label_share'),
    (test_responses, Scott, Scott.weights, '"factual": 1 - self.counterfactual', '"factual": 1.0'),
    (test_responses, Socratic, Socratic.weights, '"questions": 1.0', '"questions": 0.5'),
    (test_consistency, consistency, consistency.symmetric, "p.exp() - q.exp()", "p.exp()"),
    (test_consistency, consistency, consistency.symmetric, ".mean() / 2", ".mean()"),
    (test_consistency, Consistency, Consistency.lessons, "values[:, :-1][mask]", "values[:, 1:][mask]"),
    (test_consistency, Consistency, Consistency.lessons, "self.consistency * apart", "apart"),
    (test_in_context, InContext, InContext.loss_of, "hard / 2", "hard"),
    (test_in_context, InContext, InContext.loss_of, "answers[:, 1, 1:] > 0", "answers[:, 1, 1:] >= 0"),
    (test_in_context, InContext, InContext.loss_of, "made[mask], wanted[mask]", "wanted[mask], made[mask]"),
    (test_context, ContextDistillation, ContextDistillation.loss_of, "self.temperature**2 * divergence", "divergence"),
    (test_context, ContextDistillation, ContextDistillation.loss_of, "made, wanted, temperature", "wanted, made, temperature"),
    (test_context, ContextDistillation, ContextDistillation.loss_of, "[:, :-1][targets(theirs)]", "[:, 1:][targets(theirs)]"),
    (test_reflection, Reflection, Reflection.loss_of, "near, far = ", "far, near = "),
    (test_reflection, Reflection, Reflection.loss_of, "+ self.margin", "- self.margin"),
    (test_reflection, Reflection, Reflection.loss_of, "gaps.clamp(min=0)", "gaps"),
    (test_reflection, rounds, rounds.at_the_end, "places, 0).amax(1)", "places, 0).amax(1) - 1"),
]


NAMES = [f"{test.__name__}: {function.__qualname__}: {other}" for test, _, function, _, other in MUTANTS]


@pytest.mark.parametrize(("test", "place", "function", "piece", "other"), MUTANTS, ids=NAMES)
def test_a_loss_that_is_not_the_papers_is_noticed(
    test: Callable[[World], None],
    place: Any,
    function: Callable[..., Any],
    piece: str,
    other: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, function.__name__, mutant(function, piece, other))
    with pytest.raises(AssertionError):
        test(world)


def test_oracles_know_nothing_of_what_they_judge() -> None:
    tree = ast.parse(Path(oracles.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Name):
            assert node.id not in ("__import__", "eval", "exec")
    assert names == {"__future__", "collections", "math", "torch"}

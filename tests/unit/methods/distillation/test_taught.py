"""Losses of methods that learn from a teacher's text, against slow loops, and what of an example is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.core.learning.answers import ANSWER, PROMPT, RESPONSE, answer_loss, encode
from slimbench.methods.core.learning.teachers import fingerprint
from slimbench.methods.core.training import batch
from slimbench.methods.distillation.taught.consistency import Consistency, ManyRationales, symmetric
from slimbench.methods.distillation.taught.context import ContextDistillation
from slimbench.methods.distillation.taught.examples import shuffled
from slimbench.methods.distillation.taught.in_context import InContext
from slimbench.methods.distillation.taught.instruct import InstructionTuning
from slimbench.methods.distillation.taught.rationale import RationaleTuning
from slimbench.methods.distillation.taught.tasks import Scott, Socratic
from slimbench.util.writing.teaching import TRAIN, Example, chat_ids, write_examples
from tests.support import tiny

EXAMPLES = [
    Example("what is one and one", "two in all", "label", "a", "all"),
    Example("why", "because of this and that", "rationale", "a"),
    Example("how many", "it is four", "label", "b", "four"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("taught")
    found = tiny.save_model(folder / "model", "float32", vocab_size=300)
    tiny.save_tokenizer(folder / "model")
    (folder / "text").mkdir()
    write_examples(EXAMPLES, folder / "text" / TRAIN)
    (folder / "text" / "manifest.json").write_text('{"teacher": "somebody"}')
    return replace(found, taught=folder / "text")


def slow(logits: torch.Tensor, answers: torch.Tensor, row: int) -> list[float]:
    """−log p of each token of a response, in float64."""
    found = []
    for place in range(1, answers.shape[2]):
        if int(answers[row, 1, place]) >= RESPONSE:
            values = logits[row, place - 1].double().tolist()
            top = max(values)
            found.append(top + math.log(sum(math.exp(value - top) for value in values)) - values[int(answers[row, 0, place])])
    return found


def test_of_an_example_the_response_and_its_end_are_learned(dense: DenseModel) -> None:
    tokenizer = dense.tokenizer()
    answers = encode(EXAMPLES, tokenizer, 200, ["label", "rationale"])
    assert answers.shape == (3, 3, max(len(e.prompt) + len(e.response) for e in EXAMPLES) + 3)
    for row, example in zip(answers, EXAMPLES, strict=True):
        prompt = chat_ids(tokenizer, (("user", example.prompt),))
        ids = row[0][row[1] > 0].tolist()
        assert ids[: len(prompt)] == prompt and tokenizer.decode(ids[len(prompt) : -1]) == example.response
        assert ids[-1] == tokenizer.eos_token_id and row[1][row[1] > 0].tolist()[: len(prompt)] == [PROMPT] * len(prompt)
        assert tokenizer.decode(row[0][row[1] == ANSWER]).strip() == example.gold and int(row[1][len(ids) - 1]) == RESPONSE
        assert set(row[2].tolist()) == {("label", "rationale").index(example.task)}
    cut = encode(EXAMPLES, tokenizer, 25, ["label", "rationale"])
    assert cut.shape == (3, 3, 25) and int((cut[0, 1] >= RESPONSE).sum()) == 25 - len(EXAMPLES[0].prompt) - 2
    with pytest.raises(Unsupported, match="no prompt of the 3 examples is shorter than length=4"):
        encode(EXAMPLES, tokenizer, 4, ["label", "rationale"])


def test_of_what_is_given_of_a_response_nothing_is_learned(dense: DenseModel) -> None:
    tokenizer = dense.tokenizer()
    example = Example("why", "4", given="I think so. The answer is", gold="4")
    (row,) = encode([example], tokenizer, 100, [""])
    whole = chat_ids(tokenizer, (("user", "why"),)) + tokenizer("I think so. The answer is 4", add_special_tokens=False)["input_ids"]
    assert row[0, : len(whole)].tolist() == whole and int(row[0, len(whole)]) == tokenizer.eos_token_id
    learned = row[0][row[1] >= RESPONSE].tolist()
    assert learned == [*tokenizer(" 4", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert int((row[1] == ANSWER).sum()) == len(learned) - 1


def test_a_template_of_the_student_stands_around_a_prompt(dense: DenseModel) -> None:
    tokenizer = dense.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
    )
    answers = encode(EXAMPLES[:1], tokenizer, 200, ["label"])
    assert tokenizer.decode(answers[0, 0][answers[0, 1] == PROMPT]) == "[user]what is one and one[go]"


def test_the_loss_of_instructions_is_the_mean_over_the_tokens_of_responses(dense: DenseModel) -> None:
    method = InstructionTuning(length=100)
    answers = method.windows(Calibration.none(), dense)
    model = dense.load()
    loss = method.lessons(model, None, dense)[0].loss(answers)
    logits = model(answers[:, 0]).logits
    each = [value for row in range(3) for value in slow(logits, answers, row)]
    assert float(loss) == pytest.approx(sum(each) / len(each), rel=1e-5)


def weighted(dense: DenseModel, answers: torch.Tensor, weights: dict[int, float]) -> float:
    logits, total = dense.load()(answers[:, 0]).logits, 0.0
    for task, weight in weights.items():
        each = [value for row in range(len(answers)) if int(answers[row, 2, 0]) == task for value in slow(logits, answers, row)]
        total += weight * sum(each) / len(each) if each else 0.0
    return total


def test_label_and_rationale_are_two_means_with_their_shares(dense: DenseModel) -> None:
    """Distilling step-by-step: α · label + (1 − α) · rationale, and a batch without one task has the other alone."""
    method = RationaleTuning(recipe="step-by-step", label_share=0.3, length=100)
    answers = method.windows(Calibration.none(), dense)
    loss = method.lessons(dense.load(), None, dense)[0].loss
    assert float(loss(answers)) == pytest.approx(weighted(dense, answers, {0: 0.3, 1: 0.7}), rel=1e-5)
    assert float(loss(answers[:1])) == pytest.approx(weighted(dense, answers[:1], {0: 0.3}), rel=1e-5)
    plain = RationaleTuning(recipe="fine-tune-cot", length=100)
    assert plain.weights() is None and RationaleTuning().label_share == 0.5


@pytest.mark.parametrize(
    ("method", "tasks", "weights"),
    [(Scott(counterfactual=0.3), ("counterfactual", "factual"), (0.3, 0.7)), (Socratic(), ("answers", "questions"), (1.0, 1.0))],
)
def test_tasks_have_the_weights_of_their_papers(
    method: Any, tasks: tuple[str, str], weights: tuple[float, float], dense: DenseModel, tmp_path: Path
) -> None:
    examples = [replace(example, task=tasks[place % 2]) for place, example in enumerate(EXAMPLES)]
    write_examples(examples, tmp_path / TRAIN)
    given = replace(dense, taught=tmp_path)
    answers = method.windows(Calibration.none(), given)
    loss = method.lessons(dense.load(), None, given)[0].loss(answers)
    assert float(loss) == pytest.approx(weighted(dense, answers, dict(enumerate(weights))), rel=1e-5)
    write_examples([replace(EXAMPLES[0], task="another")], tmp_path / TRAIN)
    with pytest.raises(Unsupported, match="has the task 'another', which"):
        method.windows(Calibration.none(), given)


def test_two_rationales_of_a_question_shall_come_to_one_distribution_of_the_answer(dense: DenseModel, tmp_path: Path) -> None:
    """MCC-KD: ½ (CE_a + CE_b) + β ½ [KL(p_a ‖ p_b) + KL(p_b ‖ p_a)] over the answer's own tokens, in a slow loop."""
    texts = [
        Example("how many", "two and two is 44", "", "a", "44"),
        Example("how many", "four is twice two so 44", "", "a", "44"),
        Example("how many", "because it is 44", "", "a", "44"),
        Example("why", "alone 7", "", "b", "7"),
    ]
    write_examples(texts, tmp_path / TRAIN)
    given, method = replace(dense, taught=tmp_path), Consistency(length=100, consistency=0.3, pairs=2)
    pairs = method.windows(Calibration.none(), given)
    assert pairs.shape[:2] == (2, 6), "of three rationales two pairs at most, and none of the question that has one"
    model = dense.load()
    got = method.lessons(model, None, given)[0].loss(pairs)
    total = 0.0
    responses = []
    apart = []
    for side in (pairs[:, :3], pairs[:, 3:]):
        each = [value for row in range(2) for value in slow(model(side[:, 0]).logits, side, row)]
        responses.append(sum(each) / len(each))
    for pair in pairs:
        shares = []
        for side in (pair[:3], pair[3:]):
            places = [place - 1 for place in range(pair.shape[1]) if int(side[1, place]) == ANSWER]
            assert len(places) == 3, "the white space before an answer is of it"
            shares.append(model(side[None, 0]).logits[0, places].double().log_softmax(-1))
        for p, q in zip(*shares, strict=True):
            apart.append(float((p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()) / 2)
    total = sum(responses) / 2 + 0.3 * sum(apart) / len(apart)
    assert float(got) == pytest.approx(total, rel=1e-5)
    write_examples(texts[-1:], tmp_path / TRAIN)
    with pytest.raises(Unsupported, match="left no two rationales of any question"):
        method.windows(Calibration.none(), given)
    one, other = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    symmetric(one, other).backward()
    assert one.grad is not None and other.grad is not None and bool(one.grad.abs().sum() > 0) and bool(other.grad.abs().sum() > 0)
    assert ManyRationales().recipe == "scotd"


def test_in_context_distillation_has_hard_soft_and_language_terms(dense: DenseModel, tmp_path: Path) -> None:
    method = InContext(length=100, language=0.4)
    other = tiny.save_model(tmp_path / "teacher", "float32", seed=5, vocab_size=300)
    student, teacher = dense.load(), other.load()
    answers = method.windows(Calibration.none(), dense)
    got = float(method.loss_of(student, teacher, dense)(answers))
    made, wanted = (model(answers[:, 0]).logits.double() for model in (student, teacher))
    hard: list[float] = []
    soft: list[float] = []
    whole: list[float] = []
    for row in range(len(answers)):
        hard += slow(made.float(), answers, row)
        for place in range(1, answers.shape[2]):
            if (kind := int(answers[row, 1, place])) == 0:
                continue
            q, p = wanted[row, place - 1].softmax(-1), made[row, place - 1].log_softmax(-1)
            whole.append(-float((q * p).sum()))
            soft += [whole[-1]] if kind >= RESPONSE else []
    expected = (sum(hard) / len(hard) + sum(soft) / len(soft)) / 2 + 0.4 * sum(whole) / len(whole)
    assert got == pytest.approx(expected, rel=1e-5) and len(whole) > len(soft) > 0
    assert method.has_teacher and not RationaleTuning().has_teacher


def test_what_is_told_is_learned_without_being_told(dense: DenseModel, tmp_path: Path) -> None:
    """τ² KL(p(· | definition, text) ‖ q(· | text)) over the tokens of the response, which stand at other places behind the definition."""
    texts = [
        Example("a wendle peels eggs. go on: the wendle", "cuts well", "told", "a"),
        Example("go on: the wendle", "cuts well", "untold", "a"),
        Example("go on: the wendle", "is lost", "untold", "a"),
        Example("a tram runs. go on: it", "goes", "told", "b"),
        Example("go on: it", "goes", "untold", "b"),
    ]
    write_examples(texts, tmp_path / TRAIN)
    given, method = replace(dense, taught=tmp_path), ContextDistillation(length=100, temperature=1.5)
    pairs = method.windows(Calibration.none(), given)
    assert pairs.shape[:2] == (2, 6), "what was not told is not learned"
    student, before = tiny.save_model(tmp_path / "student", "float32", seed=9, vocab_size=300).load(), dense.load()
    total = []
    for pair in pairs:
        shares = []
        for model, side in ((student, pair[:3]), (before, pair[3:])):
            places = [place - 1 for place in range(pair.shape[1]) if int(side[1, place]) >= RESPONSE]
            shares.append(model(side[None, 0]).logits[0, places].double().div(1.5).log_softmax(-1))
        total += [float((p.exp() * (p - q)).sum()) for q, p in zip(*shares, strict=True)]
    assert float(method.loss_of(student, before, pairs, given)) == pytest.approx(1.5**2 * sum(total) / len(total), rel=1e-5)
    (tmp_path / "manifest.json").write_text('{"teacher": "somebody"}')
    (tmp_path / "out").mkdir()
    short = ContextDistillation(length=100, steps=2, batch_size=1, learning_rate=1e-2)
    training = short.compress(given, Calibration.none(), tmp_path / "out").details["training"]
    assert training["teacher_sha256"] == fingerprint(dict(dense.load().named_parameters())), "the model as it was, not the one that learns"
    write_examples(texts[:1], tmp_path / TRAIN)
    with pytest.raises(Unsupported, match="left no response with and without"):
        method.windows(Calibration.none(), given)


def test_shuffled_answers_are_those_of_others_of_the_task(dense: DenseModel) -> None:
    examples = [Example(f"p{n}", f"r{n}", "ab"[n % 2], str(n), f"g{n}") for n in range(9)] + [Example("alone", "its own", "c")]
    found = shuffled(examples, 0)
    assert [example.prompt for example in found] == [example.prompt for example in examples]
    assert sorted(example.response for example in found) == sorted(example.response for example in examples)
    for one, other in zip(found[:9], examples[:9], strict=True):
        assert one.response != other.response and one.gold[1:] == one.response[1:] and one.task == other.task
        assert int(one.response[1:]) % 2 == int(other.response[1:]) % 2
    assert found[9] == examples[9] and shuffled(examples, 1) != found == shuffled(examples, 0)
    own, other = (InstructionTuning(length=100, answers=answers).windows(Calibration.none(), dense) for answers in ("own", "shuffled"))  # type: ignore[arg-type]
    assert not torch.equal(own, other)


def test_tokens_are_counted_without_what_fills_them_up_and_the_teacher_is_told(dense: DenseModel, tmp_path: Path) -> None:
    method = InstructionTuning(steps=3, batch_size=2, length=100, learning_rate=1e-3)
    answers = method.windows(Calibration.none(), dense)
    out = tmp_path / "out"
    out.mkdir()
    claim = method.compress(dense, Calibration.none(), out)
    assert claim.training_tokens == sum(int((batch(answers, method, step)[:, 1] > 0).sum()) for step in range(3))
    assert claim.teacher == "somebody" and claim.format == "huggingface"
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    assert "tokenizer" not in " ".join(file.name for file in out.iterdir())


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        (InContext(), "the model that the pipeline began with"),
        (ContextDistillation(), "somebody; distributions of the model as it was before this step"),
        (InstructionTuning(), "somebody"),
    ],
)
def test_a_claim_names_who_was_asked_and_who_gave_distributions(method: Any, teacher: str, dense: DenseModel, tmp_path: Path) -> None:
    assert method.taught_by(dense) == teacher
    for requests, named in ((3, "somebody"), (0, None)):
        stages = [{"kind": "demonstrate", "requests": 0}, {"kind": "ask", "requests": requests}]
        (tmp_path / "manifest.json").write_text(json.dumps({"teacher": "somebody", "stages": stages}))
        assert InstructionTuning().taught_by(replace(dense, taught=tmp_path)) == named


def test_masks_keep_what_is_beyond_an_answer_out_of_the_loss(dense: DenseModel) -> None:
    answers = encode(EXAMPLES[:2], dense.tokenizer(), 100, ["label", "rationale"])
    logits = dense.load()(answers[:, 0]).logits.detach()
    first = float(answer_loss(logits, answers))
    beyond = answers[:, 1] == 0
    assert bool(beyond.any())
    changed = logits.clone()
    changed[:, :-1][beyond[:, 1:]] += 50 * torch.randn(300)
    assert float(answer_loss(changed, answers)) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RationaleTuning(recipe="pad"), "recipe must be one of step-by-step"),
        (lambda: RationaleTuning(label_share=1.0), "label_share must be between 0 and 1"),
        (lambda: Scott(counterfactual=0.0), "counterfactual must be between 0 and 1"),
        (lambda: Consistency(consistency=-1.0), "consistency must be positive"),
        (lambda: Consistency(pairs=0), "pairs must be at least 1"),
        (lambda: ContextDistillation(temperature=0.0), "temperature must be positive"),
        (lambda: InContext(language=-0.1), "language must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

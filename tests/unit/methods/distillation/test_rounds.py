"""Methods in rounds: what the student cannot do yet decides on what the teacher is asked next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.core.learning.answers import RESPONSE, answer_loss, encode
from slimbench.methods.core.learning.rollouts import answered
from slimbench.methods.distillation.taught import rounds
from slimbench.methods.distillation.taught.rounds import Lion, Reflection, is_instruction, two_marks, unlike
from slimbench.tasks.teaching.journal import Remembering
from slimbench.util.writing.teaching import HELD_OUT, TRAIN, Completion, Example, chat_ids, write_examples
from tests.support import tiny
from tests.support.taught import Scripted

QUESTIONS = [
    Example("how many legs", "two pairs. The answer is 4", "", "a", "4"),
    Example("how many legs", "one and three. The answer is 4", "", "a", "4"),
    Example("how many eyes", "one a side. The answer is 2", "", "b", "2"),
    Example("how many noses", "just the one. The answer is 1", "", "c", "1"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("rounds")
    found = tiny.save_model(folder / "model", "float32", vocab_size=300)
    tiny.save_tokenizer(folder / "model")
    (folder / "text").mkdir()
    write_examples(QUESTIONS, folder / "text" / TRAIN)
    write_examples([Example("w9a w9b w9c", "held out")], folder / "text" / HELD_OUT)
    (folder / "text" / "manifest.json").write_text('{"teacher": "somebody"}')
    return replace(found, taught=folder / "text")


def taught(dense: DenseModel, answer: Callable[[str], Any]) -> tuple[DenseModel, Scripted]:
    teacher = Scripted(answer)
    return replace(dense, teacher=teacher), teacher


def test_what_a_model_answers_is_what_it_would_write_of_each_prompt_alone(dense: DenseModel) -> None:
    model, tokenizer = dense.load(), dense.tokenizer()
    prompts = ["a", "a longer prompt than the first", "why"]
    for prompt, text in zip(prompts, answered(model, tokenizer, prompts, 6, batch=2), strict=True):
        ids = chat_ids(tokenizer, (("user", prompt),))
        made: list[int] = []
        for _ in range(6):
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        made = made[: made.index(2)] if 2 in made else made  # the model's own end
        assert text == tokenizer.decode(made, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("8 3", (8, 3)),
        ("8.5 and 7", (8.5, 7)),
        ("The marks are 10, 1.", (10, 1)),
        ("8/10, 7/10", (8, 7)),
        ("1. 8\n2. 6", (8, 6)),
        ("eight and three", None),
        ("8", None),
        ("0 5", None),
        ("11 5", None),
        ("", None),
    ],
)
def test_marks_are_two_numbers_from_1_to_10(text: str, marks: tuple[float, float] | None) -> None:
    assert two_marks(text) == marks


def test_a_student_is_behind_by_the_mean_of_both_orders_and_no_mark_is_no_zero(dense: DenseModel) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        first = prompt.split("First answer: ")[1].split("\n")[0]
        if "eyes" in prompt:
            return "I cannot judge" if first == "student" else "6 5"
        return "9 5" if first.startswith("two pairs") else "4 9" if first == "student" and "legs" in prompt else "no"

    given, _ = taught(dense, answer)
    sat = [(example, "student") for example in QUESTIONS if "one and three" not in example.response]
    assert Lion().marks(sat, given) == [(4 + 5) / 2, 1, None]
    assert len(asked) == 6 and all("how many" in prompt and "Instruction: " in prompt for prompt in asked)


def test_as_many_new_hard_as_easy_instructions_come_unlike_all_others_and_answered(dense: DenseModel) -> None:
    made = iter(range(100))

    def answer(prompt: str) -> Any:
        if "marks alone" in prompt:
            ours = prompt.index("The answer is") < prompt.index("Second answer")
            hard = "legs" in prompt
            return ("9 2" if ours else "2 9") if hard else "5 5"
        if prompt.startswith("Write one new instruction"):
            number = next(made)
            return "how many legs" if number == 0 else f"w{number}a w{number}b w{number}c w{number}d"
        return f"answer to {prompt}" if "w1a" in prompt or "w2a" in prompt else Completion("cut", "length")

    given, teacher = taught(dense, answer)
    new = Lion(examined=3, answer_tokens=8).harder(dense.load(), QUESTIONS, given, 1)
    writing = [request.chat[-1][1] for request in teacher.asked if request.chat[-1][1].startswith("Write one")]
    assert len(writing) == 2, "one is hard and two are easy: one of each"
    assert writing[0].startswith(rounds.AFTER_HARD[:100]) and "legs" in writing[0] and "same kind of task" in writing[0]
    assert writing[1].startswith(rounds.AFTER_EASY[:100]) and "legs" not in writing[1] and "rarer" in writing[1]
    assert new == [], "what came after the hard one is like an old one, and there are as many after easy ones"
    made = iter(range(1, 10))
    new = Lion(examined=3, answer_tokens=8).harder(dense.load(), QUESTIONS, given, 1)
    assert new == [Example(text, f"answer to {text}", item="round 1") for text in ("w1a w1b w1c w1d", "w2a w2b w2c w2d")]
    made = iter(range(2, 10))
    assert Lion(examined=3, answer_tokens=8).harder(dense.load(), QUESTIONS, given, 1) == [], "one of the two has no answer"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Name the largest lake", True),
        ("7 days have what names", True),
        ("Name a lake", False),
        ("", False),
        ("- name the largest lake", False),
        ("Über name the largest lake", False),
        ("Write the Instruction for a kite", False),
    ],
)
def test_what_may_be_an_instruction(text: str, is_one: bool) -> None:
    assert is_instruction(text) is is_one


def test_rouge_l_decides_on_what_is_new() -> None:
    known = ["name the largest lake of the country"]
    texts = ["name the largest town of the country", "tell me of a lake", "tell me of a lake now", ""]
    assert list(unlike(texts, known, 0.7)) == ["tell me of a lake"]
    assert list(unlike(texts, known, 0.95)) == texts[:3]


def test_each_round_learns_what_the_last_one_brought(dense: DenseModel, tmp_path: Path) -> None:
    def answer(prompt: str) -> str:
        return "9 2" if "marks alone" in prompt else f"new {len(prompt)} thing here q{len(prompt)}"

    given, _ = taught(dense, answer)
    method = Lion(steps=6, rounds=3, batch_size=2, length=100, examined=2, answer_tokens=8)
    lessons = method.lessons(dense.load(), None, given)
    assert [round(lesson.share, 3) for lesson in lessons] == [0.333] * 3 and all(lesson.windows for lesson in lessons)
    texts = [lesson.windows() for lesson in lessons if lesson.windows]
    assert len(texts[0]) == len(QUESTIONS) and not torch.equal(texts[1], texts[0])
    (tmp_path / "out").mkdir()
    claim = method.compress(given, Calibration.none(), tmp_path / "out")
    assert claim.details["training"]["lesson_steps"] == [2, 2, 2] and claim.teacher == "somebody"


def test_a_round_that_is_done_again_asks_nobody(dense: DenseModel, tmp_path: Path) -> None:
    teacher = Scripted(lambda prompt: "9 2" if "marks alone" in prompt else f"new {len(prompt)} thing here q{len(prompt)}")
    method = Lion(steps=4, rounds=2, batch_size=2, length=100, examined=2, answer_tokens=8)
    counts = []
    for turn in range(2):
        given = replace(dense, teacher=Remembering(lambda: teacher, "scripted", tmp_path / "asked" / "journal.jsonl"))
        (tmp_path / f"out{turn}").mkdir()
        method.compress(given, Calibration.none(), tmp_path / f"out{turn}")
        counts.append(len(teacher.asked))
    assert counts[0] == counts[1] > 4


def test_what_the_student_gets_wrong_is_explained_and_kept_as_wrong(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"how many legs": ["it is 4"], "how many eyes": ["two, so 2", "I say 5", "I say 7"], "how many noses": ["perhaps 3", ""]}
    turn = {prompt: cycle(texts) for prompt, texts in said.items()}

    def answered(model: Any, tokenizer: Any, prompts: list[str], *_: Any, drawn: bool) -> list[str]:
        assert drawn and len(prompts) == 9, "three drawn answers to each"
        return [next(turn[prompt]) for prompt in prompts]

    monkeypatch.setattr("slimbench.methods.core.learning.rollouts.answered", answered)

    def answer(prompt: str) -> str:
        assert "The student wrote:" in prompt and ("I say 5" in prompt or "perhaps 3" in prompt)
        return "See: one a side. The answer is 2." if "eyes" in prompt else "It is clear."

    given, teacher = taught(dense, answer)
    wrong: dict[str, list[str]] = {"how many eyes": ["a", "b", "c", "d"]}
    new = Reflection(samples=3).corrected(dense.load(), QUESTIONS, wrong, given, 1)
    assert len(teacher.asked) == 2 and new == [replace(QUESTIONS[2], response="See: one a side. The answer is 2")]
    assert wrong == {"how many eyes": ["c", "d", "I say 5", "I say 7"], "how many noses": ["perhaps 3", "perhaps 3"]}


def test_an_exam_is_drawn_by_a_seed_of_its_own_and_comes_before_the_first_round(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = dense.load(), Reflection(samples=2, examined=2, answer_tokens=8, rounds=2, steps=4, length=120, seed=3)
    state = torch.get_rng_state()
    first, again, later = (method.examination(model, QUESTIONS, dense, turn, 2) for turn in (0, 0, 1))
    assert first == again != later and len(first) == 4 and torch.equal(state, torch.get_rng_state())
    assert [example for example, _ in first[::2]] == [example for example, _ in first[1::2]] and first[0][1] != first[1][1]
    model.generation_config.update(temperature=0.01, repetition_penalty=9.0)
    assert method.examination(model, QUESTIONS, dense, 0, 2) == first, "a model's own settings decide on nothing"
    turns: list[int] = []
    monkeypatch.setattr(Reflection, "corrected", lambda self, student, right, wrong, given, turn: turns.append(turn) or [])
    for lesson in method.lessons(model, None, dense):
        assert lesson.windows is not None
        lesson.windows()
    assert turns == [0, 1]


def test_a_right_rationale_shall_be_nearer_to_another_than_to_a_wrong_one(dense: DenseModel) -> None:
    method = Reflection(length=120, contrast=0.4, margin=0.3)
    wrong = {"how many legs": ["I think it is 5"], "how many eyes": ["three"]}
    triplets = method.triplets(QUESTIONS, wrong, dense)
    assert triplets.shape[:2] == (4, 9)
    whole = [bool((row[4] > 0).any() and (row[7] > 0).any()) for row in triplets]
    assert whole == [True, True, False, False], "eyes have one right rationale alone, noses no wrong one"
    model = dense.load()
    got = float(method.loss_of(model, triplets, dense))

    def place(answers: torch.Tensor) -> torch.Tensor:
        states = model(answers[None, 0], output_hidden_states=True).hidden_states[-1][0].double()
        return states[max(place for place in range(answers.shape[1]) if int(answers[1, place]) >= RESPONSE)]

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / one.norm() / other.norm())

    gaps = []
    for row in triplets[:2]:
        anchor, near, far = (place(row[at : at + 3]) for at in (0, 3, 6))
        gaps.append(max(0.0, cosine(anchor, far) - cosine(anchor, near) + 0.3))
    learned = float(answer_loss(model(triplets[:, 0]).logits, triplets[:, :3]))
    assert got == pytest.approx(learned + 0.4 * sum(gaps) / 2, rel=1e-4) and sum(gaps) > 0
    plain = method.triplets(QUESTIONS, {}, dense)
    assert float(method.loss_of(model, plain, dense)) == pytest.approx(learned, rel=1e-5)
    assert torch.equal(
        plain[0, :3, : encode(QUESTIONS[:1], dense.tokenizer(), 120, [""]).shape[2]].gt(0).any(1), torch.tensor([True, True, False])
    )


def test_an_exam_needs_right_answers(dense: DenseModel, tmp_path: Path) -> None:
    write_examples([replace(QUESTIONS[0], gold="")], tmp_path / TRAIN)
    with pytest.raises(Unsupported, match="without a right answer"):
        Reflection().lessons(dense.load(), None, replace(dense, taught=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": 9, "steps": 8}, "rounds must not exceed the steps 8"),
        ({"examined": 0}, "examined must be at least 1"),
        ({"contrast": 0.0}, "contrast must be positive"),
        ({"negatives": 0}, "negatives must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reflection(**settings)

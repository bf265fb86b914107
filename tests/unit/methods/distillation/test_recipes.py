"""What each paper's recipe asks of a teacher, what it keeps, and what a student is given to learn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.sections.teaching import recipe
from slimbench.methods.distillation.taught.consistency import Consistency, ManyRationales
from slimbench.methods.distillation.taught.context import ContextDistillation
from slimbench.methods.distillation.taught.in_context import InContext
from slimbench.methods.distillation.taught.instruct import InstructionTuning
from slimbench.methods.distillation.taught.rationale import RationaleTuning
from slimbench.methods.distillation.taught.rounds import Lion, Reflection
from slimbench.methods.distillation.taught.tasks import KnowledgeAugmented, ProgramTuning, Scott, Socratic, Symbolic
from slimbench.tasks.teaching import starts
from slimbench.util.writing.teaching import Completion, TeacherError
from tests.support.taught import Scripted, written

METHODS = (
    Consistency,
    ContextDistillation,
    InContext,
    InstructionTuning,
    KnowledgeAugmented,
    Lion,
    ManyRationales,
    ProgramTuning,
    RationaleTuning,
    Reflection,
    Scott,
    Socratic,
    Symbolic,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))


def words() -> Iterator[str]:
    """Texts that have next to no words in common."""
    number = 0
    while True:
        number += 1
        yield " ".join(f"{letter}{number}word" for letter in "abcdef")


def gold(name: str, count: int = 12) -> dict[str, str]:
    """The right answer of each question that a recipe begins with."""
    return {row["question"]: row["gold"] for row in starts.rows(recipe(name).start, count, 0)}


def answer_of(golds: dict[str, str], prompt: str) -> str:
    """The right answer of the question that stands in a prompt last."""
    return max(((prompt.rfind(question), answer) for question, answer in golds.items()), default=(-1, ""))[1]


def test_recipes_of_methods_are_those_that_there_are() -> None:
    for method in METHODS:
        for name in method.citations:
            assert recipe(name).name == name


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_answers_is_not_cut_into_pieces_of_other_means(method: Any) -> None:
    with pytest.raises(ValueError, match="accumulate must be 1, not 2: answers are of unequal lengths"):
        method(accumulate=2, batch_size=4)


def test_alpaca_grows_tasks_with_inputs_and_outputs_after_three() -> None:
    text = words()

    def answer(prompt: str) -> Completion:
        fresh = [next(text) for _ in range(3)]
        said = (
            f" Sort {fresh[0]}\n4. Input:\n<none>\n4. Output:\nsorted\n###\n5. Instruction: Draw {fresh[1]}\n5. Input:\nx\n5. Output:\ny\n"
        )
        said += f"###\n6. Instruction: Sort {fresh[0]}\n6. Input:\nx\n6. Output:\ny\n"
        said += f"###\n7. Instruction: Name {fresh[2]}\n7. Input:\nz\n7. Output:\nhal"
        return Completion(said, "length")

    examples, asked, made = written("alpaca", answer, 8)
    stage = recipe("alpaca").stages[0]
    assert (stage.own, stage.grown, stage.keep["instruction"].unlike, stage.keep["instruction"].words) == (3, 0, 0.7, (4, 150))  # type: ignore[union-attr]
    assert stage.draw.temperature == 1.0 and "20 different tasks" in stage.prompt  # type: ignore[union-attr]
    assert all(request.chat[-1][1].count(". Instruction:") == 4 for request in asked), "three are shown, and the fourth is begun"
    assert made.rejected == dict.fromkeys(["instruction: has what it must not", "instruction: like an earlier one", "cut at its limit"], 8)
    assert len(examples) + made.dropped == 8 and all(
        example.response == "sorted" and "<none>" not in example.prompt for example in examples
    )


def test_self_instruct_shows_eight_of_which_two_were_made_and_labels_of_classifications_come_first() -> None:
    text = words()

    def answer(prompt: str) -> str:
        if prompt.startswith("Go on with the list"):
            return f" Tell of {next(text)}\nTask 10: Judge {next(text)}\nTask 11: Show an image of {next(text)}"
        if "Can the task below" in prompt:
            return " Yes, it can." if "Task: Judge" in prompt else "no"
        fresh = next(text)
        if "First give a label" in prompt:
            return f" good {fresh[:9]}\nInput: {fresh}\nLabel: good {fresh[:9]}\nInput: {fresh}"
        return f" none\nOutput: {fresh}"

    examples, asked, made = written("self-instruct", answer, 20)
    stage = recipe("self-instruct").stages[0]
    draw = stage.draw  # type: ignore[union-attr]
    assert (draw.temperature, draw.top_p, draw.presence_penalty) == (0.7, 0.5, 2.0)
    assert (stage.own, stage.grown, stage.keep["instruction"].unlike) == (6, 2, 0.7)  # type: ignore[union-attr]
    lists = [request.chat[-1][1] for request in asked if request.chat[-1][1].startswith("Go on")]
    assert all(len(re.findall(r"^Task \d+: \S", shown, re.MULTILINE)) == 8 for shown in lists)
    assert not re.search(r"\dword", lists[0]) and sum(bool(re.search(r"\dword", line)) for line in lists[-1].splitlines()) == 2
    kinds = Counter(request.chat[-1][1].split()[0] for request in asked)
    assert kinds["First"] == 10 and kinds["Give"] == 10 and kinds["Can"] == 20
    assert made.rejected["instruction: has what it must not"] > 5
    judged = [example for example in examples if example.prompt.startswith("Judge")]
    assert judged and all(example.response.startswith("good") and example.response not in example.prompt for example in judged)
    assert len(set(judged)) == len(judged) and made.rejected["alike, too few or too many of an item"] == 10, (
        "an instance that comes twice is one"
    )


def test_lamini_grows_instructions_alone_and_answers_each() -> None:
    text = words()

    def answer(prompt: str) -> str:
        if prompt.startswith("Here are"):
            return "\n".join(f"{number}. Tell of {next(text)}" for number in range(4, 9))
        return "as an AI I cannot" if prompt.endswith("7word") else f"answer to {prompt}"

    examples, asked, made = written("lamini", answer, 10)
    grown = [request for request in asked if request.chat[-1][1].startswith("Here are")]
    assert len(asked) == len(grown) + 10 and grown[0].sampling.temperature == 1.0
    assert all(example.response == f"answer to {example.prompt}" for example in examples)
    assert made.rejected["response: has what it must not"] >= 1


def test_vicuna_has_two_turns_of_which_the_second_stands_behind_the_first() -> None:
    text = words()
    examples, asked, made = written("vicuna", lambda prompt: next(text), 6)
    assert len(asked) == 24 and made.kept == 6
    first, second = examples[0], examples[1]
    assert first.item == second.item and f"You said: {first.response}" in second.prompt and first.prompt in second.prompt


def test_gpt4all_drops_answers_that_decline() -> None:
    said = ["As an AI language model I have no view", "I'm sorry, but no", "It is a fine number"]
    turn = iter(range(1000))
    examples, _asked, made = written("gpt4all", lambda prompt: f"{said[next(turn) % 3]} {turn}", 12)
    assert made.rejected["response: has what it must not"] == 8 and all("fine" in example.response for example in examples)


def test_llama_gpt4_answers_tasks_with_inputs_anew() -> None:
    text = words()

    def answer(prompt: str) -> str:
        return f"Task 4: Sort {next(text)}\nInput 4: b, a" if "Write task" in prompt else "a, b"

    examples, asked, _ = written("llama-gpt4", answer, 6)
    system = [request for request in asked if request.chat[0][0] == "system"]
    assert len(system) == 6 and all(request.chat[-1][1].endswith("b, a") and request.sampling.temperature == 0 for request in system)
    assert all(example.prompt.endswith("\n\nb, a") and example.response == "a, b" for example in examples)


def test_universalner_asks_once_for_each_kind_and_for_one_that_is_not_there() -> None:
    turn = iter(range(1000))

    def answer(prompt: str) -> str:
        letter = "abcdefghijkl"[next(turn)]
        return f"1. Canberra - city{letter}\n**Sydney** - City{letter}\n- Ann Lee: person{letter}\nno list here"

    examples, _, made = written("universalner", answer, 6)
    assert made.stages[0]["kept"] == 18 and made.kept == 12 and len(examples) == 24
    there, absent = ([e for e in examples if (e.response == "[]") is missing] for missing in (False, True))
    assert len(there) == len(absent) == 12 and {e.gold for e in absent} == {"[]"}
    assert {e.response for e in there} == {'["Canberra", "Sydney"]', '["Ann Lee"]'}
    own = {item: {e.prompt for e in there if e.item == item} for item in {e.item for e in there}}
    assert not [e for e in absent if e.prompt in own[e.item]], "a kind that the passage has is not said to be absent"


def test_seqkd_learns_what_a_teacher_writes_behind_a_passage() -> None:
    text = words()
    examples, asked, _ = written("seqkd", lambda prompt: f"{next(text)} {next(text)}", 6)
    assert all((request.sampling.temperature, request.sampling.beams) == (0, 5) for request in asked)
    assert examples[0].prompt == asked[0].chat[-1][1]
    assert recipe("seqkd").beyond_servers == "searches with beams"


def test_step_by_step_has_a_label_and_a_rationale_for_each_question() -> None:
    examples, asked, made = written("step-by-step", lambda prompt: " One thinks a while.", 12)
    golds = gold("step-by-step")
    assert made.kept == 12 == len(asked) and len(examples) == 24
    labels = [example for example in examples if example.task == "label"]
    assert all(example.prompt.startswith("[label] ") and example.response == golds[example.prompt[8:]] for example in labels)
    rationales = [example for example in examples if example.task == "rationale"]
    assert all(e.prompt.startswith("[rationale] ") and e.response == "One thinks a while." for e in rationales) and len(labels) == 12


def test_mt_cot_explains_the_right_answer_where_the_teacher_was_wrong() -> None:
    golds = gold("mt-cot")

    def answer(prompt: str) -> str:
        if "The answer is" in prompt:
            return "it has to be so"
        right = answer_of(golds, prompt) if len(prompt) % 2 else "wrong"
        return f"Because: I think so\nAnswer: {right}"

    examples, asked, made = written("mt-cot", answer)
    again = [request for request in asked if "The answer is" in request.chat[-1][1]]
    assert 0 < len(again) < 12 and made.kept == 12
    rationales = [example.response for example in examples if example.task == "rationale"]
    assert sum("it has to be so" in text for text in rationales) == len(again)
    assert all(re.fullmatch(r"(I think so|it has to be so) The answer is .+", text) for text in rationales)
    assert RationaleTuning(recipe="mt-cot").weights() == {"label": 0.5, "rationale": 0.5}


def test_magister_shows_the_answer_and_keeps_what_comes_to_it() -> None:
    golds, turn = gold("magister"), iter(range(100))

    def answer(prompt: str) -> str:
        right = answer_of(golds, prompt)
        assert f"Solution: {right}\n" in prompt
        return f"One and one. The answer is {right if next(turn) % 3 else 'nothing'}."

    examples, _, made = written("magister", answer)
    assert made.kept == 8 and made.rejected == {"answer: not gold": 4}
    assert all(example.response == f"One and one. The answer is {example.gold}" for example in examples)


def test_fine_tune_cot_draws_eight_and_keeps_the_right_ones_in_its_form() -> None:
    golds, turn = gold("fine-tune-cot", 4), iter(range(1000))

    def answer(prompt: str) -> str:
        if prompt.rstrip().endswith("step by step."):
            return f"thought {next(turn)}"
        return f" {answer_of(golds, prompt)}." if "thought 0" in prompt or next(turn) % 2 else "no idea"

    examples, asked, made = written("fine-tune-cot", answer, 4)
    first = [request for request in asked if request.chat[-1][1].rstrip().endswith("step by step.")]
    assert len(first) == 32 and {request.sampling.temperature for request in first} == {0.7}
    assert len({request.seed for request in first}) == 32
    assert made.kept == len(examples) and 0 < made.rejected["answer: not gold"] < 32
    for example in examples:
        assert example.prompt.endswith(" ###") and re.fullmatch(rf"thought \d+ --> {re.escape(example.gold)}", example.response)


def test_specialize_has_four_forms_of_each_example() -> None:
    golds = gold("specialize")
    examples, _, made = written("specialize", lambda prompt: f"Thus. The answer is {answer_of(golds, prompt)}", 6)
    tasks = Counter(example.task for example in examples)
    assert set(tasks) == {"in-context rationale", "in-context answer", "rationale", "answer"} and len(set(tasks.values())) == 1
    for example in examples:
        alone = example.task in ("rationale", "answer")
        assert (example.prompt.count("The answer is") == 0) if alone or "answer" in example.task else example.prompt.count("Thus.") == 2
        assert example.response.startswith("Thus.") == ("rationale" in example.task)
    assert made.kept == 12, "two of four samples of each question"


def test_relations_are_a_list_with_a_reason() -> None:
    turn = iter(range(100))
    said = [" (Ann, born in, Rome), (Ann, knows, Bob)\nReason: it says so there.", "there are none"]
    examples, _, made = written("relation", lambda prompt: said[next(turn) % 2], 8)
    assert made.kept == 4 and all(e.response.startswith("Relations: (Ann, born in, Rome), (Ann, knows, Bob)\nReason: ") for e in examples)


def test_science_infers_an_answer_from_question_and_rationale() -> None:
    examples, _, _ = written("science", lambda prompt: "One has to know a thing.", 6)
    for rationale, answer in zip(examples[::2], examples[1::2], strict=True):
        assert rationale.task == "rationale" and answer.task == "answer" and answer.response == answer.gold
        assert answer.prompt.endswith(f"Known: {rationale.response}") and rationale.prompt.split(": ", 1)[1] in answer.prompt


def test_dialogue_keeps_what_agrees_and_helps() -> None:
    turn, text = iter(range(1000)), words()

    def answer(prompt: str) -> str:
        if prompt.startswith("Write a short talk"):
            return f"A: {next(text)}\nB: {next(text)}\nA: {next(text)}\nB: I will."
        if "What should B know" in prompt:
            return "Q: what is it? A: a thing. " * 3
        return ["Yes", "No", "yes."][next(turn) % 3]

    examples, _, made = written("dialogue", answer, 9)
    assert made.rejected == {"agrees: none of the choices": 3, "helps: none of the choices": 2} and made.kept == 4
    assert all("I will" not in example.prompt for example in examples)


def test_scotd_keeps_thirty_whatever_they_come_to() -> None:
    turn = iter(range(1000))
    examples, asked, made = written("scotd", lambda prompt: f" Thought number {next(turn)}. So it is wrong.", 2)
    assert len(asked) == 60 == made.kept and {request.sampling.temperature for request in asked} == {0.7}
    assert all(example.response.endswith("So it is wrong") for example in examples)


def test_mcc_kd_keeps_questions_with_several_right_rationales() -> None:
    golds, turn, text = gold("mcc-kd", 3), iter(range(1000)), words()

    def answer(prompt: str) -> str:
        number = next(turn)
        right = answer_of(golds, prompt) if number < 5 or number % 5 == 0 else "nothing"
        return f"{next(text)}. The answer is {right}."

    examples, asked, made = written("mcc-kd", answer, 3)
    assert len(asked) == 15 and made.kept == 4 == len(examples) and len({example.item for example in examples}) == 1
    assert all(example.response.endswith(f"The answer is {example.gold}") for example in examples)


def test_mcc_kd_keeps_one_of_those_that_have_four_words_in_five_in_common() -> None:
    golds, turn = gold("mcc-kd", 3), iter(range(1000))
    said = ("a b c d e f g h i j", "a b c d e f g h x y", "j i h g f e d c b z", "k l m n o p q r s t", "t s r q p o n m l k")
    examples, _, made = written("mcc-kd", lambda prompt: f"{said[next(turn) % 5]} The answer is {answer_of(golds, prompt)}.", 1)
    kept = [example.response.split(" The answer")[0] for example in examples]
    assert kept == [said[1], said[2], said[4]], "the first and third have 9 of 11 words in common, the last two all, others 8 of 12"
    assert made.rejected == {"alike, too few or too many of an item": 2}


def test_scott_draws_from_the_difference_of_right_and_wrong_and_refuses_a_server() -> None:
    examples, asked, _ = written("scott", lambda prompt: f"reason for {prompt[-20:]}", 48)
    rows = starts.rows(recipe("scott").start, 48, 0)
    golds, kinds = ({row["question"]: row[name] for row in rows} for name in ("gold", "task"))
    for request in asked:
        last, against = request.chat[-1][1], request.against or ""
        assert request.weight == 0.5 and last != against and last.split("The answer")[0] == against.split("The answer")[0]
    factual, counterfactual = ([e for e in examples if e.task == task] for task in ("factual", "counterfactual"))
    assert len(factual) > 12
    for one, other in zip(factual, counterfactual, strict=True):
        assert one.response.endswith(f"So the answer is {one.gold}") and other.response == other.gold != one.gold
        assert other.prompt == one.prompt.replace("[factual]", "[counterfactual]")
        assert other.given.startswith("reason for") and other.given.endswith("So the answer is")
        own = one.prompt.removeprefix("[factual] ")
        like = {answer for question, answer in golds.items() if kinds[question] == kinds[own]}
        assert golds[own] == one.gold and other.gold in like, "a wrong answer is that of a question of the kind"
    assert "subtracts" in (recipe("scott").beyond_servers or "") and recipe("socratic").beyond_servers is None


def test_context_has_each_text_with_the_definition_and_without() -> None:
    turn = iter(range(1000))
    examples, asked, _ = written("context", lambda prompt: f"and so it was {next(turn)}", 4)
    assert len(asked) == 20 and len(examples) == 40
    for told, untold in zip(examples[::2], examples[1::2], strict=True):
        assert (told.task, untold.task) == ("told", "untold") and told.response == untold.response
        assert told.prompt.endswith(untold.prompt) and len(told.prompt) > len(untold.prompt) + 20


def test_lion_begins_with_instructions_that_are_answered() -> None:
    text = words()

    def answer(prompt: str) -> str:
        return f" Tell of {next(text)}\nInstruction 6: {next(text).title()}" if "Instruction 5:" in prompt else "it is so"

    examples, asked, _ = written("lion", answer, 6)
    assert all(example.response == "it is so" for example in examples) and asked[0].chat[-1][1].count("Instruction") == 5


def test_reflection_begins_with_two_right_rationales_of_each_question() -> None:
    golds, turn, text = gold("reflection", 4), iter(range(1000)), words()

    def answer(prompt: str) -> str:
        number = next(turn)
        right = answer_of(golds, prompt) if number < 4 or number % 4 == 0 else "nothing"
        return f"{next(text)}. The answer is {right}."

    examples, asked, made = written("reflection", answer, 4)
    assert len(asked) == 16 and made.kept == 3 and len({example.item for example in examples}) == 1
    assert all(example.response.endswith(f"The answer is {example.gold}") for example in examples)


def test_socratic_has_questions_and_their_answers() -> None:
    golds = gold("socratic")

    def answer(prompt: str) -> str:
        right = answer_of(golds, prompt)
        return f"So many. The answer is {right}." if "Answer the questions" in prompt else "1. How many first?\n2. How many then?\n"

    examples, _, made = written("socratic", answer)
    assert made.kept == 12
    for questions, answers in zip(examples[::2], examples[1::2], strict=True):
        assert (questions.task, answers.task) == ("questions", "answers") and questions.response in answers.prompt
        assert answers.response == f"So many. The answer is {answers.gold}"


def test_pad_keeps_programs_that_come_to_the_answer() -> None:
    golds, turn = gold("pad"), iter(range(1000))

    def answer(prompt: str) -> str:
        right = answer_of(golds, prompt)
        at = next(turn)
        foreign = ("import os\n    return os.getpid()", "return open('answers').read()")[at // 4 % 2]
        return [
            f"def solution():\n    return {right}\n",
            "def solution():\n    return -12345\n",
            f"def solution():\n    {foreign}\n",
            "I would rather not",
        ][at % 4]

    examples, asked, made = written("pad", answer, 8)
    assert len(asked) == 32 and {request.sampling.temperature for request in asked} == {0.7}
    assert made.kept == 8 and made.rejected == {
        "not of the form": 8,
        "result: not gold": 8,
        "code": 4,
        "program: Call is not of the language": 4,
    }
    assert all(example.response.startswith("def solution():") for example in examples) and ProgramTuning().recipe == "pad"


def test_persd_learns_to_mend_what_was_wrong_and_to_write_what_was_right() -> None:
    golds, turn = gold("persd"), iter(range(1000))

    def answer(prompt: str) -> str:
        right = answer_of(golds, prompt)
        if "This program is meant" in prompt:
            assert f"where {right} is right" in prompt
            return f"def solution():\n    return 0 + {right}\n"
        return f"def solution():\n    return {right if next(turn) % 2 else -12345}\n"

    examples, asked, made = written("persd", answer, 8)
    assert made.kept == 8 and Counter(example.task for example in examples) == {"write": 4, "mend": 4} and len(asked) == 12
    mended = next(example for example in examples if example.task == "mend")
    assert "This gives -12345. Mend it." in mended.prompt and "return 0 + " in mended.response


def test_kard_finds_passages_by_the_rationale() -> None:
    def answer(prompt: str) -> str:
        assert "The right answer is" in prompt
        return "Firefighters fought bushfires near Sydney all night long."

    examples, _, _ = written("kard", answer, 4)
    assert all("fire" in example.prompt.lower() and example.response.endswith(f"The answer is {example.gold}") for example in examples)
    assert KnowledgeAugmented().recipe == "kard"


def test_questions_stand_behind_others_and_alone_of_one_of_the_two() -> None:
    golds = gold("multitask-ict")

    def nobody(prompt: str) -> str:
        raise AssertionError("the teacher is asked for distributions alone")

    several, asked, _ = written("multitask-ict", nobody)
    assert not asked and Counter(example.task for example in several) == {"shots": 12, "alone": 12}
    for example in several:
        shown = sum(question in example.prompt for question in golds)
        assert shown == (4 if example.task == "shots" else 1) and example.response == example.gold
    assert {example.task for example in written("meta-ict", nobody)[0]} == {"shots"}


@pytest.mark.parametrize("name", ["meta-ict", "multitask-ict", "specialize"])
def test_nothing_that_is_held_out_is_shown_to_a_student(name: str) -> None:
    from slimbench.tasks.teaching import data_set

    golds = gold(name, 40)
    made = written(name, lambda prompt: f"Thus. The answer is {answer_of(golds, prompt)}", 40)[2]
    train, held_out = data_set.examples_of(made)
    asked = {question for question in golds for example in held_out if question in example.prompt.split("\n\n")[-1]}
    assert held_out and asked
    assert not [example for example in train for question in asked if question in example.prompt]


def test_symbolic_keeps_what_its_critic_believes() -> None:
    text, turn = words(), iter(range(1000))

    def answer(prompt: str) -> str:
        if prompt.startswith("Everyday"):
            return "\n".join(f"{number}. X meets {next(text)[:26]}" for number in range(11, 14))
        if "Is that likely?" in prompt:
            return "Yes" if next(turn) % 2 else "No"
        return f" feels {next(text)[:20]}"

    examples, asked, made = written("symbolic", answer, 6)
    tails = [request for request in asked if request.chat[-1][1].rstrip().endswith("Because of this, X")]
    assert len(tails) == 24 and made.kept == 12 == made.rejected["likely: none of the choices"]
    assert all(re.fullmatch(r"X meets .+\. What follows: X feels …", example.prompt) for example in examples)
    assert Symbolic().recipe == "symbolic"


@pytest.mark.parametrize("dies_after", [0, 3, 9])
def test_every_stage_goes_on_where_it_was(dies_after: int) -> None:
    """Of a recipe of four stages, two of which depend on what an earlier one made."""

    def answering() -> Callable[[str], Any]:
        return lambda prompt: f"{len(prompt)} words are said in answer to it {prompt[-12:]}"

    from slimbench.tasks.teaching import data_set

    whole, asked, made = written("vicuna", answering(), 4)
    for file in made.folder.iterdir():
        file.unlink()
    dying, living = Scripted(answering(), dies_after), Scripted(answering())
    with pytest.raises(TeacherError):
        data_set.make(recipe("vicuna"), lambda: dying, "scripted", 4, 0)
    again = data_set.make(recipe("vicuna"), lambda: living, "scripted", 4, 0)
    assert again.sha256 == made.sha256 and len(dying.asked) + len(living.asked) == len(asked) and whole

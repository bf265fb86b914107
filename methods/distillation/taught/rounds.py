"""Methods that go on in rounds: what the student cannot do yet decides on what the teacher is asked next.

    Lion            imitation, then a referee, the teacher itself, gives marks to the teacher's and the student's answers, in both orders;
                    where the student is behind by a mark or more, an instruction is hard; as many new ones after hard ones as after
                    easy ones are written, answered and learned in the next round (Jiang et al., arXiv 2305.12870)
    reflection      before each round the student sits an exam on questions that it learns from; wrong answers go to the teacher,
                    which explains the right answer to this student; a right rationale shall be nearer to another right one than to the
                    student's own wrong ones (Wang et al., arXiv 2310.13332; code: Raibows/Learn-to-Reason, which by default learns the
                    tokens of the question too, at a tenth of the weight; here they are given)

Rounds have equal shares of the steps. What the student writes has a seed of its own, so that a run that is resumed asks the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Needs, Unsupported
from slimbench.methods.distillation.student import Lesson, logits
from slimbench.methods.distillation.taught.examples import Taught, examples_of, held_out_of
from slimbench.util.writing.answers import Text, alike, ends_with, unfit
from slimbench.util.writing.teaching import Example, Request, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

JUDGE = """Two answers to one instruction follow. Give each a mark from 1 to 10 for how helpful and how right it is.

Instruction: {instruction}

First answer: {first}

Second answer: {second}

Write the two marks alone, the first answer's mark first:"""
AFTER_HARD = """Write one new instruction for an assistant, from the same field and for the same kind of task as this one, about as long and
as hard. Write it alone.

{instruction}"""
AFTER_EASY = """Write one new instruction for an assistant, from the same field as this one, but on something rarer in it, about as long and
as hard. Write it alone.

{instruction}"""
CORRECT = """A student was asked:

{question}

The student wrote:

{answer}

The right answer is {gold}. Explain to this student, in two or three sentences, how to get there, and end with "The answer is {gold}"."""


@dataclass(frozen=True)
class Rounds(Taught):
    """Fine-tuning in rounds, with questions to the teacher between them.

    Attributes:
        rounds: How many.
        examined: Examples whose prompts the student answers before one of them, at most.
        answer_tokens: Of what student and teacher write then, at most.
    """

    needs = Needs(text=True, teacher=True, training=True)

    rounds: int = 3
    examined: int = 32
    answer_tokens: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rounds", 1), ("examined", 1), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.rounds > self.steps:
            raise ValueError(f"rounds must not exceed the steps {self.steps}, not {self.rounds}")

    def asked(self, dense: DenseModel, prompts: Sequence[str], tokens: int, turn: int = 0, temperature: float = 0.0) -> list[str]:
        """The teacher's answers, in order; an empty text for one that is none, or was cut at its limit."""
        assert dense.teacher is not None
        sampling = Sampling(max_tokens=tokens, temperature=temperature)
        requests = [Request((("user", prompt),), sampling, seed=1000 * turn + number) for number, prompt in enumerate(prompts)]
        found = dict(dense.teacher.answers(requests))
        each = (found[number] for number in range(len(prompts)))
        return ["" if answer.finish == "length" or unfit(answer, sampling) else answer.text.strip() for answer in each]

    def examination(
        self, student: Any, examples: Sequence[Example], dense: DenseModel, turn: int, samples: int = 0
    ) -> list[tuple[Example, str]]:
        """Some examples, one of each prompt, with what the student answers to them now.

        Args:
            samples: Answers to each, drawn; 0: one, of the likeliest token each time.
        """
        import torch

        from slimbench.methods.core.learning.rollouts import answered

        each = list({example.prompt: example for example in examples}.values())
        each.sort(key=lambda example: hashlib.sha256(f"{self.seed + dense.seed} {turn} {example.prompt}".encode()).hexdigest())
        chosen, training = each[: self.examined], student.training
        student.eval()
        sat = [example for example in chosen for _ in range(samples or 1)]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if dense.device == "cuda" else []):
            torch.manual_seed((self.seed + dense.seed) * 1000 + turn)
            prompts = [example.prompt for example in sat]
            texts = answered(student, dense.tokenizer(), prompts, self.answer_tokens, _arithmetic(dense), drawn=samples > 0)
        student.train(training)
        return list(zip(sat, texts, strict=True))


@dataclass(frozen=True)
class Lion(Rounds):
    """Adversarial distillation.

    Attributes:
        behind: Marks that the student is behind by where an instruction is hard.
        likeness: Largest ROUGE-L of a new instruction with one that there is.
    """

    name = "lion"
    version = 2
    citation = Citation("Lion", year=2023, arxiv="2305.12870", covers=("distillation/lion",))
    citations = {"lion": citation}  # noqa: RUF012

    recipe: str = "lion"
    behind: float = 1.0
    likeness: float = 0.7

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        from slimbench.methods.core.learning.answers import answer_loss, encode

        pool, tokenizer = _Pool(list(examples_of(dense))), dense.tokenizer()
        tasks = self.tasks(dense)

        def loss(answers: Tensor) -> Tensor:
            return answer_loss(logits(student, answers[:, 0], dense), answers)

        def text(turn: int) -> Callable[[], Tensor]:
            def made() -> Tensor:
                new = self.harder(student, pool.examples, dense, turn) if turn else pool.examples
                pool.examples += new if turn else []
                return encode(new or pool.examples, tokenizer, self.length, tasks)

            return made

        return [Lesson(loss, 1 / self.rounds, windows=text(turn)) for turn in range(self.rounds)]

    def harder(self, student: Any, pool: Sequence[Example], dense: DenseModel, turn: int) -> list[Example]:
        """New instructions with the teacher's answers: as many after hard ones as after easy ones, unlike all that there are.

        Where none is hard, or none easy, all are written after the others.
        """
        sat = self.examination(student, pool, dense, turn)
        differences = self.marks(sat, dense)
        hard = [example for (example, _), by in zip(sat, differences, strict=True) if by is not None and by >= self.behind]
        easy = [example for (example, _), by in zip(sat, differences, strict=True) if by is not None and by < self.behind]
        count = min(len(hard), len(easy)) or max(len(hard), len(easy))
        asked = {AFTER_HARD: hard[:count], AFTER_EASY: easy[:count]}
        prompts = [form.format(instruction=example.prompt) for form, of in asked.items() for example in of]
        written = iter(self.asked(dense, prompts, self.answer_tokens, turn, temperature=1.0))
        parts = [[text for _ in of if is_instruction(text := next(written))] for of in asked.values()]
        known = [example.prompt for example in (*pool, *held_out_of(dense))]
        new = set(unlike([text for part in parts for text in part], known, self.likeness))
        left = [text for text in dict.fromkeys(text for part in parts for text in part) if text in new]
        answers = dict(zip(left, self.asked(dense, left, self.answer_tokens, turn), strict=True))
        first = set(parts[0])
        sides = [[text for text in left if answers[text] and (text in first) is hard_one] for hard_one in (True, False)]
        least = min(map(len, sides)) if hard and easy else count
        kept = [text for side in sides for text in side[:least]]
        return [Example(prompt, answers[prompt], task=pool[0].task, item=f"round {turn}") for prompt in kept]

    def marks(self, sat: Sequence[tuple[Example, str]], dense: DenseModel) -> list[float | None]:
        """By how many marks the student is behind, the mean over both orders; None where the referee gave none in either."""
        prompts = []
        for example, text in sat:
            for first, second in ((example.response, text), (text, example.response)):
                prompts.append(JUDGE.format(instruction=example.prompt, first=first, second=second))
        given = [two_marks(text) for text in self.asked(dense, prompts, 16)]
        found: list[float | None] = []
        for ours, theirs in zip(given[::2], given[1::2], strict=True):
            gaps = ([ours[0] - ours[1]] if ours else []) + ([theirs[1] - theirs[0]] if theirs else [])
            found.append(sum(gaps) / len(gaps) if gaps else None)
        return found


@dataclass
class _Pool:
    examples: list[Example] = field(default_factory=list)


def two_marks(text: str) -> tuple[float, float] | None:
    """The first two numbers from 1 to 10 in a referee's answer, `/10` and numbers of a list left out; None where these are no marks."""
    text = re.sub(r"(?m)^\s*\d+[.)]\s+(?=\D*\d)|\s*/\s*10\b", " ", text)
    numbers = [float(number) for number in re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?![\d.]*\d)", text)]
    return (numbers[0], numbers[1]) if len(numbers) >= 2 and all(1 <= number <= 10 for number in numbers[:2]) else None


def is_instruction(text: str) -> bool:
    """Whether a text may be an instruction: more than three words, a letter or a digit of ASCII first, and nothing about instructions."""
    return len(text.split()) > 3 and text[0].isascii() and text[0].isalnum() and "instruction" not in text.lower()


def unlike(texts: Sequence[str], known: Sequence[str], limit: float) -> Iterator[str]:
    """The texts whose ROUGE-L with each known one, and with each before them, is at most a limit."""
    seen = [Text.of(text) for text in known]
    for text in texts:
        if text and not alike(Text.of(text), seen, limit):
            seen.append(Text.of(text))
            yield text


@dataclass(frozen=True)
class Reflection(Rounds):
    """Learning from one's own mistakes.

    Attributes:
        contrast: Weight of the triplets.
        margin: By which a right rationale shall be nearer than a wrong one.
        negatives: Wrong rationales of a question that are kept, the last ones.
        samples: Answers to a question in an exam.
    """

    name = "reflection"
    version = 2
    citation = Citation("Democratizing reasoning ability", year=2023, arxiv="2310.13332", covers=("distillation/wang-et-al",))
    citations = {"reflection": citation}  # noqa: RUF012

    recipe: str = "reflection"
    rounds: int = 2
    batch_size: int = 2
    contrast: float = 0.5
    margin: float = 1.0
    negatives: int = 4
    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("contrast", "margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("negatives", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        wrong: dict[str, list[str]] = {}
        right = _Pool(list(examples_of(dense)))
        if not all(example.gold for example in right.examples):
            raise Unsupported(f"recipe {self.recipe} has examples without a right answer, of which there is no exam")

        def text(turn: int) -> Callable[[], Tensor]:
            def made() -> Tensor:
                right.examples += self.corrected(student, right.examples, wrong, dense, turn)
                return self.triplets(right.examples, wrong, dense)

            return made

        def loss(triplets: Tensor) -> Tensor:
            return self.loss_of(student, triplets, dense)

        return [Lesson(loss, 1 / self.rounds, windows=text(turn)) for turn in range(self.rounds)]

    def corrected(self, student: Any, right: Sequence[Example], wrong: dict[str, list[str]], dense: DenseModel, turn: int) -> list[Example]:
        """What the teacher explains where the student was wrong, on its first wrong answer; these are noted by prompt."""
        sat = self.examination(student, right, dense, turn, self.samples)
        mistakes = [(example, text) for example, text in sat if text and not ends_with(text, example.gold)]
        for example, text in mistakes:
            wrong[example.prompt] = [*wrong.get(example.prompt, ()), text][-self.negatives :]
        failed = list({example.prompt: (example, text) for example, text in reversed(mistakes)}.values())[::-1]
        prompts = [CORRECT.format(question=example.prompt, answer=text, gold=example.gold) for example, text in failed]
        answers = zip(failed, self.asked(dense, prompts, self.answer_tokens, turn), strict=True)
        return [replace(example, response=text.rstrip(".")) for (example, _), text in answers if ends_with(text, example.gold)]

    def triplets(self, right: Sequence[Example], wrong: dict[str, list[str]], dense: DenseModel) -> Tensor:
        """Rationales [n, 9, length]: each beside another right one of its question and one of the student's wrong ones, or nothing."""
        import torch

        from slimbench.methods.core.learning.answers import encode_each

        tokenizer, tasks, rows = dense.tokenizer(), self.tasks(dense), list[list[Example | None]]()
        for number, example in enumerate(right):
            others = [other for other in right if other.prompt == example.prompt and other.response != example.response]
            against = wrong.get(example.prompt, [])
            whole = bool(others and against)
            other = others[number % len(others)] if whole else None
            rows.append([example, other, replace(example, response=against[number % len(against)], gold="") if whole else None])
        texts = list(dict.fromkeys(example for row in rows for example in row if example is not None))
        encoded = encode_each(texts, tokenizer, self.length, tasks)
        if not any(row[0] in encoded for row in rows if row[0] is not None):
            raise Unsupported(f"no rationale is left within length={self.length}")
        none = torch.zeros_like(next(iter(encoded.values())))
        left = [row for row in rows if row[0] in encoded]
        return torch.stack([torch.cat([none if text is None else encoded.get(text, none) for text in row]) for row in left])

    def loss_of(self, student: Any, triplets: Tensor, dense: DenseModel) -> Tensor:
        """CE of the first + `contrast` · mean max(0, D(a, p) − D(a, n) + margin) over those that have all three.

        a, p and n are the last hidden states at the last token of a response, and D is less the cosine of the angle between two.
        """
        import torch

        from slimbench.methods.core.learning.answers import RESPONSE, answer_loss
        from slimbench.methods.core.learning.terms import term

        first = triplets[:, :3]
        with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
            out = student(input_ids=first[:, 0], use_cache=False, output_hidden_states=True)
        learned = term("rationales", answer_loss(out.logits, first))
        whole = (triplets[:, 4] > 0).any(1) & (triplets[:, 7] > 0).any(1)
        if not bool(whole.any()):
            return learned
        others = torch.cat([triplets[whole, 3:6], triplets[whole, 6:]])
        with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
            states = student(input_ids=others[:, 0], use_cache=False, output_hidden_states=True).hidden_states[-1]
        near, far = at_the_end(states, others[:, 1] >= RESPONSE).chunk(2)
        anchor = at_the_end(out.hidden_states[-1][whole], first[whole, 1] >= RESPONSE)
        gaps = torch.cosine_similarity(anchor, far) - torch.cosine_similarity(anchor, near) + self.margin
        return learned + term("triplets", self.contrast * gaps.clamp(min=0).mean())


def at_the_end(states: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [n, length, hidden] at the last place where a mask [n, length] is true, in float32."""
    import torch

    places = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states), device=mask.device), torch.where(mask, places, 0).amax(1)].float()


def _arithmetic(dense: DenseModel) -> torch.dtype | None:
    import torch

    return torch.bfloat16 if dense.dtype == "bfloat16" else None

"""What all distillations of a student share: the student is what the steps before left, and its teacher the pipeline's first model.

A distillation is one lesson or several, one after the other, each with a share of the steps. A lesson has a loss, the parameters of the
student that learn (all, if it names none), and what learns beside the student and is not kept, such as projections of hidden states.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.training import Loss, Trained


@dataclass(frozen=True)
class Lesson:
    """A part of a distillation.

    Attributes:
        loss: Of token ids [sequences, length], a scalar.
        share: Of the steps.
        learning: Names of the parameters of the student that learn; None: all.
        beside: What else learns, by name.
        pair: What learns beside is a model of its own, and how fast it learns says nothing of the student: gradients are clipped apart.
        windows: What is trained on, made when the lesson begins; None: what all lessons have.
        begin: What is done when the lesson begins, with the student as the lesson before left it.
    """

    loss: Loss
    share: float = 1.0
    learning: Collection[str] | None = None
    beside: Mapping[str, nn.Parameter] = field(default_factory=dict)
    pair: bool = False
    windows: Callable[[], Tensor] | None = None
    begin: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Distillation(TrainingSettings, Method):
    """Training of a student under a teacher; the artefact is the student alone."""

    accepts: ClassVar[tuple[str, ...]] = DENSE
    needs = Needs(calibration=True, training=True)
    least_steps: ClassVar[int | None] = 1000

    steps: int = 200
    loss: Literal["distillation"] = "distillation"

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return True

    @property
    def after(self) -> str | None:
        return "shortgpt" if self.has_teacher else None

    @abstractmethod
    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        """What is learned.

        Args:
            student: In float32.
            teacher: In its own dtype, frozen; None where `has_teacher` is false.

        Raises:
            Unsupported: Student and teacher do not fit each other.
        """

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.teachers import fingerprint, teacher_of
        from slimbench.methods.formats.architecture.modules import KeptLogits

        if self.has_teacher and self.after and dense.original in (None, dense.path):
            raise Unsupported("the student is the first model of the pipeline and would teach itself; a step before it makes a student")
        student = trained.load(dense)
        if any(isinstance(module, KeptLogits) for module in student.modules()):
            raise Unsupported("the student never predicts some tokens, of which the teacher's distribution has a share")
        teacher = teacher_of(dense) if self.has_teacher else None
        windows = self.windows(calibration, dense)
        self.prepare(student, windows, dense)
        lessons = self.lessons(student, teacher, dense)
        ends = [round(self.steps * sum(lesson.share for lesson in lessons[:count])) for count in range(len(lessons) + 1)]
        start = fingerprint(dict(student.named_parameters()))
        done: list[Trained] = []
        for index, lesson in enumerate(lessons):
            lesson.begin()
            own = windows if lesson.windows is None else lesson.windows()
            done.append(self._learn(student, lesson, index, (ends[index], ends[index + 1]), own, dense, start))
        steps = [end - begin for begin, end in pairwise(ends)]
        self.cut_out(student)
        trained.save(student, dense, out)
        taught = next((part.teacher_sha256 for part in done if part.teacher_sha256), None)
        tokens, most = sum(part.tokens for part in done), max(part.parameters for part in done)
        whole = replace(done[-1], tokens=tokens, parameters=most, teacher_sha256=taught)
        claim = whole.added_to(replace(self.left(student), teacher=self.taught_by(dense)))
        claim.details["training"] |= {"lesson_steps": steps, "earlier_lessons": [part.told for part in done[:-1]]}
        return claim

    def prepare(self, student: Any, windows: Any, dense: DenseModel) -> None:
        """What is done to the student before it learns, with what it will be trained on.

        Raises:
            Unsupported: It cannot be done to this student.
        """

    def cut_out(self, student: Any) -> None:
        """What is done to the student when it has learned: nothing, unless a method says otherwise."""

    def left(self, student: Any) -> Claim:
        """What the student is in the end, in its own dtype."""
        return Claim(HUGGINGFACE)

    def windows(self, calibration: Calibration, dense: DenseModel) -> Tensor:
        """What is trained on, as `train` takes it."""
        from slimbench.methods.core.training import cut

        return cut(calibration.ids, self.length)

    def taught_by(self, dense: DenseModel) -> str | None:
        """The teacher, in the words of a claim."""
        from slimbench.methods.core.learning import trained

        return trained.teacher(self) if self.has_teacher else None

    def _learn(
        self, student: Any, lesson: Lesson, index: int, steps: tuple[int, int], windows: Any, dense: DenseModel, start: str | None = None
    ) -> Trained:
        """One lesson, with a part of the progress and a folder of checkpoints of its own."""
        from slimbench.methods.core.training import train

        def progress(done: float, total: float) -> None:
            dense.progress(steps[0] + done, self.steps)

        told = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        kept = dense.checkpoints / f"lesson-{index}-{told}" if dense.checkpoints else None
        names = lesson.learning
        parameters = {name: value for name, value in student.named_parameters() if names is None or name in names}
        student.requires_grad_(False)
        for value in parameters.values():
            value.requires_grad_(True)
        loop = {each.name: getattr(self, each.name) for each in fields(TrainingSettings)} | {"steps": steps[1] - steps[0]}
        place = replace(dense, progress=progress, checkpoints=kept)
        more = steps[1] < self.steps
        learned, apart = parameters | dict(lesson.beside), lesson.beside if lesson.pair else ()
        return train(TrainingSettings(**loop), learned, lesson.loss, windows, place, more_follows=more, start=start, apart=apart)


def logits(model: Callable[..., Any], ids: Tensor, dense: DenseModel) -> Tensor:
    """What a model in float32 predicts, in the arithmetic of the model's dtype, [sequences, length, vocabulary]."""
    import torch

    with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
        return model(input_ids=ids, use_cache=False).logits


def width_of(model: Any) -> int:
    """Features of a model's hidden states.

    Raises:
        Unsupported: Its embeddings have others, so that hidden states are not all of one width.
    """
    width, embedded = model.config.hidden_size, model.get_input_embeddings().embedding_dim
    if width != embedded:
        raise Unsupported(f"{type(model).__name__} has embeddings of {embedded} features and hidden states of {width}")
    return int(width)


@dataclass(frozen=True)
class Layered(Distillation):
    """Some layers of the student learn from layers of the teacher.

    Attributes:
        pairs: How many.
    """

    pairs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, not {self.pairs}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.pairs > shape.num_layers:
            raise Unsupported(f"{self.pairs} pairs of layers need as many blocks, and there are {shape.num_layers}")


@dataclass(frozen=True)
class Prompted(Distillation):
    """The student writes behind prompts, the beginnings of the windows.

    Attributes:
        prompt_tokens: Tokens of a window that are its prompt.
    """

    in_one_piece = "a batch is written in one go"

    steps: int = 40
    prompt_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prompt_tokens < self.length:
            raise ValueError(f"prompt_tokens must be at least 1 and below the length {self.length}, not {self.prompt_tokens}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        if calibration.ids.shape[1] <= self.prompt_tokens:
            raise Unsupported(
                f"calibration windows of {calibration.ids.shape[1]} tokens have nothing behind a prompt of {self.prompt_tokens}"
            )
        return super().compress(dense, calibration, out)

"""The training loop of every method that learns by gradient descent: warm-up and decay, batches in a seeded order, exact resumption.

A run is a pure function of the settings, the initial parameters and the text: the batch of a step depends on the seed and the step
alone, and a checkpoint holds parameters, moments of the optimizer, the state of the random numbers and what a method keeps between steps
(`core.learning.hooks`). So on a CPU an interrupted and resumed run ends with the same bits as one that ran through.

Weights are float32 whatever the model's dtype; products are computed in bfloat16 where the model is bfloat16.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.base import Claim, DenseModel, Settings
from slimbench.methods.core.learning.hooks import Hooks, regroup
from slimbench.methods.core.learning.teachers import FIRST, fingerprint, raw, teacher_of, watching
from slimbench.methods.core.learning.terms import hearing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Loss = Callable[[Tensor], Tensor]
    """Mean loss, a scalar, of token ids [sequences, length]; it may name its parts (`core.learning.terms`)."""

_CURVE_POINTS = 100
_STATE = "training"
_FORM = 2  # of a checkpoint
_HOOKS = "hooks/"


@dataclass(frozen=True)
class LoopSettings(Settings, ABC):
    """The settings that every method has that learns, whatever its optimizer.

    Attributes:
        steps: Updates of the parameters; papers take thousands.
        batch_size: Sequences of an update.
        length: Tokens of a sequence at most; calibration windows are cut to it.
        accumulate: Pieces that a batch goes through the model in; more need less memory.
        learning_rate: Its peak.
        schedule: How the rate falls after the warm-up.
        warmup: Fraction of the steps in which the rate rises linearly.
        clip: Largest norm of the gradient; None: it is not clipped.
        loss: `distillation`: cross entropy with the dense model's distribution; `nll`: with the text itself.
        checkpoint_every: Steps between two checkpoints at most; where steps are long, there is one every 20 seconds.
        seed: Of the order of the text and of initial values.
    """

    draws = True
    in_one_piece: ClassVar[str | None] = None
    """Why a batch goes through the model whole; None: it may be cut into pieces, whose mean losses have the mean of the batch."""

    steps: int = 40
    batch_size: int = 4
    length: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    clip: float | None = 1.0
    loss: Literal["distillation", "nll"] = "distillation"
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}")
        if self.accumulate > 1 and self.in_one_piece:
            raise ValueError(f"accumulate must be 1, not {self.accumulate}: {self.in_one_piece}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must not exceed the batch_size {self.batch_size}, not {self.accumulate}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), not {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}")

    @property
    def teacher_temperature(self) -> float:
        """τ, by which the logits of student and teacher are divided in distillation; the loss is then τ² times as large."""
        return 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * left[self.schedule]

    @abstractmethod
    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """What updates the parameters; the loop sets its `lr` before each step."""


@dataclass(frozen=True)
class TrainingSettings(LoopSettings):
    """The settings of every method that trains weights, which AdamW does.

    Attributes:
        weight_decay: Of AdamW, decoupled.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, not {self.weight_decay}")

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Trained:
    """What a training was.

    Attributes:
        tokens: Tokens of all gradient steps.
        parameters: Number of parameters that were updated.
        curve: (step, training loss) of at most 100 steps, the first and the last among them.
        loss_after: Loss of the first step's batch with the final parameters; to be held against the first loss of the curve, but where a
            step has draws or prices of its own: units that are shut at random, texts that are drawn, multipliers that climbed.
        terms: By name, the same points of each part of the loss, where a step had it.
        start_sha256: Of the parameters before the first step (`core.learning.teachers`); of a student that is distilled, of all of its own.
        teacher_sha256: Of the teacher that the loss asked, as it was loaded and as it was in the end; None: it asked none.
    """

    tokens: int
    parameters: int
    curve: tuple[tuple[int, float], ...]
    loss_after: float
    terms: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    start_sha256: str = ""
    teacher_sha256: str | None = None

    @property
    def told(self) -> dict[str, Any]:
        """How the loss went, from where and by whom, for a claim."""
        facts: dict[str, Any] = {"loss_curve": [list(point) for point in self.curve]}
        if self.terms:
            facts["loss_terms"] = {name: [list(point) for point in points] for name, points in self.terms.items()}
        facts |= {"start_sha256": self.start_sha256} if self.start_sha256 else {}
        facts |= {"teacher_sha256": self.teacher_sha256} if self.teacher_sha256 else {}
        return facts | {"loss_before": self.curve[0][1], "loss_after": self.loss_after}

    def added_to(self, claim: Claim) -> Claim:
        """The claim, with what was trained, how the loss went, and the teacher that the loss asked, unless the claim names one."""
        details, teacher = claim.details | {"training": self.told}, claim.teacher or (FIRST if self.teacher_sha256 else None)
        return replace(claim, training_tokens=self.tokens, trained_parameters=self.parameters, details=details, teacher=teacher)


def train(
    settings: LoopSettings,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    windows: Tensor,
    dense: DenseModel,
    hooks: Hooks | None = None,
    more_follows: bool = False,
    start: str | None = None,
    apart: Collection[str] = (),
) -> Trained:
    """Minimize a loss over the parameters, from a checkpoint of the same run where there is one.

    Args:
        settings: A method or plain settings; with its `repr` a checkpoint tells runs apart.
        parameters: By unique names; nothing else is updated, gradients of others are neither computed nor kept.
        windows: Token ids, int64 [n, length]; or answers, int64 [n, 3, length], or several beside each other, [n, 3 k, length], see
            `core.learning.answers`.
        dense: Gives the device, the seed of the cell, the progress to report to and the folder of checkpoints.
        hooks: What the method does between the parts of a step; None: nothing.
        more_follows: Another training goes on from this one, so that its last step is kept too.
        start: Fingerprint of what the training began from, where that is something else than the parameters.
        apart: Names of those that are of another model; its gradient has a norm of its own, by which it is clipped.

    Raises:
        RuntimeError: The loss is no longer finite, or the teacher changed.
    """
    import torch

    from slimbench.util import checkpoints as _checkpoints

    settings = replace(settings, seed=settings.seed + dense.seed)
    values = list(parameters.values())
    hooks = hooks or Hooks()
    optimizer = settings.optimizer(values)
    regroup(optimizer, parameters, hooks.groups())
    free = {name for group in hooks.groups() if group.free for name in group.names}
    clipped = [[value for name, value in parameters.items() if name not in free and (name in apart) == other] for other in (False, True)]
    identity = _identity(settings, {**parameters, **_state(hooks)}, windows) if dense.checkpoints else ""
    start = start or fingerprint(parameters)
    with _seeded(settings.seed, dense.device), watching() as teachers:
        (losses, terms), due = _resume(dense, identity, parameters, optimizer, hooks), _checkpoints.Due()
        for step in range(len(losses), settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step) * group.get("factor", 1.0)
            lost, parts = _gradient(settings, loss, batch(windows, settings, step).to(dense.device))
            losses.append(lost)
            terms.append(parts)
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss is {losses[-1]} in step {step + 1} of {settings.steps}; a smaller learning_rate may help")
            hooks.after_backward(step)
            if settings.clip is not None:
                for model in clipped:
                    torch.nn.utils.clip_grad_norm_(model, settings.clip)
            optimizer.step()
            hooks.after_step(step, optimizer)
            optimizer.zero_grad(set_to_none=True)
            dense.progress(step + 1, settings.steps)
            last = more_follows and step + 1 == settings.steps
            if dense.checkpoints and (last or (step + 1) % settings.checkpoint_every == 0 or due):
                with due.saving():
                    _keep(dense, identity, parameters, optimizer, (losses, terms), hooks)
        with torch.no_grad():
            after = float(loss(batch(windows, settings, 0).to(dense.device)))
    shown = _points(len(losses))
    names = dict.fromkeys(name for parts in terms for name in parts)
    courses = {name: _course([parts.get(name) for parts in terms], shown) for name in names}
    tokens, taught = _tokens(settings, windows), " ".join(teachers) or None
    return Trained(tokens, sum(p.numel() for p in values), _course(losses, shown), after, courses, start, taught)


def cut(ids: Tensor, length: int) -> Tensor:
    """Calibration windows [samples, n] cut into windows [more, length]; shorter ones stay as they are, remainders are dropped."""
    width = min(length, ids.shape[1])
    return ids[:, : ids.shape[1] // width * width].reshape(-1, width)


def _tokens(settings: LoopSettings, windows: Tensor) -> int:
    """Tokens of all steps; of answers without what only fills them up."""
    if windows.dim() == 2:
        return settings.steps * settings.batch_size * windows.shape[1]
    counts = (windows[:, 1::3] > 0).sum((1, 2))
    return sum(int(batch(counts, settings, step).sum()) for step in range(settings.steps))


def batch(windows: Tensor, settings: LoopSettings, step: int) -> Tensor:
    """The sequences [batch_size, length] of a step: all windows in a new order in each round, cut into batches."""
    import torch

    count, rows = len(windows), []
    for position in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + position // count)
        rows.append(int(torch.randperm(count, generator=generator)[position % count]))
    return windows[rows]


def objective(settings: LoopSettings, student: Any, dense: DenseModel, teacher: Any = None) -> Loss:
    """The loss that the settings name, of a student model.

    Args:
        student: Called with token ids; its parameters get the gradients.
        teacher: For distillation; None: the model that the pipeline began with.
    """
    import torch

    from slimbench.methods.core.losses import next_token, soft_cross_entropy

    bfloat16, temperature = dense.dtype == "bfloat16", settings.teacher_temperature
    if settings.loss == "distillation" and teacher is None:
        teacher = teacher_of(dense)

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16):
            logits = student(input_ids=ids, use_cache=False).logits
        if settings.loss == "nll":
            return next_token(logits, ids)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        return temperature**2 * soft_cross_entropy(logits / temperature, wanted / temperature)

    return loss


def _state(hooks: Hooks) -> dict[str, Tensor]:
    return {f"{_HOOKS}{name}": tensor for name, tensor in hooks.state().items()}


def _gradient(settings: LoopSettings, loss: Loss, ids: Tensor) -> tuple[float, dict[str, float]]:
    """Add the gradient of a batch to the parameters, piece by piece, and return its mean loss and the parts of that."""
    total, terms = 0.0, dict[str, float]()
    for piece in ids.tensor_split(settings.accumulate):
        share = len(piece) / len(ids)
        with hearing() as parts:
            part = loss(piece) * share
        part.backward()
        total += float(part.detach())
        terms |= {name: terms.get(name, 0.0) + share * value for name, value in parts.items()}
    return total, terms


def _keep(
    dense: DenseModel,
    identity: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    course: tuple[list[float], list[dict[str, float]]],
    hooks: Hooks,
) -> None:
    import torch

    from slimbench.util import checkpoints as _checkpoints

    assert dense.checkpoints is not None
    tensors: dict[str, Tensor] = {f"parameter/{name}": value for name, value in parameters.items()}
    tensors |= {f"{key}/{name}": state for name, value in parameters.items() for key, state in optimizer.state[value].items()}
    tensors |= _state(hooks)
    tensors["random"] = torch.get_rng_state()
    if dense.device == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    losses, terms = course
    _checkpoints.save(dense.checkpoints, _STATE, identity, tensors, {"step": len(losses), "losses": losses, "terms": terms})


def _resume(
    dense: DenseModel, identity: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, hooks: Hooks
) -> tuple[list[float], list[dict[str, float]]]:
    """Put a checkpoint back and return the losses of its steps and their parts; without one, nothing changes and there are none."""
    import torch

    from slimbench.util import checkpoints as _checkpoints

    found = _checkpoints.load(dense.checkpoints, _STATE, identity) if dense.checkpoints else None
    if found is None:
        return [], []
    tensors, facts = found
    torch.set_rng_state(tensors.pop("random"))
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("random/cuda"))
    hooks.load({name.removeprefix(_HOOKS): tensors.pop(name) for name in [*tensors] if name.startswith(_HOOKS)})
    with torch.no_grad():
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            value = parameters[name]
            if kind == "parameter":
                value.copy_(tensor)
            else:
                optimizer.state[value][kind] = tensor if kind == "step" else tensor.to(value.device)
    return list(facts["losses"]), list(facts["terms"])


def _identity(settings: LoopSettings, tensors: Mapping[str, Tensor], windows: Tensor) -> str:
    """Hash of all that the result depends on: settings, text, names and initial values."""
    digest = hashlib.sha256(f"{_FORM} {settings!r}".encode())
    for name, tensor in [("windows", windows), *tensors.items()]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Random numbers from the seed inside, and afterwards as if none had been drawn."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _points(steps: int) -> list[int]:
    """All steps, or 100 spread evenly with both ends."""
    last = steps - 1
    return list(range(steps)) if last < _CURVE_POINTS else sorted({round(i * last / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)})


def _course(values: Sequence[float | None], points: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """(step, value) at points that have one, steps counted from 1."""
    return tuple((index + 1, round(value, 6)) for index in points if (value := values[index]) is not None)

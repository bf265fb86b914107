"""HomoDistil: the student begins as its teacher and loses its least important units while it learns from it.

With the importance of a unit, the sum of the sensitivities of its weights averaged over steps (Liang et al., arXiv 2302.09632)

    Ī_t = β Ī_{t−1} + (1 − β) Σ |θ ∂L/∂θ|

so many units of each block are zero after step t as a cubic schedule says (`core.learning.gradual`): those that have gone, then those of
the lowest Ī. What the student learns meanwhile is

    L = CE(y) + α₁ KL(p ‖ q) + α₂ L_layers

with the teacher's predictions p and its own, q, the text's next token y, and the squared errors of embeddings, hidden states and attention
scores, layer by layer (`tinybert.layer_loss`). In the end what is zero is cut out: an ordinary checkpoint, each block of the same size.

The paper trains an encoder on masked tokens and narrows hidden states too, which projections then compare with the teacher's. Here they
keep their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Needs, Unsupported
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.learning.hooks import Locked
from slimbench.methods.core.settings import Smaller
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.architecture.uniform import Sizes
    from slimbench.methods.core.architecture.units import Structures
    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class HomoDistil(TrainingSettings, Smaller):
    """Distillation of a model that is pruned on the way.

    Attributes:
        ratio: Share of the groups of heads and of the channels of each block that goes.
        prediction_weight: α₁.
        layer_weight: α₂.
        decay: β.
        begin: Share of the steps before any unit goes.
        end: Share of the steps at which all that shall go have gone.
        every: Steps between two choices.
    """

    name = "homodistil"
    citation = Citation("HomoDistil", year=2023, arxiv="2302.09632")
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    ratio: float = 0.4
    steps: int = 200
    loss: Literal["distillation"] = "distillation"
    prediction_weight: float = 1.0
    layer_weight: float = 1.0
    decay: float = 0.85
    begin: float = 0.1
    end: float = 0.7
    every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prediction_weight", "layer_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, not {self.decay}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"end must be above begin={self.begin} and at most 1, not {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.architecture.uniform import check, narrow, sizes_of
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.distillation.student import width_of

        student: Any = trained.load(dense)
        before, full = student.num_parameters(), sizes_of(student)
        left = self.sizes(full)
        check(student, left)
        teacher: Any = teacher_of(dense)
        widths = [width_of(each) for each in (student, teacher)]
        if widths[0] != widths[1]:
            raise Unsupported(f"hidden states of {widths[0]} features cannot be compared with the teacher's {widths[1]}")
        loss = self.loss_of(student, teacher, dense)
        with torch.no_grad():
            loss(torch.zeros(1, 2, dtype=torch.int64, device=student.device))  # refuses before the work what does not fit
        fading = Fading.of(student.requires_grad_(True), self.leaving, self.every, self.decay, left)
        windows = cut(calibration.ids, self.length)
        done = train(self, dict(student.named_parameters()), loss, windows, dense, fading)
        narrow(student, fading.kept(full.hidden))
        trained.save(student, dense, out)
        details = {"sizes_before": asdict(full), "sizes_left": asdict(left), "parameters_before": before}
        claim = Claim(HUGGINGFACE, **counts(student), cache_bytes_per_token=cache_bytes_per_token(student), details=details)
        return done.added_to(replace(claim, teacher=trained.teacher(self)))

    def sizes(self, full: Sizes) -> Sizes:
        """What is left of each block, one unit of each kind at least."""
        return replace(full, **{kind: max(1, round((1 - self.ratio) * getattr(full, kind))) for kind in ("groups", "channels")})

    @property
    def leaving(self) -> Cubic:
        """From nothing to all that goes."""
        begin = min(round(self.begin * self.steps), self.steps - 1)
        return Cubic(0.0, 1.0, begin, max(begin + 1, round(self.end * self.steps)))

    def loss_of(self, student: Any, teacher: Any, dense: DenseModel) -> Loss:
        """L of a student."""
        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import divergence, next_token
        from slimbench.methods.distillation.tinybert import layer_loss

        observed = layer_loss(student, teacher, dense, weight=self.layer_weight)

        def loss(ids: Tensor) -> Tensor:
            layers, made, wanted = observed(ids, 0)
            soft = self.prediction_weight * divergence(made.logits[:, :-1], wanted.logits[:, :-1])
            return term("text", next_token(made.logits, ids)) + term("teacher", soft) + layers

        return loss


@dataclass
class Fading(Locked):
    """Units that go one after the other, and stay zero.

    Attributes:
        kinds: The groups of heads and the channels of all blocks, by the layer that reads them.
        going: How many of each go in the end.
        schedule: The share of these that has gone after a step.
        every: Steps between two choices; there is one at the end of the schedule too.
        decay: β.
        importance: Ī [count] by kind.
        gone: True where a unit is zero, [count] by kind.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    kinds: Mapping[str, Structures] = field(kw_only=True)
    going: Mapping[str, int] = field(kw_only=True)
    schedule: Cubic = field(kw_only=True)
    every: int = field(kw_only=True)
    decay: float = field(kw_only=True)
    importance: dict[str, Tensor] = field(kw_only=True)
    gone: dict[str, Tensor] = field(kw_only=True)

    @classmethod
    def of(cls, model: Any, schedule: Cubic, every: int, decay: float, left: Sizes) -> Fading:
        """Of a model, nothing of which has gone yet.

        Raises:
            Unsupported: It is not built like Llama and OPT, or has experts.
        """
        import torch

        from slimbench.methods.core.architecture.units import kinds_of

        kinds = kinds_of(model)
        stay = {"head_groups": left.groups, "channels": left.channels}
        empty = {name: torch.zeros(kind.count, device=kind.reads.weight.device) for name, kind in kinds.items()}
        return cls(
            dict(model.named_parameters()),
            kinds=kinds,
            going={name: kind.count - stay[kind.name] for name, kind in kinds.items()},
            schedule=schedule,
            every=every,
            decay=decay,
            importance=dict(empty),
            gone={name: values.bool() for name, values in empty.items()},
        )

    def after_backward(self, step: int) -> None:
        super().after_backward(step)
        for name, kind in self.kinds.items():
            sensitivity = {layer: _sensitivity(layer.weight) for layer in (*kind.makes, kind.reads)}
            now = kind.scores(sensitivity, "sum")
            self.importance[name] = self.decay * self.importance[name] + (1 - self.decay) * now

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        done, of = step + 1, self.schedule
        if done == of.end or (of.begin < done < of.end and (done - of.begin) % self.every == 0):
            self.gone = {name: self.weakest(name, round(of.at(done) * self.going[name])) for name in self.kinds}
            self.masks = self.spread()
        super().after_step(step, optimizer)

    def weakest(self, name: str, count: int) -> Tensor:
        """So many units of a kind, first those that have gone."""
        from slimbench.methods.core.masks import lowest

        return lowest(self.importance[name].masked_fill(self.gone[name], -1.0), count)

    def spread(self) -> dict[str, Tensor]:
        """The weights of all that has gone, as masks by the names of parameters."""
        import torch

        found: dict[str, Tensor] = {}
        names = {id(value): name for name, value in self.parameters.items()}
        for of, kind in self.kinds.items():
            for layer in kind.makes:
                rows = self.gone[of].repeat_interleave(layer.out_features // kind.count)
                found[names[id(layer.weight)]] = rows[:, None].expand_as(layer.weight).clone()
                if layer.bias is not None:
                    found[names[id(layer.bias)]] = rows.clone()
            columns = self.gone[of].repeat_interleave(kind.reads.in_features // kind.count)
            found[names[id(kind.reads.weight)]] = columns[None].expand_as(kind.reads.weight).clone()
        return {name: mask for name, mask in found.items() if bool(torch.any(mask))}

    def kept(self, hidden: int) -> Any:
        """What stays of each block, for `uniform.narrow`."""
        import torch

        from slimbench.methods.core.architecture.uniform import Kept

        left = {kind: [(~self.gone[name]).nonzero().squeeze(1) for name, of in self.kinds.items() if of.name == kind] for kind in _KINDS}
        return Kept(torch.arange(hidden, device=next(iter(self.gone.values())).device), left["head_groups"], left["channels"])

    def state(self) -> dict[str, Tensor]:
        own = {f"importance/{name}": value for name, value in self.importance.items()}
        return own | {f"gone/{name}": value for name, value in self.gone.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, kind in self.kinds.items():
            self.importance[name] = state[f"importance/{name}"].to(kind.reads.weight.device)
            self.gone[name] = state[f"gone/{name}"].to(kind.reads.weight.device)
        self.masks = self.spread()


_KINDS = ("head_groups", "channels")


def _sensitivity(weight: Tensor) -> Tensor:
    """|θ ∂L/∂θ| [out, in]."""
    import torch

    return torch.zeros_like(weight) if weight.grad is None else (weight.detach() * weight.grad).abs()

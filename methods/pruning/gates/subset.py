"""Differentiable subset pruning: exactly K heads stay at every step, drawn by a relaxed top-k of learned weights (arXiv 2108.04657).

With a weight w_h of each head of the whole model, Gumbel noise g and a temperature τ, K draws without replacement are relaxed to

    r¹ = w + g,    p^k = softmax(r^k / τ),    r^{k+1} = r^k + ln(1 − p^k),    z = Σ_k p^k

so that Σ_h z_h = K. z multiplies the heads while weights and w learn; τ falls by the same factor each step from 1000 to 1e-8, where z is 0
or 1. In the end the K heads of the highest w stay. Numbers are float64: at low temperatures nothing else tells p = 1 apart. The gradient
of w has a norm of at most 1, by itself; in the authors' program it is clipped with all others.

A head is a key and a value head with the query heads that share them. A block that loses all of them loses its attention, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.settings import Smaller
from slimbench.methods.pruning.gates.learned import Chosen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.units import Structures

HOT, COLD = 1000.0, 1e-8  # τ at first and at last


@dataclass(frozen=True)
class Subset(Smaller, Chosen):
    """A learned subset of the heads.

    Attributes:
        ratio: Share of all groups of heads that goes, rounded to whole ones, at least one; one at least stays in the model.
        cooling: Fraction of the steps in which the temperature falls.
    """

    name = "dsp-heads"
    version = 2
    citation = Citation("Differentiable subset pruning", year=2021, arxiv="2108.04657", covers=("pruning/dsp",))
    produces = "edited"

    ratio: float = 0.4
    cooling: float = 0.75
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.cooling <= 1:
            raise ValueError(f"cooling must be above 0 and at most 1, not {self.cooling}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        self.going(shape.num_kv_heads * shape.num_layers)

    def going(self, groups: int) -> int:
        """How many groups of heads go.

        Raises:
            Unsupported: None would be left.
        """
        gone = max(1, int(self.ratio * groups + 0.5))
        if gone >= groups:
            raise Unsupported(f"{gone} of {groups} groups of heads cannot go")
        return gone

    def temperature(self, step: int) -> float:
        """τ of a step, counted from 0."""
        return float(HOT * (COLD / HOT) ** min(1.0, step / max(1.0, self.cooling * self.steps - 1)))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.nested import check_parts

        model = learned.load(dense)
        check_parts(model)
        kinds, before = learned.groups_of(model), model.num_parameters()
        groups = sum(kind.count for kind in kinds.values())
        chooser, plain = Chooser(self, kinds, groups - self.going(groups)), objective(self, model, dense)
        if self.choice == "random":
            chooser.fix(self.seed + dense.seed)

        def loss(ids: Tensor) -> Tensor:
            with chooser.drawn():
                return plain(ids)

        parameters = dict(model.named_parameters()) | chooser.parameters
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, chooser)
        details = {"parameters_before": before, "head_groups_by_block": chooser.finish(model), "head_groups_left": chooser.kept}
        learned.save(model, dense, out)
        return done.added_to(learned.claim(model, self, details))


class Chooser(Hooks):
    """Weights of heads, and the temperature of the step that is on.

    Attributes:
        kinds: Heads by the full name of the layer that reads them.
        kept: K.
        weights: w of all of them in turn, float64, zero at first: the noise decides.
        fixed: The subset is drawn for good, and w does not learn.
    """

    def __init__(self, settings: Subset, kinds: Mapping[str, Structures], kept: int) -> None:
        import torch

        self.settings, self.kinds, self.kept, self.step, self.fixed = settings, dict(kinds), kept, 0, False
        device = next(iter(kinds.values())).reads.weight.device
        count = sum(kind.count for kind in kinds.values())
        self.weights = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64, device=device))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What `train` gets, beside the weights of the model."""
        return {} if self.fixed else {"subset": self.weights}

    def fix(self, seed: int) -> None:
        """Draw the subset at random, for good: the control, which a learned one has to beat."""
        import torch

        self.weights.data.copy_(torch.randn(len(self.weights), generator=torch.Generator().manual_seed(seed)))
        self.fixed = True

    def drawn(self) -> Any:
        """Heads multiplied for a while by a relaxed subset that is drawn now, or by the fixed one."""
        from slimbench.methods.core.learning.gates import multiplied

        if self.fixed:
            return multiplied(self.kinds, {name: (~gone).float() for name, gone in self.gone().items()})
        z = relaxed(self.weights, gumbel(self.weights), self.kept, self.settings.temperature(self.step)).float()
        return multiplied(self.kinds, self.split(z))

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all heads in turn, by kind."""
        parts = values.split([kind.count for kind in self.kinds.values()])
        return dict(zip(self.kinds, parts, strict=True))

    def gone(self) -> dict[str, Tensor]:
        """All but the K heads of the highest weights, as masks by kind."""
        from slimbench.methods.core.masks import lowest

        return self.split(lowest(self.weights.detach(), len(self.weights) - self.kept))

    def finish(self, model: Any) -> list[int]:
        """Cut all but the K heads of the highest weights, in place, and count those of each block."""
        from slimbench.methods.core.architecture.surgery import remove_part

        gone = self.gone()
        blocks = {name: name.rpartition(".")[0].rpartition(".")[0] for name in self.kinds}
        for name, kind in self.kinds.items():
            if bool(gone[name].all()):
                remove_part(model, blocks[name], "attention")
            elif bool(gone[name].any()):
                kind.cut(model, (~gone[name]).nonzero().squeeze(1))
        return [int((~mask).sum()) for mask in gone.values()]

    def groups(self) -> Sequence[Group]:
        return () if self.fixed else (Group(("subset",), self.settings.gate_rate / self.settings.learning_rate, weight_decay=0.0),)

    def after_backward(self, step: int) -> None:
        """Bound the gradient of w. Over K draws 1/(1 − p) and 1/τ multiply; clipped with it, the gradients of the model would vanish."""
        if self.weights.grad is not None:
            gradient = self.weights.grad.nan_to_num_(0.0, 0.0, 0.0)
            gradient.div_(gradient.abs().max().clamp_min(1.0))
            gradient.div_(gradient.norm().clamp_min(1.0))

    def after_step(self, step: int, optimizer: Any) -> None:
        self.step = step + 1

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"step": torch.tensor(self.step)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])


def gumbel(weights: Tensor) -> Tensor:
    """Gumbel noise of the shape of the weights, from torch's own random numbers."""
    import torch

    tiny = torch.finfo(weights.dtype).tiny
    even = torch.rand_like(weights.detach()).clamp(tiny, 1 - torch.finfo(weights.dtype).eps)
    return -(-even.log()).log()


def relaxed(weights: Tensor, noise: Tensor, kept: int, temperature: float) -> Tensor:
    """z [heads], a relaxed subset of `kept` heads, of weights and noise [heads], float64."""
    import torch

    tiny = torch.finfo(weights.dtype).tiny
    left, chosen = weights + noise, torch.zeros_like(weights)
    for _ in range(kept):
        draw = (left / temperature).softmax(0)
        chosen = chosen + draw
        left = left + (1 - draw).clamp_min(tiny).log()
    return chosen

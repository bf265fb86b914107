"""What the methods of this room share: settings of learned gates, the model in float32, its units, and the claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.settings import Smaller
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.units import Structures
    from slimbench.methods.core.learning.gates import Lagrangian, Pace


@dataclass(frozen=True)
class Learned(TrainingSettings, Method):
    """Weights and gates learn together, in one run.

    Attributes:
        gate_rate: Learning rate of what decides on the units, where `learning_rate` is that of the weights.
    """

    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    steps: int = 60
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup: float = 0.0
    gate_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gate_rate > 0:
            raise ValueError(f"gate_rate must be positive, not {self.gate_rate}")


@dataclass(frozen=True)
class Chosen(Learned):
    """What goes is chosen before the cut, one by one, for a budget.

    Attributes:
        choice: `learned`; or, as a control, `random`: what goes is drawn before the first step, and weights alone learn.
    """

    choice: Literal["learned", "random"] = "learned"


@dataclass(frozen=True)
class Gated(Chosen):
    """The budget of the gates is held by a Lagrangian.

    Attributes:
        multiplier_rate: Learning rate of the multiplier λ₁, of the gap between what is expected to go and what shall.
        square_rate: That of λ₂, of the square of this gap.
        growth: Fraction of the steps in which the target grows from nothing to the whole budget.
    """

    gate_rate: float = 0.25
    multiplier_rate: float = 0.1
    square_rate: float = 10.0
    growth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_rate", "square_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.growth <= 1:
            raise ValueError(f"growth must be above 0 and at most 1, not {self.growth}")

    def pace(self, price: float | None = None) -> Pace:
        """How gates learn."""
        from slimbench.methods.core.learning.gates import Pace

        rates = (value / self.learning_rate for value in (self.gate_rate, self.multiplier_rate, self.square_rate))
        rate, multiplier_rate, square_rate = rates
        return Pace(
            max(1, round(self.growth * self.steps)), rate=rate, multiplier_rate=multiplier_rate, square_rate=square_rate, price=price
        )

    def control(self, gates: Lagrangian, choose: Callable[[], Mapping[str, Tensor]], dense: DenseModel) -> None:
        """Shut the gates that `choose` names for good, if they shall not be learned; see `Lagrangian.fix`."""
        if self.choice == "random":
            gates.fix(choose, self.seed + dense.seed)


@dataclass(frozen=True)
class Priced(Gated):
    """A price on open gates may stand in the place of the budget.

    Attributes:
        price: λ, in nats an open gate, the papers' own setting; None: the budget is held.
    """

    price: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.price is not None and not self.price > 0:
            raise ValueError(f"price must be positive, not {self.price}")
        if self.price is not None and self.choice != "learned":
            raise ValueError("a price has no control: how much goes is not known before")


@dataclass(frozen=True)
class Cut(Smaller, Gated):
    """Units are cut out of the model in the end."""

    produces = EDITED


def load(dense: DenseModel) -> Any:
    """The model as it is trained: parameters in float32, all of which learn."""
    import torch

    return dense.load(dtype=torch.float32).requires_grad_(True)


def save(model: Any, dense: DenseModel, out: Path) -> None:
    """Write the model in the dtype that it had."""
    import torch

    dtype = getattr(torch, dense.dtype)
    model.to(dtype)
    model.config.dtype = dtype
    save_dense(model, out)


def groups_of(model: Any) -> dict[str, Structures]:
    """The groups of heads of all blocks, by the full name of the layer that reads them."""
    from slimbench.methods.core.architecture.units import kinds_of

    return {name: kind for name, kind in kinds_of(model).items() if kind.name == "head_groups"}


def going(ratio: float, groups: int, blocks: int) -> int:
    """How many groups of heads go, at least one.

    Raises:
        Unsupported: None would be left in some block.
    """
    gone = max(1, int(ratio * groups + 0.5))
    if gone > groups - blocks:
        raise Unsupported(f"{gone} of {groups} groups of heads cannot go from {blocks} blocks, each of which keeps one")
    return gone


def learning(model: Any, gates: Lagrangian) -> dict[str, nn.Parameter]:
    """What `train` gets: the weights of a model and its gates."""
    return dict(model.named_parameters()) | gates.parameters


def teacher(settings: TrainingSettings) -> str | None:
    """Whose outputs were learned, in the words of a claim."""
    return "the model that the pipeline began with" if settings.loss == "distillation" else None


def left(kinds: Mapping[str, Structures]) -> dict[str, list[int]]:
    """Units of each kind, block by block."""
    return {f"{of}_by_block": [kind.count for kind in kinds.values() if kind.name == of] for of in ("head_groups", "channels")}


def told(gates: Lagrangian, gone: float) -> dict[str, Any]:
    """What a claim says of gates and of the share of all units that has gone in the end."""
    facts = gates.told()
    return {"gates": facts | {"gone": gone, "difference": abs(gone - facts["expected_gone"])}}


def claim(model: Any, settings: TrainingSettings, details: dict[str, Any]) -> Claim:
    """The claim of an edited model."""
    from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts

    return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), teacher=teacher(settings), details=details)

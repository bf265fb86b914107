"""What the methods of this room share: what is learned, how many structures go, the artefact of merged layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.settings import Adapters, Smaller
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.units import Structures
    from slimbench.methods.core.training import Trained


@dataclass(frozen=True)
class AdapterPruning(Adapters, Smaller, TrainingSettings, Method):
    """Adapters learn while structures go; both are merged into a smaller model of ordinary layers.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes.
        begin: Share of the steps before which nothing goes.
        end: Share of the steps after which all has gone that shall.
    """

    needs = Needs(calibration=True, training=True)
    produces = EDITED
    least_steps = 1000

    steps: int = 60
    loss: Literal["distillation", "nll"] = "nll"
    rank: int = 8
    alpha: float = 16.0
    begin: float = 0.1
    end: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        if (growth := self.growth).begin == growth.end:
            raise ValueError(f"no step of {self.steps} lies between {self.begin} and {self.end} of them")

    @property
    def growth(self) -> Cubic:
        """How much has gone of what shall, 0..1, by steps."""
        return Cubic(0.0, 1.0, round(self.begin * self.steps), round(self.end * self.steps))


def layers_of(kinds: Mapping[str, Structures], model: Any) -> dict[str, nn.Linear]:
    """The layers of some kinds of structures by their full names."""
    wanted = {layer for kind in kinds.values() for layer in (*kind.makes, kind.reads)}
    return {name: layer for name, layer in model.named_modules() if layer in wanted}


def goals(kinds: Mapping[str, Structures], prunable: Collection[str], ratio: float) -> dict[str, int]:
    """How many structures of each prunable kind go, so that a share of the parameters of all kinds does, to less than a channel more.

    Each prunable kind loses the same share, groups of heads to whole ones; what is left of these goes in channels.

    Raises:
        Unsupported: One structure of each kind stays, and all others do not hold so many.
    """
    from slimbench.methods.core.architecture.units import price
    from slimbench.methods.core.budgets import uniform

    def size(names: Collection[str]) -> int:
        return sum(price(kinds[name]) * kinds[name].count for name in names)

    heads, channels = ([name for name in prunable if kinds[name].name == of] for of in ("head_groups", "channels"))
    wanted, left = round(ratio * size(kinds)), 0
    share = wanted / size(prunable) if prunable else 1.0
    gone: dict[str, int] = {}
    for half in (0.5, 0.0):
        gone = {name: min(kinds[name].count - 1, int(share * kinds[name].count + half)) for name in heads}
        left = wanted - sum(count * price(kinds[name]) for name, count in gone.items())
        if left >= 0:
            break
    free = sum(kinds[name].count - 1 for name in channels)
    count = -(-left // price(kinds[channels[0]])) if channels else left
    if count > free:
        raise Unsupported(f"{wanted} parameters cannot go from {len(prunable)} layers of heads and of channels, each of which keeps one")
    if not count:
        return gone | dict.fromkeys(channels, 0)
    sizes = {name: kinds[name].count for name in channels}
    return gone | uniform(sizes, count / sum(sizes.values()))


def estimate(first: Tensor, second: Tensor, of_first: Tensor, of_second: Tensor) -> Tensor:
    """∂L/∂B A + B ∂L/∂A − ∂L/∂B ∂L/∂A, [out, in]: by how much B A falls in a step of rate 1 down the gradients.

    Args:
        first: A [r, in].
        second: B [out, r].
        of_first: ∂L/∂A.
        of_second: ∂L/∂B.
    """
    return of_second @ first + second @ of_first - of_second @ of_first


def finished(
    model: Any, settings: AdapterPruning, gone: Mapping[str, Tensor], done: Trained, dense: DenseModel, out: Path, **told: Any
) -> Claim:
    """Cut structures out of a model into which the adapters are merged, and write it.

    Args:
        gone: Masks [count] by the full name of the layer that reads the structures, and `hidden` [features], if features may have gone.
    """
    from slimbench.methods.core.architecture.units import kinds_of
    from slimbench.methods.pruning.gates import learned
    from slimbench.methods.pruning.gates.stream import stream_of

    before, kinds, gone = model.num_parameters(), kinds_of(model), dict(gone)
    if (features := gone.pop("hidden", None)) is not None:
        told["hidden"] = int((~features).sum())
        if bool(features.any()):
            stream_of(model).cut(model, (~features).nonzero().squeeze(1))
    for name, mask in gone.items():
        if bool(mask.any()):
            kinds[name].cut(model, (~mask).nonzero().squeeze(1))
    learned.save(model, dense, out)
    details = {"parameters_before": before, **learned.left(kinds_of(model)), "rank": settings.rank, **told}
    return done.added_to(learned.claim(model, settings, details))

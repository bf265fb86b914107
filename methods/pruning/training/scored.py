"""What methods of this room share that learn which weights stay: scores get the gradient that the mask would have.

With M the mask that is chosen by scores S, layers compute with W ⊙ M, and the straight-through estimator takes ∂M/∂S for 1:

    ∂L/∂S = ∂L/∂(W ⊙ M) ⊙ W        ∂L/∂W = ∂L/∂(W ⊙ M) ⊙ M

S falls where the loss would fall by a smaller weight, of weights that are pruned too, so that one that was pruned may come back. Masks
are chosen anew after every step, those after the last one are what is stored.

A penalty on the size of the mask is λ R, with the mean of σ(S) of each matrix of scores averaged over the matrices,

    R = mean_m mean σ(S_m)        ∂R/∂S_m = σ(S_m) (1 − σ(S_m)) / (elements of S_m · matrices)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Claim, DenseModel, Method, Needs
from slimbench.methods.core.learning.gradual import Cubic, straight_through
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.masks import check_sparsity, zero_fraction
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class ScoredTraining(TrainingSettings, Method):
    """A method that learns scores of the weights in the linear layers of the blocks.

    Class attributes:
        frozen: The scores alone learn.

    Attributes:
        sparsity: Fraction of what has a score that is pruned at the end, above 0 and below 1.
        begin: Share of the steps after which pruning begins.
        end: Share of the steps after which it has come to its end.
        score_rate: Factor of the learning rate for what the scores are made of.
    """

    accepts: ClassVar[tuple[str, ...]] = DENSE
    needs = Needs(calibration=True, training=True)
    least_steps = 1000
    frozen: ClassVar[bool] = False

    sparsity: float = 0.5
    begin: float = 0.1
    end: float = 0.8
    score_rate: float = 100.0
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        if self.frozen and self.weight_decay:
            raise ValueError(f"weight_decay must be 0 where weights do not learn, not {self.weight_decay}")
        if not self.score_rate > 0:
            raise ValueError(f"score_rate must be positive, not {self.score_rate}")
        if (cubic := self.growth(self.sparsity)).begin == cubic.end:
            raise ValueError(f"no step of {self.steps} lies between {self.begin} and {self.end} of them")

    def growth(self, final: float) -> Cubic:
        """What goes from 0 to its final value, by steps."""
        return Cubic(0.0, final, round(self.begin * self.steps), round(self.end * self.steps))

    @abstractmethod
    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Masks:
        """What is learned beside the model, before the first step.

        Args:
            seed: Of what is drawn.

        Raises:
            Unsupported: The model does not fit the settings.
        """

    def written(self, model: Any, layers: Mapping[str, nn.Linear], masks: Masks, dense: DenseModel, out: Path) -> Claim:
        """Save a model whose pruned weights are zero, and say so."""
        from slimbench.methods.core.learning import trained

        trained.save(model, dense, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction({**layers}), details=masks.told())

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from dataclasses import replace

        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained

        model = trained.load(dense)
        layers = block_linears(model)
        masks = self.masks(model, layers, self.seed + dense.seed)
        learning = {} if self.frozen else dict(model.named_parameters())
        with masked({name: layers[name] for name in masks.weights}, masks):
            done = trained.fit(self, model, {**learning, **masks.parameters}, calibration.ids, dense, masks)
        masks.finish()
        return done.added_to(replace(self.written(model, layers, masks, dense, out), teacher=trained.teacher(self)))


class Masks(Hooks):
    """Masks of weights, chosen anew after each step by scores that learn.

    Attributes:
        weights: W [out, in] by layer.
        rate: Factor of the learning rate for `parameters`; nothing of them decays.
        chosen: Masks by name, true where something goes; what the names are, a class says. Nothing goes in the first step.
    """

    def __init__(self, weights: Mapping[str, Tensor], rate: float) -> None:
        self.weights, self.rate = weights, rate
        self.chosen: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by names that no parameter of the model has."""

    @abstractmethod
    def score(self, layer: str) -> Tensor:
        """S [out, in], with its gradient."""

    @abstractmethod
    def gone(self, layer: str) -> Tensor:
        """1 − M [out, in], boolean."""

    @abstractmethod
    def choose(self, done: int) -> dict[str, Tensor]:
        """The masks after that many steps."""

    def whole(self, layer: str) -> Tensor:
        """W [out, in] without its mask."""
        return self.weights[layer]

    def weight(self, layer: str) -> Tensor:
        """W ⊙ M [out, in], as it is computed with."""
        whole = self.whole(layer)
        return straight_through(whole, (~self.gone(layer)).to(whole.dtype), self.score(layer))

    def told(self) -> dict[str, Any]:
        """Details of the claim, after the last step."""
        return {}

    def finish(self) -> None:
        """Let the weights be W ⊙ M."""
        import torch

        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.whole(name).masked_fill(self.gone(name), 0.0))

    def groups(self) -> Sequence[Group]:
        return (Group(tuple(self.parameters), self.rate, weight_decay=0.0),)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        import torch

        with torch.no_grad():
            self.chosen = self.choose(step + 1)

    def state(self) -> dict[str, Tensor]:
        return dict(self.chosen)

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = next(iter(self.weights.values())).device
        self.chosen = {name: mask.to(device) for name, mask in state.items()}


@dataclass(frozen=True)
class Units:
    """Which weights of a layer have a score in common.

    Attributes:
        scores: The name of the matrix of scores.
        turned: It is that of the transposed weight.
    """

    scores: str
    turned: bool = False


class Scores(Masks):
    """Scores of units, equal tiles of the weights, that begin with 0; the masks are of units.

    Attributes:
        scores: S [rows of tiles, columns of tiles] by name.
        units: By layer.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], units: Mapping[str, Units], rate: float
    ) -> None:
        import torch
        from torch import nn

        super().__init__(weights, rate)
        device = next(iter(weights.values())).device
        self.scores = {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        self.units = units
        self.chosen = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in self.scores.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"scores/{name}": values for name, values in self.scores.items()}

    def score(self, layer: str) -> Tensor:
        return self._spread(self.scores, layer)

    def gone(self, layer: str) -> Tensor:
        return self._spread(self.chosen, layer)

    def penalize(self, strength: float, shares: Mapping[str, Tensor] | None = None) -> None:
        """Add the gradient of λ R to that of the scores.

        Args:
            strength: λ.
            shares: Factors of σ(S) in R, of the shapes of the scores, by name; None: 1.
        """
        import torch

        for name, values in self.scores.items():
            assert values.grad is not None
            passing = torch.sigmoid(values.detach())
            slope = passing * (1 - passing) * (1 if shares is None else shares[name])
            values.grad.add_(slope, alpha=strength / (values.numel() * len(self.scores)))

    def _spread(self, of: Mapping[str, Tensor], layer: str) -> Tensor:
        unit = self.units[layer]
        values = of[unit.scores].T if unit.turned else of[unit.scores]
        for dim, size in enumerate(self.weights[layer].shape):
            if size > values.shape[dim]:
                values = values.repeat_interleave(size // values.shape[dim], dim)
        return values


@contextmanager
def masked(layers: Mapping[str, Any], masks: Masks) -> Iterator[None]:
    """Let linear layers compute with W ⊙ M for a while."""
    from torch.nn.functional import linear

    def product(name: str, layer: nn.Linear, inputs: Tensor) -> Tensor:
        return linear(inputs, masks.weight(name), layer.bias)

    for name, layer in layers.items():
        layer.forward = partial(product, name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward

"""Movement pruning: weights stay that move away from zero while the model learns, not those that are large.

Each weight has a score S that begins with 0 and learns through the mask (`scored`), so that without moments of the optimizer it is

    S = −α Σ_t  ∂L/∂(W ⊙ M)^(t) ⊙ W^(t)

    movement            M: the top v_t of the scores, v falls by the cubic schedule (Sanh et al., arXiv 2005.07683)
    soft movement       M: σ(S) > τ_t, τ rises by the cubic schedule; the loss has λ_t R, λ_t = λ τ_t / τ
    static pruning      W is frozen, all that is learned is the mask (Jiang et al., arXiv 2210.06210), the loss has λ_t R. M: the top
                        v_l of a layer, where the layers of one place in the blocks share v_t by how much of them passes,

                            v_l = v_t · L · r_l / Σ_k r_k        r_l = mean σ(S_l / p)

How many weights pass a threshold nobody knows before. Soft movement never prunes more than are asked for, but then the lowest scores of
all layers, and as many as are asked for when τ has reached its end; the claim says how many would have passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Citation
from slimbench.methods.core.budgets import exact
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.masks import across, choose, lowest
from slimbench.methods.pruning.training.scored import ScoredTraining, Scores, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Movement(ScoredTraining):
    """The weights of the highest scores stay.

    Attributes:
        scope: Among which weights scores are compared: those of a layer, or of all layers.
    """

    name = "movement"
    citation = Citation("Movement pruning", year=2020, arxiv="2005.07683", covers=("pruning/movement-pruning",))

    scope: Literal["layer", "model"] = "layer"

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Top:
        return Top(_weights(layers), self.score_rate, self.growth(self.sparsity), self.scope)


@dataclass(frozen=True)
class SoftMovement(ScoredTraining):
    """The weights stay whose scores pass a threshold.

    Attributes:
        threshold: τ, between 0 and 1/2, with which scores begin.
        penalty: λ.
    """

    name = "soft-movement"
    citation = Citation("Soft movement pruning", year=2020, arxiv="2005.07683")

    score_rate: float = 2000.0
    threshold: float = 0.1
    penalty: float = 400.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 0.5:
            raise ValueError(f"threshold must be between 0 and 0.5, both excluded, not {self.threshold}")
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative, not {self.penalty}")

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Passing:
        weights = _weights(layers)
        shapes, units = _single(weights)
        return Passing(
            weights, shapes, units, self.score_rate, self.growth(self.threshold), self.penalty, self.sparsity, {"weights": [*shapes]}
        )


@dataclass(frozen=True)
class StaticPruning(ScoredTraining):
    """The model does not learn, only which of its weights stay.

    Attributes:
        penalty: λ; λ_t rises with the sparsity.
        temperature: p: the larger, the more alike are the sparsities of the layers.
    """

    name = "static-pruning"
    citation = Citation("SMP", year=2022, arxiv="2210.06210", covers=("pruning/smp-pruning-without-finetuning",))
    frozen = True

    begin: float = 0.0
    penalty: float = 400.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative, not {self.penalty}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Shared:
        from slimbench.methods.formats.architecture.structure import blocks_of

        blocks = [f"{name}." for name in blocks_of(model)]
        places = {name: next(name.removeprefix(block) for block in blocks if name.startswith(block)) for name in layers}
        return Shared(_weights(layers), self.score_rate, self.growth(self.sparsity), self.penalty, self.temperature, places)


class Top(Scores):
    """The lowest scores go.

    Attributes:
        schedule: The share that goes.
        scope: Among which weights scores are compared.
    """

    def __init__(self, weights: Mapping[str, Tensor], rate: float, schedule: Cubic, scope: Literal["layer", "model"]) -> None:
        super().__init__(weights, *_single(weights), rate)
        self.schedule, self.scope = schedule, scope

    def choose(self, done: int) -> dict[str, Tensor]:
        share = self.schedule.at(done)
        if self.scope == "model":
            return across(self.scores, round(share * sum(values.numel() for values in self.scores.values())))
        return {name: choose(values, round(share * values.numel())) for name, values in self.scores.items()}


class Passing(Scores):
    """Units go whose scores do not pass a threshold, but no more than shall, and at the end the lowest, to the exact count.

    Attributes:
        schedule: τ_t.
        penalty: λ.
        sparsity: Share of the units of a kind that goes at the end.
        kinds: Names of the scores that are compared with each other.
        passed: Share of all units that passed in the last step.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        units: Mapping[str, Units],
        rate: float,
        schedule: Cubic,
        penalty: float,
        sparsity: float,
        kinds: Mapping[str, list[str]],
    ) -> None:
        super().__init__(weights, shapes, units, rate)
        self.schedule, self.penalty, self.sparsity, self.kinds = schedule, penalty, sparsity, kinds
        self.passed = 1.0

    def after_backward(self, step: int) -> None:
        self.penalize(self.penalty * self.schedule.at(step) / self.schedule.final)

    def choose(self, done: int) -> dict[str, Tensor]:
        import torch

        stopped = {name: torch.sigmoid(values.detach()) <= self.schedule.at(done) for name, values in self.scores.items()}
        self.passed = 1 - sum(int(mask.sum()) for mask in stopped.values()) / sum(mask.numel() for mask in stopped.values())
        found: dict[str, Tensor] = {}
        for names in self.kinds.values():
            wanted = round(self.sparsity * sum(stopped[name].numel() for name in names))
            settled = done >= self.schedule.end or sum(int(stopped[name].sum()) for name in names) > wanted
            found |= self.weakest(names, wanted) if settled else {name: stopped[name] for name in names}
        return found

    def weakest(self, names: list[str], count: int) -> dict[str, Tensor]:
        """The lowest scores of one kind."""
        return across({name: self.scores[name].detach() for name in names}, count)

    def told(self) -> dict[str, Any]:
        return {"passed_the_threshold": self.passed}

    def state(self) -> dict[str, Tensor]:
        import torch

        return super().state() | {"/passed": torch.tensor(self.passed, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.passed = float(state["/passed"])
        super().load({name: tensor for name, tensor in state.items() if name != "/passed"})


class Shared(Scores):
    """Layers of one place share how much stays by how much of their scores passes.

    Attributes:
        schedule: 1 − v_t.
        penalty: λ.
        temperature: p.
        places: Of each layer in its block.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rate: float,
        schedule: Cubic,
        penalty: float,
        temperature: float,
        places: Mapping[str, str],
    ) -> None:
        super().__init__(weights, *_single(weights), rate)
        self.schedule, self.penalty, self.temperature, self.places = schedule, penalty, temperature, places

    def after_backward(self, step: int) -> None:
        self.penalize(self.penalty * self.schedule.at(step) / self.schedule.final)

    def choose(self, done: int) -> dict[str, Tensor]:
        import torch

        share = self.schedule.at(done)
        found: dict[str, Tensor] = {}
        for place in dict.fromkeys(self.places.values()):
            held = {name: values.detach() for name, values in self.scores.items() if self.places[name] == place}
            passing = {name: float(torch.sigmoid(values.double() / self.temperature).mean()) for name, values in held.items()}
            shares = {name: 1 - (1 - share) * len(held) * value / sum(passing.values()) for name, value in passing.items()}
            sizes = {name: mask.numel() for name, mask in held.items()}
            zeros = exact(shares, sizes, share)
            found |= {name: lowest(values, zeros[name]) for name, values in held.items()}
        return found

    def told(self) -> dict[str, Any]:
        return {"sparsity_by_layer": {name: float(mask.float().mean()) for name, mask in self.chosen.items()}}


def _weights(layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in layers.items()}


def _single(weights: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, int]], dict[str, Units]]:
    """A score for each weight."""
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}, {name: Units(name) for name in weights}

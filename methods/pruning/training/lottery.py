"""Lottery tickets: a mask is what training shows of the weights, which then go back to where they began.

θ₀ are the weights of the dense model. Iterative magnitude pruning (Frankle and Carbin, arXiv 1803.03635; for pretrained models Chen et
al., arXiv 2007.12223) has R rounds; with m = 1 at first, round r

    trains θ₀ ⊙ m,   takes from m the smallest |θ| of all layers together, until   1 − (1 − s)^(r / R)   of the weights are gone,

and rewinds what is left to θ₀, embeddings, biases and gains too. Each round takes the same share, 1 − (1 − s)^(1/R), of what the one
before it left; Chen et al. take 10 % of all weights. Another training of θ₀ ⊙ m follows, which gives the model.

The soup takes one mask from k short runs that all begin at θ₀, on other parts of the text and with other learning rates, where Instant
Soup Pruning (arXiv 2306.10460) takes several, one after the other, from a model that is not rewound. With m_j of run j, which takes the
smallest |θ_j| at the full sparsity, those weights go that the fewest runs keep, of equally many those of the smallest mean |θ_j|:

    Σ_j m_j  +  Σ_j |θ_j| / c        c: a little more than the largest of these sums
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation
from slimbench.methods.core.learning.hooks import Locked
from slimbench.methods.core.masks import across
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.pruning.training.sparse import SparseTraining

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Rewound(SparseTraining):
    """Several trainings, each from θ₀ and with a schedule of the learning rate of its own; the last one is kept. Takes 20 bytes a weight.

    Attributes:
        steps: Of all trainings together.
    """

    least_steps = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(end <= begin for begin, end in pairwise((0, *self.ends, self.steps))):
            raise ValueError(f"{self.steps} steps are too few for {len(self.ends) + 1} trainings")

    @property
    @abstractmethod
    def ends(self) -> tuple[int, ...]:
        """After which steps a training ends, but for the last one."""

    def factor(self, training: int) -> float:
        """Of the learning rate in a training, counted from 0."""
        return 1.0

    def rate(self, step: int) -> float:
        training = bisect_right(self.ends, step)
        begin, end = (0, *self.ends)[training], (*self.ends, self.steps)[training]
        own = TrainingSettings(steps=end - begin, learning_rate=self.learning_rate, schedule=self.schedule, warmup=self.warmup)
        return self.factor(training) * own.rate(step - begin)


@dataclass(frozen=True)
class LotteryTicket(Rewound):
    """Iterative magnitude pruning with rewinding.

    Attributes:
        rounds: R: trainings that end with pruning; steps are divided among them and the last one.
    """

    name = "lottery"
    citation = Citation("Lottery ticket", year=2018, arxiv="1803.03635")

    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        super().__post_init__()

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(self.steps * done // (self.rounds + 1) for done in range(1, self.rounds + 1))

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Ticket:
        return Ticket(weights, {}, whole=parameters, ends=self.ends, sparsity=self.sparsity)


@dataclass(frozen=True)
class Soup(Rewound):
    """A mask by the votes of short runs. Takes 25 bytes a weight.

    Attributes:
        runs: k.
        share: Of the steps, for all runs together; the rest is the training under the mask.
        spread: Learning rate of the last run over that of the first; the others lie between, and the settings' in the middle.
    """

    name = "soup"
    citation = Citation("Instant Soup", year=2023, arxiv="2306.10460")

    runs: int = 4
    share: float = 0.5
    spread: float = 2.0

    def __post_init__(self) -> None:
        if self.runs < 2:
            raise ValueError(f"runs must be at least 2, not {self.runs}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, both excluded, not {self.share}")
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, not {self.spread}")
        super().__post_init__()

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(round(self.share * self.steps * done / self.runs) for done in range(1, self.runs + 1))

    def factor(self, training: int) -> float:
        return float(self.spread ** (training / (self.runs - 1) - 0.5)) if training < self.runs else 1.0

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Votes:
        return Votes(weights, {}, whole=parameters, ends=self.ends, sparsity=self.sparsity)

    def told(self, hooks: Any) -> dict[str, Any]:
        return {"unanimous": hooks.unanimous()}


@dataclass
class Rewinding(Locked):
    """At the end of a training masks are chosen, and all parameters and the optimizer begin anew.

    Attributes:
        whole: All parameters that learn.
        ends: After which steps a training ends.
        sparsity: Share of zeros among the weights in the last training.
        start: θ₀ of all parameters.
    """

    whole: Mapping[str, nn.Parameter] = field(kw_only=True)
    ends: tuple[int, ...] = field(kw_only=True)
    sparsity: float = field(kw_only=True)
    start: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.start = {name: value.detach().clone() for name, value in self.whole.items()}

    @property
    def size(self) -> int:
        """Weights that may go."""
        return sum(value.numel() for value in self.parameters.values())

    @abstractmethod
    def choose(self, training: int) -> dict[str, Tensor]:
        """Masks after a training, counted from 0."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step + 1 in self.ends:
            self.masks = self.choose(self.ends.index(step + 1))
            for name, value in self.whole.items():
                value.detach().copy_(self.start[name])
            optimizer.state.clear()
        super().after_step(step, optimizer)


class Ticket(Rewinding):
    """What a round takes is gone for good."""

    def choose(self, training: int) -> dict[str, Tensor]:
        share = 1 - (1 - self.sparsity) ** ((training + 1) / len(self.ends))
        sizes = {name: value.detach().abs() for name, value in self.parameters.items()}
        for name, mask in self.masks.items():
            sizes[name].masked_fill_(mask, -1.0)
        return across(sizes, round(share * self.size))


class Votes(Rewinding):
    """What each run keeps, and how large its weights are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        import torch

        self.votes = {name: torch.zeros_like(value.detach(), dtype=torch.uint8) for name, value in self.parameters.items()}
        self.magnitudes = {name: torch.zeros_like(value.detach()) for name, value in self.parameters.items()}

    def choose(self, training: int) -> dict[str, Tensor]:
        sizes = {name: value.detach().abs() for name, value in self.parameters.items()}
        zeros = round(self.sparsity * self.size)
        for name, mask in across(sizes, zeros).items():
            self.votes[name] += ~mask
            self.magnitudes[name] += sizes[name]
        if training + 1 < len(self.ends):
            return {}
        top = 1.001 * max(float(values.max()) for values in self.magnitudes.values()) or 1.0
        return across({name: votes + self.magnitudes[name] / top for name, votes in self.votes.items()}, zeros)

    def unanimous(self) -> float:
        """Share of the weights that all runs keep or all take."""
        alike = sum(int(((votes == 0) | (votes == len(self.ends))).sum()) for votes in self.votes.values())
        return alike / self.size

    def state(self) -> dict[str, Tensor]:
        kept = {f"mask/{name}": mask for name, mask in self.masks.items()}
        kept |= {f"votes/{name}": votes for name, votes in self.votes.items()}
        return kept | {f"magnitudes/{name}": values for name, values in self.magnitudes.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "votes": {}, "magnitudes": {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(self.parameters[name].device)
        self.masks, self.votes, self.magnitudes = parts["mask"], parts["votes"], parts["magnitudes"]

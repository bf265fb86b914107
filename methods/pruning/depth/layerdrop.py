"""LayerDrop (arXiv 1909.11556): a shallower model is taken out of one that was trained to do without some of its blocks.

With hidden states h_d behind block d = 1, 2, …, residual connections included, a pass of the training is

    h_d = block_d(h_(d−1))  or, with the probability q,  h_(d−1)

drawn for each block by itself and anew in each pass; blocks that run are not rescaled. Afterwards, at a rate p, the blocks d go with

    d ≡ 0 mod ⌊1/p⌋

q and p are chosen apart: the paper has q = 0.2, and recommends 0.5 for models that get very small. It trains so from the first step on;
here a dense model goes on learning, for far fewer steps. `EveryOther` is the selection alone, of a model that was not trained so.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.pruning.depth.dropping import Dropping


@dataclass(frozen=True)
class Periodic(Dropping):
    """Every ⌊1/p⌋-th block goes."""

    @property
    @abstractmethod
    def share(self) -> float:
        """p"""

    @property
    def period(self) -> int:
        """⌊1/p⌋"""
        return math.floor(1 / self.share + 1e-9)

    def count(self, blocks: int) -> int:
        return blocks // self.period

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        return [number - 1 for number in range(1, blocks + 1) if number % self.period == 0], {}


@dataclass(frozen=True)
class EveryOther(Periodic):
    """The selection of LayerDrop from a model that was not trained for it.

    Attributes:
        rate: p, at most one half: every ⌊1/p⌋-th block goes.
    """

    name = "every-other"
    citation = Citation("LayerDrop", year=2019, arxiv="1909.11556")

    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 0.5:
            raise ValueError(f"rate must be above 0 and at most 0.5, not {self.rate}")

    @property
    def share(self) -> float:
        return self.rate


@dataclass(frozen=True)
class LayerDrop(TrainingSettings, Periodic):
    """All parameters are trained with blocks left out at random, and then blocks go at equal distances.

    Attributes:
        drop_rate: q, at least 0 and below 1.
        pruning_rate: p, at most one half: every ⌊1/p⌋-th block goes.
    """

    name = "layerdrop"
    citation = Citation("LayerDrop", year=2019, arxiv="1909.11556", covers=("pruning/layerdrop",))
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    drop_rate: float = 0.2
    pruning_rate: float = 0.5
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and below 1, not {self.drop_rate}")
        if not 0 < self.pruning_rate <= 0.5:
            raise ValueError(f"pruning_rate must be above 0 and at most 0.5, not {self.pruning_rate}")

    @property
    def share(self) -> float:
        return self.pruning_rate

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Train, then take the blocks out.

        Raises:
            Unsupported: Experts lie in one tensor; their router would need a loss of its own.
        """
        from slimbench.methods.core.learning import trained
        from slimbench.methods.formats.architecture.structure import check_experts

        model = trained.load(dense)
        check_experts(model)
        with left_out(model, self.drop_rate):
            done = trained.fit(self, model, dict(model.named_parameters()), calibration.ids, dense)
        claim = self.shorten(model, calibration, dense)
        trained.save(model, dense, out)
        return done.added_to(replace(claim, teacher=trained.teacher(self)))


@contextmanager
def left_out(model: Any, rate: float) -> Iterator[None]:
    """Leave each block out of each pass, for a while, with a probability, drawn from torch's own random numbers: those of `train`.

    What a block makes is thrown away, so that it gets no gradient; it is computed all the same.
    """
    import torch

    from slimbench.methods.formats.architecture.structure import blocks_of

    def draw(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        if float(torch.rand(())) >= rate:
            return made
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *made[1:]) if isinstance(made, tuple) else entering

    placed = [block.register_forward_hook(draw, with_kwargs=True) for block in blocks_of(model).values()]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()

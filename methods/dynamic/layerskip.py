"""LayerSkip's training (Elhoushi et al., arXiv 2404.16710, §4.1): blocks are left out at random, and every block learns to predict.

Blocks are l = 0, …, L - 1 and updates t = 0, …, T - 1. Each sequence of a batch passes a block by, by itself, with the probability

    p(l, t) = p_max S(t) D(l)                                                       (2)
    D(l)    = e^(l ln 2 / (L - 1)) - 1                                              (3)    0 for the first block, 1 for the last
    S(t)    = 1, or e^(t ln 2 / (T - 1)) - 1                                        (4)    1 where a trained model goes on learning

and blocks that run are not rescaled. Of the states x_l behind block l and the text y, with g the norm and the head of the model,

    J       = Σ_l ẽ(t, l) CE(g(x_l), y)                                             (5)
    ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i)                                       (6)
    e(l)    = e_scale Σ_{i ≤ l} i,   e(L - 1) = L - 1 + e_scale Σ_{i ≤ L - 2} i     (7)

C says which blocks have a loss in an update. `rotational`: every R-th of them, ⌈L / R⌉, and the pattern moves round by one block with each
update; `gradual`: from the last to the first, one more with every T / 2 L updates, all from T / 2 on. The last block always has one, as in
the authors' program. Equation (7) and the T - 1 of (4) were not held against the paper's own text.

What comes out has the shape that it had, so that `self-speculation` and early exits follow it. The paper trains on billions of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class LayerSkip(TrainingSettings, Method):
    """All parameters are trained, with blocks left out and a loss behind many of them.

    Attributes:
        drop_rate: p_max, of the last block, at least 0 and below 1.
        drop_course: S over the updates.
        exit_scale: e_scale, of the losses before the last block, from 0 to 1.
        curriculum: C over the updates.
        every: R of `rotational`.
    """

    name = "layerskip"
    citation = Citation("LayerSkip", year=2024, arxiv="2404.16710", covers=("dynamic/calm-layerskip",))
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    least_steps = 1000

    drop_rate: float = 0.1
    drop_course: Literal["constant", "exponential"] = "constant"
    exit_scale: float = 0.2
    curriculum: Literal["rotational", "gradual"] = "rotational"
    every: int = 8
    loss: Literal["nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and below 1, not {self.drop_rate}")
        if not 0 <= self.exit_scale <= 1:
            raise ValueError(f"exit_scale must be from 0 to 1, not {self.exit_scale}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if shape.num_layers < 2:
            raise Unsupported(f"losses before the last block need two blocks or more, not {shape.num_layers}")

    def drop_rates(self, blocks: int, step: int) -> list[float]:
        """p of each block in an update."""
        course = 1.0 if self.drop_course == "constant" else _rising(step, self.steps)
        return [self.drop_rate * course * _rising(index, blocks) for index in range(blocks)]

    def exit_weights(self, blocks: int, step: int) -> list[float]:
        """ẽ of each block in an update; 0 where it has no loss."""
        last = blocks - 1
        scales = [self.exit_scale * index * (index + 1) / 2 for index in range(last)]
        scales.append(last + self.exit_scale * last * (last - 1) / 2)
        kept = [scale if index == last or self.has_loss(index, blocks, step) else 0.0 for index, scale in enumerate(scales)]
        return [scale / sum(kept) for scale in kept]

    def has_loss(self, index: int, blocks: int, step: int) -> bool:
        """C of a block in an update."""
        if self.curriculum == "gradual":
            return 2 * blocks * step >= self.steps * (blocks - index)
        return (index - step) % blocks % self.every == 0

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Train.

        Raises:
            Unsupported: The model predicts by more than a norm and a head, or its experts lie in one tensor.
        """
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.formats.architecture.structure import blocks_of, check_experts

        model: Any = trained.load(dense)
        check_experts(model)
        check_end(model)
        blocks, course = len(blocks_of(model)), Course(self.steps)
        parameters = dict(model.requires_grad_(True).named_parameters())
        with passed_by(model, lambda: self.drop_rates(blocks, course.step)):
            done = train(self, parameters, self._loss(model, course, dense), cut(calibration.ids, self.length), dense, course)
        trained.save(model, dense, out)
        facts = {"drop_rates": [round(rate, 6) for rate in self.drop_rates(blocks, self.steps - 1)]}
        return done.added_to(Claim(self.produces, details=facts))

    def _loss(self, model: Any, course: Course, dense: DenseModel) -> Any:
        """J; its terms are that of the last block and those of all others together."""
        import torch

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.formats.architecture.structure import blocks_of

        blocks = len(blocks_of(model))

        def loss(ids: Tensor) -> Tensor:
            weights = {index: weight for index, weight in enumerate(self.exit_weights(blocks, course.step)) if weight}
            with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                held = states(model, ids, weights)
                parts = [
                    term("last block" if index == blocks - 1 else "exits", weight * predicted(model, held[index], ids))
                    for index, weight in weights.items()
                ]
            return torch.stack(parts).sum()

        return loss


@dataclass
class Course(Hooks):
    """Which update it is; after the last one the first again, whose loss is then told once more.

    Attributes:
        steps: Updates in all.
        step: That of the next pass.
    """

    steps: int
    step: int = 0

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.step = (step + 1) % self.steps

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"step": torch.tensor(self.step)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])


@contextmanager
def passed_by(model: Any, rates: Callable[[], Sequence[float]]) -> Iterator[None]:
    """Let each sequence pass each block by, for a while, with the probability of the block; drawn from torch's own random numbers.

    What a block makes of a sequence that passes it by is thrown away and gets no gradient; it is computed all the same.
    """
    import torch

    from slimbench.methods.formats.architecture.structure import blocks_of

    def draw(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        passing = torch.rand(len(entering)) < rates()[index]
        if not passing.any():
            return made
        left = entering
        if not passing.all():
            left = torch.where(passing.to(entering.device)[:, None, None], entering, made[0] if isinstance(made, tuple) else made)
        return (left, *made[1:]) if isinstance(made, tuple) else left

    placed = [block.register_forward_hook(partial(draw, index), with_kwargs=True) for index, block in enumerate(blocks_of(model).values())]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


def states(model: Any, ids: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
    """States [sequences, length, hidden] behind some blocks, as the next block gets them."""
    from slimbench.methods.formats.architecture.structure import blocks_of

    held: dict[int, Tensor] = {}

    def hold(index: int, _: Any, __: Any, made: Any) -> None:
        held[index] = made[0] if isinstance(made, tuple) else made

    blocks = list(blocks_of(model).values())
    placed = [blocks[index].register_forward_hook(partial(hold, index)) for index in wanted]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in placed:
            hook.remove()
    return held


def predicted(model: Any, state: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy of a text with what norm and head make of states [sequences, length, hidden], a scalar.

    Logits are computed once more for the gradient, so that only those of one exit are there at a time.
    """
    from torch.utils.checkpoint import checkpoint

    from slimbench.methods.core.losses import cross_entropy

    def end(before: Tensor) -> Tensor:
        return cross_entropy(model.get_output_embeddings()(model.base_model.norm(before)), ids[:, 1:])

    made: Tensor = checkpoint(end, state[:, :-1], use_reentrant=False)
    return made


def check_end(model: Any) -> None:
    """Raise `Unsupported` unless a model predicts by a norm and its head from what its last block makes."""
    if not hasattr(model.base_model, "norm"):
        raise Unsupported(f"losses before the last block are for models built like Llama, not {type(model).__name__}")
    if name := next((name for name in _SCALED if getattr(model.config, name, None) not in (None, 1.0)), None):
        raise Unsupported(f"{type(model).__name__} does more to its logits than a head: {name}")


def _rising(place: int, count: int) -> float:
    """Exponentially from 0 at the first of so many places to 1 at the last."""
    return math.exp(place * math.log(2) / max(1, count - 1)) - 1

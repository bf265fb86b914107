"""SkipLayer: a router before each block decides which tokens run it (Zeng et al., arXiv 2311.15436; `methods.formats.depth.router`).

The routers alone learn, with all weights of the model frozen, on whole texts with the routers in force. Of the state h of a token

    p = σ(⟨w, h⟩ + b)        g = 1[p > θ]        h ← h + g · (block(h) - h)
    loss + c · (mean g - ρ)²                      the mean over tokens and blocks

and the gradient of g is that of p (straight through). All blocks run at first: w is 0, and b lies above the threshold. Late states are many
times as long as early ones, so w is u over the median length of the states before its block, and u learns. The paper trains the whole
model with the routers, from scratch; the form of router and price is assumed here. Which tokens skip comes out of the text: records
hold the blocks that ran. Claimed is what holds on any text (`Router.runs`): a router with w = 0 is open or shut for good, and of others
nothing can be said, since ρ has a price and is no bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.router import Router
from slimbench.methods.formats.policy import Acts
from slimbench.methods.work import Work

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRouter(TrainingSettings, Acts, Method):
    """A learned router for each block.

    Attributes:
        share: ρ, of the blocks that tokens run.
        penalty: c, of shares that differ.
        threshold: θ.
    """

    name = "skip-layer"
    slot = "depth"
    citation = Citation("SkipLayer", year=2023, arxiv="2311.15436")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT

    share: float = 0.75
    penalty: float = 10.0
    threshold: float = 0.5
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1 or not 0 < self.threshold < 1:
            raise ValueError(f"share must lie in (0, 1] and threshold in (0, 1), not {self.share} and {self.threshold}")
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative, not {self.penalty}")

    def policy(self) -> Router:
        return Router(self.threshold)

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.formats.depth import rows

        model: Any = trained.load(dense)
        rows.check(model)
        windows = cut(calibration.ids, self.length)
        gates = Gates(model, self.threshold, windows[: self.batch_size])
        done = train(self, gates.learned, self._loss(model, gates, dense), windows, dense)
        stored = {name: value.to(getattr(torch, dense.dtype)) for name, value in gates.routers().items()}
        policy = replace(self.policy(), routers=stored)
        policies.save(policy, dense, out)
        whole = counts(model)["parameters"] + sum(value.numel() for value in stored.values())
        facts = {"share_by_block": [round(float(share), 4) for share in gates.shares]}
        least, most = policy.runs(dense.shape.num_layers)
        work = Work(blocks=most, fewest_blocks=least)
        return done.added_to(Claim(self.produces, parameters=whole, work=work, teacher=trained.teacher(self), details=facts))

    def _loss(self, model: Any, gates: Gates, dense: DenseModel) -> Any:
        """Puts the gates into the model."""
        import torch

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.training import objective

        plain = objective(self, model, dense)
        gates.put(model)

        def loss(ids: Tensor) -> Tensor:
            text = plain(ids)
            missed = (torch.stack(gates.shares).mean() - self.share).square()
            return term(self.loss, text) + term("share", self.penalty * missed)

        return loss


class Gates:
    """Routers while they learn.

    Args:
        ids: Texts [n, T] of which the lengths of states are taken.

    Attributes:
        learned: u and b by `L.weight` [hidden] and `L.bias` [1] of block L.
        lengths: Median length of the states before each block.
        shares: Mean g of each block in the last pass.
    """

    def __init__(self, model: Any, threshold: float, ids: Tensor) -> None:
        import torch
        from torch.nn import Parameter

        self.threshold, self.lengths = threshold, lengths(model, ids)
        self.shares: list[Tensor] = [torch.ones(())] * len(self.lengths)
        width, above = model.get_input_embeddings().embedding_dim, math.log(threshold / (1 - threshold)) + 1
        self.learned: dict[str, nn.Parameter] = {}
        for index in range(len(self.lengths)):
            self.learned[f"{index}.weight"] = Parameter(torch.zeros(width, device=model.device))
            self.learned[f"{index}.bias"] = Parameter(torch.full((1,), above, device=model.device))

    def routers(self) -> dict[str, Tensor]:
        """w and b of each block, as the policy has them."""
        found = {name: value.detach() for name, value in self.learned.items()}
        return found | {f"{index}.weight": found[f"{index}.weight"] / length for index, length in enumerate(self.lengths)}

    def put(self, model: Any) -> None:
        """Let each block of a model do as its gate says, for all tokens at once."""
        from slimbench.methods.formats.architecture.structure import blocks_of

        for index, block in enumerate(blocks_of(model).values()):
            block.register_forward_hook(partial(self._gate, index), with_kwargs=True)

    def _gate(self, index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        product = (hidden.float() / self.lengths[index]) @ self.learned[f"{index}.weight"]
        opened = (product + self.learned[f"{index}.bias"]).sigmoid()
        gate = (opened > self.threshold).float() + (opened - opened.detach())
        self.shares[index] = gate.mean()
        return hidden + gate[..., None].to(made.dtype) * (made - hidden)


def lengths(model: Any, ids: Tensor) -> list[float]:
    """Median length of the states before each block."""
    import torch

    from slimbench.methods.formats.architecture.structure import blocks_of

    found: list[float] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        found.append(float(hidden.float().norm(dim=-1).median()))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks_of(model).values()]
    try:
        with torch.no_grad():
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found

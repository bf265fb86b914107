"""Linear attention put on a model that was trained with softmax (`methods.formats.attention.linear`).

Features that are fixed or drawn are put on as they are. Learned ones are fitted in each layer to the attention as it was
(`methods.core.learning.transfer`), which is LoLCATs' first step. Its second, low-rank adapters of the whole model that learn with this
attention in force, is the method `lora` behind it in a pipeline.
`hedgehog` and `t2r` have LoLCATs' loss of outputs too: Hedgehog's own is the cross entropy of weights, and T2R learns its features with the
whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.core.learning.transfer import AttentionTransfer, Named
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.linear import Linear
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


_OPEN = 0.1
"""σ(g) at first."""
_FIRST_HELD = 256
"""Tokens behind which claims of a further token are first held against what that takes (`harness.measure.claims`)."""


@dataclass(frozen=True)
class LinearAttention(PolicyMethod):
    """Features that are there from the start.

    Attributes:
        feature: `elu`: Linear Transformer; `efficient`: Efficient Attention, causal.
    """

    name = "linear-attention"
    slot = "attention"
    citation = Citation("Linear Transformer", year=2020, arxiv="2006.16236", covers=("compact/linear-transformer",))

    feature: Literal["elu", "efficient"] = "elu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature == "efficient":
            cited = Citation("Efficient Attention", year=2018, arxiv="1812.01243", covers=("compact/efficient-attention",))
            object.__setattr__(self, "citation", cited)

    def policy(self, seed: int = 0) -> Policy:
        return Linear(self.feature)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"cache_bytes_per_token": 0.0}


@dataclass(frozen=True)
class Performer(PolicyMethod):
    """Random features of the softmax kernel.

    Attributes:
        feature: `positive`: FAVOR+; `fourier`: sines and cosines, whose weights may be below 0.
        features: Number m of directions.
        seed: Of their draw.
    """

    name = "performer"
    slot = "attention"
    citation = Citation("Performer", year=2020, arxiv="2009.14794", covers=("compact/performer",))
    draws = True

    feature: Literal["positive", "fourier"] = "positive"
    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()
        if self.feature == "fourier":
            cited = Citation("Random features for large-scale kernel machines", year=2007, covers=("compact/random-fourier-features",))
            object.__setattr__(self, "citation", cited)

    def policy(self, seed: int = 0) -> Policy:
        return Linear(self.feature, features=self.features, seed=self.seed + seed)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"cache_bytes_per_token": 0.0}


@dataclass(frozen=True)
class LearnedLinear(AttentionTransfer):
    """Features that are fitted to the softmax attention of each layer, beside a window that stays exact.

    Attributes:
        feature: `hedgehog`: softmax over channels of W x and -W x, Hedgehog's, with a window LoLCATs'; `relu`: T2R's.
        window: Newest tokens that are attended to exactly; 0: none.
    """

    name = "linear-learned"
    citation = Citation("LoLCATs", year=2024, arxiv="2410.10254")
    brings = "maps"

    feature: Literal["hedgehog", "relu"] = "hedgehog"
    window: int = 64
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window >= self.length:
            raise ValueError(f"window must be below the length of {self.length} tokens, or no feature is learned, not {self.window}")
        if self.feature == "relu":
            object.__setattr__(self, "citation", Citation("T2R", year=2021, arxiv="2103.13076"))
        elif not self.window:
            object.__setattr__(self, "citation", Citation("Hedgehog", year=2024, arxiv="2402.04347"))

    def policy(self) -> Linear:
        return Linear(self.feature, self.window)

    def begin(self, model: Any, ids: Tensor) -> tuple[Named, Named]:
        """Maps of each layer and head begin as the identity without a bias, the weight of the window as in LoLCATs."""
        import torch

        from slimbench.methods.formats.attention.operators.interface import attentions

        made: Named = {}
        for module in attentions(model):
            heads, width = module.q_proj.out_features // module.head_dim, module.head_dim
            for which in ("query", "key"):
                made[f"{module.layer_idx}.{which}"] = torch.eye(width).repeat(heads, 1, 1).to(model.device)
                if self.feature == "relu":
                    made[f"{module.layer_idx}.{which}_bias"] = torch.zeros(heads, width, device=model.device)
            if self.window:
                made[f"{module.layer_idx}.gate"] = torch.full((heads,), _OPEN, device=model.device).logit()
        return {}, made

    def cache_numbers(self, model: Any) -> int | None:
        """None where no token has left the window by then, and there is no state yet."""
        return 0 if self.window < _FIRST_HELD else None

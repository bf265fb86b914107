"""Linear attention put on a model that was trained with softmax (`methods.formats.attention.linear`).

Features that are fixed or drawn are put on as they are. Learned ones are fitted in each layer to the attention as it was
(`methods.core.learning.transfer`), which is LoLCATs' first step; low-rank adapters of the whole model, its second, are not learned here.
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


@dataclass(frozen=True)
class LinearAttention(PolicyMethod):
    """Features that are there from the start.

    Attributes:
        feature: `elu`: Linear Transformer; `efficient`: Efficient Attention, causal.
    """

    name = "linear-attention"
    citation = Citation("Linear Transformer", year=2020, arxiv="2006.16236")

    feature: Literal["elu", "efficient"] = "elu"

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
    citation = Citation("Performer", year=2020, arxiv="2009.14794", covers=("compact/performer", "compact/random-fourier-features"))
    draws = True

    feature: Literal["positive", "fourier"] = "positive"
    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Linear(self.feature, features=self.features, seed=self.seed + seed)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"cache_bytes_per_token": 0.0}


@dataclass(frozen=True)
class LearnedLinear(AttentionTransfer):
    """Features that are fitted to the softmax attention of each layer, beside a window that stays exact.

    Attributes:
        feature: `hedgehog`: softmax over channels of W x and -W x; `relu`: T2R.
        window: Newest tokens that are attended to exactly; 0: none.
    """

    name = "linear-learned"
    citation = Citation("LoLCATs", year=2024, arxiv="2410.10254")
    brings = "maps"

    feature: Literal["hedgehog", "relu"] = "hedgehog"
    window: int = 64
    learning_rate: float = 1e-2

    def policy(self) -> Linear:
        return Linear(self.feature, self.window)

    def begin(self, model: Any, ids: Tensor) -> tuple[Named, Named]:
        """Maps of each layer and head begin as the identity, gates half open."""
        import torch

        from slimbench.methods.formats.attention.operators.interface import attentions

        made: Named = {}
        for module in attentions(model):
            heads, width = module.q_proj.out_features // module.head_dim, module.head_dim
            for which in ("query", "key"):
                made[f"{module.layer_idx}.{which}"] = torch.eye(width).repeat(heads, 1, 1).to(model.device)
            if self.window:
                made[f"{module.layer_idx}.gate"] = torch.zeros(heads, device=model.device)
        return {}, made

    def cache_numbers(self, model: Any) -> int:
        return 0

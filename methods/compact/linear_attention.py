"""Linear attention put on a model that was trained with softmax (`methods.formats.attention.linear`).

Features that are fixed or drawn are put on as they are. Learned ones are fitted by attention transfer: in every layer, with all weights of
the model frozen, the result of the linear attention is brought near that of the softmax attention on the same queries, keys and values,

    Σ_layers mean ‖ŷ - y‖²        over heads, positions and channels        LoLCATs (arXiv 2410.10254), eq. 5

so that what a layer learns depends on no other layer. LoLCATs follows with low-rank adapters of the whole model, which is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.linear import Linear
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor, nn


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
class LearnedLinear(TrainingSettings, Method):
    """Features that are fitted to the softmax attention of each layer, beside a window that stays exact.

    Attributes:
        feature: `hedgehog`: softmax over channels of W x and -W x; `relu`: T2R.
        window: Newest tokens that are attended to exactly; 0: none.
    """

    name = "linear-learned"
    citation = Citation("LoLCATs", year=2024, arxiv="2410.10254")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT

    feature: Literal["hedgehog", "relu"] = "hedgehog"
    window: int = 64
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self) -> Linear:
        return Linear(self.feature, self.window)

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.formats.attention.operators.interface import attentions

        model: Any = trained.load(dense)
        parameters = start(self, attentions(model), dense)
        done = train(self, parameters, self._loss(model, parameters), cut(calibration.ids, self.length), dense)
        stored = {name: value.detach().to(getattr(torch, dense.dtype)) for name, value in parameters.items()}
        policies.save(replace(self.policy(), maps=stored), dense, out)
        size = sum(value.numel() for value in stored.values())
        whole = counts(model)["parameters"] + size
        details = {"feature_parameters": size}
        said = Claim(self.produces, parameters=whole, cache_bytes_per_token=0.0, teacher="the model itself", details=details)
        return done.added_to(said)

    def _loss(self, model: Any, parameters: Mapping[str, nn.Parameter]) -> Any:
        """Squared error of the results of all layers."""
        import torch

        from slimbench.methods.core.learning.states import attention_states
        from slimbench.methods.formats.attention.operators.interface import attention, attentions

        layers = [module.layer_idx for module in attentions(model)]

        def loss(ids: Tensor) -> Tensor:
            with torch.no_grad(), attention_states(model, layers) as states:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            errors = []
            for layer in layers:
                query, key, value = (part[layer] for part in (states.queries, states.keys, states.values))
                wanted = attention(query, key, value, query.shape[-1] ** -0.5)
                errors.append((self.attended(layer, parameters, query, key, value) - wanted).square().mean())
            return torch.stack(errors).sum()

        return loss

    def attended(self, layer: int, parameters: Mapping[str, nn.Parameter], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result of a layer's linear attention [B, H, T, D] with the maps as they are now; queries and keys are rotated."""
        from slimbench.methods.formats.attention.operators.linear import LinearOperator, Unturned

        own = {name.partition(".")[2]: part for name, part in parameters.items() if name.partition(".")[0] == str(layer)}
        operator = LinearOperator(Unturned(), query.shape[-1] ** -0.5, self.feature, self.window, (1, 0), own)
        found: Tensor = operator(query, key, value, None)
        return found


def start(method: LearnedLinear, layers: list[Any], dense: DenseModel) -> dict[str, nn.Parameter]:
    """Maps of each layer and head begin as the identity, gates half open."""
    import torch
    from torch.nn import Parameter

    made: dict[str, nn.Parameter] = {}
    for module in layers:
        heads, width = module.q_proj.out_features // module.head_dim, module.head_dim
        for which in ("query", "key"):
            made[f"{module.layer_idx}.{which}"] = Parameter(torch.eye(width).repeat(heads, 1, 1).to(dense.device))
        if method.window:
            made[f"{module.layer_idx}.gate"] = Parameter(torch.zeros(heads, device=dense.device))
    return made

"""Adaptively sparse attention put on a model that was trained with softmax (Correia et al., arXiv 1909.00015).

The α of each head alone learn, α = 1 + σ(a), with all weights of the model frozen. They learn from the text: a distribution of the model
itself, whose weights are softmaxes, would lead all of them back to 1. The paper trains the whole model with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.entmax import Entmax
from slimbench.methods.formats.policy import Acts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class EntmaxAttention(TrainingSettings, Acts, Method):
    """A learned α for each head (`methods.formats.attention.entmax`).

    Attributes:
        start: Where each α begins; between 1, the softmax, and 2.
    """

    name = "entmax"
    slot = "attention"
    citation = Citation("Adaptively Sparse Transformers", year=2019, arxiv="1909.00015")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT
    least_steps = 1000

    start: float = 1.25
    length: int = 512
    learning_rate: float = 0.05
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.start < 2:
            raise ValueError(f"start must lie between 1 and 2, not {self.start}")

    def policy(self) -> Entmax:
        return Entmax()

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.hooks import Group, Hooks
        from slimbench.methods.core.training import cut, objective, train

        class Free(Hooks):
            def groups(self) -> tuple[Group, ...]:
                return (Group(tuple(raw), free=True),)

        model: Any = trained.load(dense)
        whole = counts(model)["parameters"]
        raw = put(model, self.start)
        done = train(self, raw, objective(self, model, dense), cut(calibration.ids, self.length), dense, Free())
        stored = alphas(model)
        policies.save(replace(Entmax(), alphas=stored), dense, out)
        size = sum(alpha.numel() for alpha in stored.values())
        mean = sum(float(alpha.sum()) for alpha in stored.values()) / size
        claim = Claim(self.produces, parameters=whole + size, teacher=trained.teacher(self), details={"alpha_mean": mean})
        return done.added_to(claim)


def put(model: Any, start: float) -> dict[str, nn.Parameter]:
    """Let each head of a model attend by entmax, and return what learns, a by `L.alpha`."""
    import torch
    from torch.nn.utils.parametrize import register_parametrization

    from slimbench.methods.formats.attention.operators.entmax import Open
    from slimbench.methods.formats.attention.operators.interface import attentions

    heads = {module.layer_idx: module.q_proj.out_features // module.head_dim for module in attentions(model)}
    Entmax({f"{layer}.alpha": torch.full((count,), start, device=model.device) for layer, count in heads.items()}).install(model)
    raw: dict[str, nn.Parameter] = {}
    for module in attentions(model):
        register_parametrization(module.operator, "alpha", Open())
        raw[f"{module.layer_idx}.alpha"] = module.operator.parametrizations.alpha.original.requires_grad_(True)
    return raw


def alphas(model: Any) -> dict[str, Tensor]:
    """α of each layer as they are now."""
    from slimbench.methods.formats.attention.operators.interface import attentions

    return {f"{module.layer_idx}.alpha": module.operator.alpha.detach().cpu() for module in attentions(model)}

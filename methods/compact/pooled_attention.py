"""Attention to summaries of earlier parts of a text (`methods.formats.attention.pooled`), put on a model that was trained without them.

Combiner and BP-Transformer are put on as they are. The projections of Linformer are fitted by attention transfer, as in
`methods.compact.linear_attention`: in every layer, with all weights of the model frozen, the result of the attention with summaries is
brought near that of the base on the same queries, keys and values,

    Σ_layers mean ‖ŷ - y‖²        over heads, positions and channels

beginning with projections that average neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.pooled import Pooled
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.formats.attention.operators.interface import Operator


@dataclass(frozen=True)
class Combiner(PolicyMethod):
    """Combiner-Fixed: one's own block, and an expectation over each block before.

    Attributes:
        block: Tokens of a block, of the order of the square root of the length.
    """

    name = "combiner"
    citation = Citation("Combiner", year=2021, arxiv="2107.05768")

    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Pooled("combiner", self.block)


@dataclass(frozen=True)
class BPTransformer(PolicyMethod):
    """BP-Transformer: spans of tokens that are the longer the farther back they are.

    Attributes:
        spans: k, how many there are of each length.
    """

    name = "bp-transformer"
    citation = Citation("BP-Transformer", year=2019, arxiv="1911.04070")

    spans: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Pooled("spans", self.spans)


@dataclass(frozen=True)
class Linformer(TrainingSettings, Method):
    """Linformer, block by block: a few projected keys and values in place of those of a whole block.

    Attributes:
        block: Tokens of a block.
        summaries: r, what is left of it.
    """

    name = "linformer"
    citation = Citation("Linformer", year=2020, arxiv="2006.04768")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT

    block: int = 32
    summaries: int = 8
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()
        if self.length <= self.block:
            raise ValueError(f"length must exceed the block of {self.block}, behind which alone there are summaries, not {self.length}")

    def policy(self) -> Pooled:
        return Pooled("projection", self.block, self.summaries)

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train

        model: Any = trained.load(dense)
        size = counts(model)["parameters"]
        operators = exact_operators(model, self.policy())
        parameters = start(self, list(operators), dense)
        done = train(self, parameters, self._loss(model, operators, parameters), cut(calibration.ids, self.length), dense)
        stored = {name: value.detach().to(getattr(torch, dense.dtype)) for name, value in parameters.items()}
        policies.save(replace(self.policy(), weights=stored), dense, out)
        added = sum(value.numel() for value in stored.values())
        said = Claim(self.produces, parameters=size + added, teacher="the model itself", details={"projection_parameters": added})
        return done.added_to(said)

    def _loss(self, model: Any, operators: Mapping[int, Operator], parameters: Mapping[str, nn.Parameter]) -> Callable[[Tensor], Tensor]:
        """Squared error of the results of all layers."""
        import torch

        shown: dict[int, tuple[Tensor, ...]] = {}
        for layer, operator in operators.items():
            operator.register_forward_hook(lambda _, given, result, layer=layer: shown.update({layer: (*given[:3], result)}))

        def loss(ids: Tensor) -> Tensor:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            errors = []
            for layer, operator in operators.items():
                *states, wanted = shown[layer]
                errors.append((self.attended(layer, operator, parameters, *states) - wanted).square().mean())
            return torch.stack(errors).sum()

        return loss

    def attended(self, layer: int, exact: Operator, parameters: Mapping[str, nn.Parameter], *states: Tensor) -> Tensor:
        """The result of a layer's attention [B, H, T, D] with the projections as they are now; queries and keys are not rotated."""
        from slimbench.methods.formats.attention.operators.pooled import BlockOperator

        own = {name.partition(".")[2]: part for name, part in parameters.items() if name.partition(".")[0] == str(layer)}
        operator = BlockOperator(exact.rotary, exact.scaling, "projection", (self.block, self.summaries), own)
        found: Tensor = operator(*states, None)
        return found


def exact_operators(model: Any, policy: Pooled) -> dict[int, Operator]:
    """Put a policy that leaves everything exact on a model: each layer then computes as before, in an operator that sees its states."""
    from slimbench.methods.formats.attention.operators.interface import attentions

    policy.neutral().install(model)
    return {module.layer_idx: module.operator for module in attentions(model)}


def start(method: Linformer, layers: list[int], dense: DenseModel) -> dict[str, nn.Parameter]:
    """Projections of each layer that average neighbours."""
    import torch
    from torch.nn import Parameter

    stretch = method.block // method.summaries
    mean = (torch.eye(method.summaries) / stretch).repeat_interleave(stretch, 1).to(dense.device)
    return {f"{layer}.{which}": Parameter(mean.clone()) for layer in layers for which in ("keys", "values")}

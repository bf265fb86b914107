"""Adaptive attention span put on a model that was trained without one (Sukhbaatar et al., arXiv 1905.07799).

The spans alone learn, one for each head of queries, with all weights of the model frozen and the spans in force:

    loss + λ Σ_layers mean z        0 ≤ z ≤ the length of the texts, after each step        §2.2, eq. 6

with the mean over the heads of a layer. A span moves where a head has use for tokens of its ramp, so all of them start in the middle of the
texts. Where a ramp goes beyond the texts in the end, nothing in them told where the span ends: such a head gets the longest one. The paper
trains the whole model with the spans, from 0 and over as many tokens as the longest has. Adam counts in tokens here: the learning rate is
about how far a span moves in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.span import Span
from slimbench.methods.formats.policy import Acts
from slimbench.methods.work import Work

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class AdaptiveSpan(TrainingSettings, Acts, Method):
    """A learned span for each head (`methods.formats.attention.span`).

    Attributes:
        ramp: Tokens in which a span ends.
        price: λ, of a token of the mean span of a layer. The default is the paper's for texts of its length: spans as long as the texts
            cost a sixtieth of a nat in each layer.
        start: Where spans begin, as a share of the length of the texts.
        longest: Of a head that has use for all that the texts show it; the paper's is 8,192.
        learning_rate: In tokens.
    """

    name = "adaptive-span"
    slot = "attention"
    citation = Citation("Adaptive Attention Span", year=2019, arxiv="1905.07799")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT
    least_steps = 1000

    ramp: int = 32
    price: float = 3e-5
    start: float = 0.5
    longest: int = 2048
    length: int = 512
    learning_rate: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()
        if self.price < 0 or not 0 <= self.start <= 1:
            raise ValueError(f"price must not be negative and start lie in [0, 1], not {self.price} and {self.start}")
        if self.longest < self.length:
            raise ValueError(f"longest must be at least the length of {self.length} tokens, not {self.longest}")

    def policy(self) -> Span:
        return Span(self.ramp)

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.formats.attention.operators.span import reached

        model: Any = trained.load(dense)
        windows = cut(calibration.ids, self.length)
        spans = start(model, self.start * windows.shape[1])
        replace(self.policy(), spans=spans).install(model)
        done = train(self, spans, self._loss(model, spans, dense), windows, dense, Bounded(spans, windows.shape[1]))
        stored = {name: self.told(span.detach(), windows.shape[1]).cpu() for name, span in spans.items()}
        policies.save(replace(self.policy(), spans=stored), dense, out)
        kept = [reached(span, self.ramp) for span in stored.values()]
        mean = sum(float(span.mean()) for span in stored.values()) / len(stored)
        endless = sum(int((span == self.longest).sum()) for span in stored.values())
        claim = Claim(
            self.produces,
            parameters=counts(model)["parameters"],
            work=Work(cache_tokens=max(kept)),
            teacher=trained.teacher(self),
            details={"span_mean": mean, "longest_spans": endless, "tokens_kept": kept},
        )
        return done.added_to(claim)

    def told(self, span: Tensor, length: int) -> Tensor:
        """Spans that were learned from texts of some length, as they are stored: the longest one where the ramp goes beyond the texts."""
        return span.masked_fill(span + self.ramp > length, self.longest)

    def _loss(self, model: Any, spans: Mapping[str, nn.Parameter], dense: DenseModel) -> Any:
        import torch

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.training import objective

        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            price = self.price * torch.stack([span.mean() for span in spans.values()]).sum()
            return term(self.loss, plain(ids)) + term("price", price)

        return loss


@dataclass
class Bounded(Hooks):
    """Spans stay between 0 and the length of the texts.

    Attributes:
        spans: By the names that `train` gets.
        longest: That length.
    """

    spans: Mapping[str, nn.Parameter]
    longest: int

    def groups(self) -> Sequence[Group]:
        return (Group(tuple(self.spans), free=True),)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for span in self.spans.values():
            span.detach().clamp_(0, self.longest)


def start(model: Any, length: float) -> dict[str, nn.Parameter]:
    """Equal spans of all heads, float32."""
    import torch

    from slimbench.methods.formats.attention.operators.interface import attentions

    made: dict[str, nn.Parameter] = {}
    for module in attentions(model):
        heads = module.q_proj.out_features // module.head_dim
        made[f"{module.layer_idx}.span"] = torch.nn.Parameter(torch.full((heads,), float(length), device=model.device))
    return made

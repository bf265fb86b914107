"""Adapters that are made otherwise than by full matrices of their own (`methods.peft.bottleneck`).

    SparseAdapter    large adapters whose weights of the lowest |w ∂L/∂w| are zero from the start on (SNIP; arXiv 2210.04284)
    Compacter        W_down = Σ_i A_i ⊗ (s_i t_iᵀ), W_up likewise, i = 1 … n; A_i [n, n] is shared by all of them (arXiv 2106.04647)
    AdapterFusion    x + Σ_n s_n V z_n,  s = softmax_n (Q x · K z_n),  z_n what adapter n adds to x; behind the MLP (arXiv 2005.00247)

The gradient of SparseAdapter is that of the sum over some batches; scores of all adapters are compared. Its W_up begins near zero and not
at zero, where no weight would have a score. Compacter is stored as the full matrices that it equals. AdapterFusion trains an adapter on
each part of the text by itself, and then Q, K and V alone on the whole text; V begins as 1 on the diagonal and 10⁻⁶ beside it, and the
loss has 0.01 ‖V − I‖² for each, as in the authors' program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.masks import across, check_sparsity
from slimbench.methods.peft.bottleneck import NAME, Bottlenecks, begin, insert, norms, sublayers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slimbench.methods.core.training import Loss, Trained

_RULE = 0.1  # with it W_down begins about as large as that of a full adapter; the authors' program has 10⁻⁴
_QUERY = 0.02
_ASIDE = 1e-6


@dataclass(frozen=True)
class SparseAdapter(Bottlenecks):
    """Adapters behind attention and MLP of which few weights are left; they lie as zeros in dense storage.

    Attributes:
        reduction: Features of a hidden state for each of an adapter's bottleneck: with three quarters gone, 4 leaves what 16 has.
        sparsity: Fraction of the weights of all adapters that is zero.
        batches: Of the text, whose gradient gives the scores.
    """

    name = "sparse-adapter"
    citation = Citation("SparseAdapter", year=2022, arxiv="2210.04284", covers=("peft/sparseadapter",))

    reduction: int = 4
    sparsity: float = 0.75
    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)
        if self.batches < 1:
            raise ValueError(f"batches must be at least 1, not {self.batches}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.hooks import Locked
        from slimbench.methods.core.training import cut, objective, train

        model: Any = trained.load(dense)
        adapters = insert(model, {place: {"width": width, "size": self.size(width)} for place, width in sublayers(model).items()})
        generator, parameters = self.generator(dense), dict[str, Any]()
        for place, adapter in adapters.items():
            begin(adapter, generator, near=True)
            parameters |= {f"{place}.{NAME}.{name}": value.requires_grad_(True) for name, value in adapter.named_parameters()}
        weights = {name: value for name, value in parameters.items() if value.dim() == 2}
        loss, windows = objective(self, model, dense), cut(calibration.ids, self.length)
        masks = self.masks(weights, loss, windows, dense)
        for name, mask in masks.items():
            weights[name].detach().masked_fill_(mask, 0.0)
        locked = Locked(weights, masks)
        done = train(self, parameters, loss, windows, dense, locked)
        done = replace(done, parameters=done.parameters - locked.count)
        trained.save(model, dense, out)
        facts = {"adapters": len(adapters), "adapter_sparsity": locked.count / sum(value.numel() for value in weights.values())}
        return done.added_to(Claim(EDITED, **counts(model), teacher=trained.teacher(self), details=facts))

    def masks(self, weights: Mapping[str, nn.Parameter], loss: Loss, windows: Tensor, dense: DenseModel) -> dict[str, Tensor]:
        """The weights that go, as masks by name: exactly so many of all, the lowest |w ∂L/∂w|."""
        import torch

        from slimbench.methods.core.training import batch

        values, settings = list(weights.values()), replace(self, seed=self.seed + dense.seed)
        sums = [torch.zeros_like(value) for value in values]
        for step in range(self.batches):
            gradients = torch.autograd.grad(loss(batch(windows, settings, step).to(dense.device)), values)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        scores = {name: (value.detach() * total).abs() for (name, value), total in zip(weights.items(), sums, strict=True)}
        return across(scores, round(self.sparsity * sum(value.numel() for value in values)))


@dataclass(frozen=True)
class Compacter(Bottlenecks):
    """Adapters behind attention and MLP made of few numbers, and the norms of the blocks; stored, and run, as full matrices.

    Attributes:
        reduction: Features of a hidden state for each of an adapter's bottleneck, whose size is a multiple of n.
        terms: n: products that are added up, and rows and columns of a shared matrix; must divide the hidden size.
    """

    name = "compacter"
    citation = Citation("Compacter", year=2021, arxiv="2106.04647", covers=("peft/compacter",))

    reduction: int = 32
    terms: int = 4
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, not {self.terms}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        self.size(shape.hidden_size)

    def size(self, width: int) -> int:
        """Features of a bottleneck behind so many. Raises `Unsupported` if these are no multiple of the terms."""
        if width % self.terms:
            raise Unsupported(f"{self.terms} terms do not divide the {width} features of a hidden state")
        return max(self.terms, width // self.reduction // self.terms * self.terms)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch
        from torch.nn import functional

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.adapters import computing

        model: Any = trained.load(dense)
        adapters = insert(model, {place: {"width": width, "size": self.size(width)} for place, width in sublayers(model).items()})
        factors = self.start(adapters, self.generator(dense), dense)
        biases = {f"{place}.{side}.bias": getattr(adapter, side).bias for place, adapter in adapters.items() for side in ("down", "up")}

        def weight(place: str, side: str) -> Tensor:
            return kronecker(factors["rule"], factors[f"{place}.{side}.left"], factors[f"{place}.{side}.right"])

        def product(place: str, adapter: Any, x: Tensor) -> Tensor:
            inside = adapter.activation(functional.linear(x, weight(place, "down"), adapter.down.bias))
            return x + functional.linear(inside, weight(place, "up"), adapter.up.bias)

        with computing(adapters, product):
            done = trained.fit(self, model, {**factors, **biases, **norms(model)}, calibration.ids, dense)
        with torch.no_grad():
            for place, adapter in adapters.items():
                for side in ("down", "up"):
                    getattr(adapter, side).weight.copy_(weight(place, side))
        trained.save(model, dense, out)
        facts = {"adapters": len(adapters), "compacter_parameters": sum(value.numel() for value in (*factors.values(), *biases.values()))}
        return done.added_to(Claim(EDITED, **counts(model), teacher=trained.teacher(self), details=facts))

    def start(self, adapters: Mapping[str, Any], generator: torch.Generator, dense: DenseModel) -> dict[str, nn.Parameter]:
        """A [n, n, n], and of each layer s [n, out / n, 1] and t [n, 1, in / n], at first; s of W_up is zero, as are biases."""
        import torch
        from torch.nn import Parameter

        n = self.terms
        made = {"rule": _RULE * torch.randn(n, n, n, generator=generator)}
        for place, adapter in adapters.items():
            for side in ("down", "up"):
                layer = getattr(adapter, side)
                layer.bias.detach().zero_()
                for part, shape in (("left", (n, layer.out_features // n, 1)), ("right", (n, 1, layer.in_features // n))):
                    zero = (side, part) == ("up", "left")
                    bound = 0.0 if zero else (6 / (shape[1] + shape[2])) ** 0.5
                    made[f"{place}.{side}.{part}"] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return {name: Parameter(value.to(dense.device)) for name, value in made.items()}


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_i A_i ⊗ (s_i t_iᵀ) [n · a, n · b] of A [n, n, n], s [n, a, 1] and t [n, 1, b]."""
    import torch

    return torch.einsum("ipq,iab->paqb", rule, left @ right).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class AdapterFusion(Bottlenecks):
    """Adapters behind the MLP of each block, one for each part of the text in order, and attention over them; the rest stays.

    Attributes:
        adapters: Of each block, and parts of the text; each is trained for all steps, and so is the attention.
        value_decay: Weight of ‖V − I‖².
    """

    name = "adapterfusion"
    citation = Citation("AdapterFusion", year=2020, arxiv="2005.00247", covers=("peft/adapterdrop-adapterfusion",))

    adapters: int = 2
    value_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters < 2:
            raise ValueError(f"adapters must be at least 2, not {self.adapters}")
        if not self.value_decay >= 0:
            raise ValueError(f"value_decay must not be negative, not {self.value_decay}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import adapters, trained
        from slimbench.methods.core.training import cut, objective

        windows = cut(calibration.ids, self.length)
        if len(windows) < self.adapters:
            raise Unsupported(f"{len(windows)} windows of text are fewer than the {self.adapters} adapters")
        model: Any = trained.load(dense)
        widths = sublayers(model, parts=("mlp",))
        sizes = {place: {"width": width, "size": self.size(width), "count": self.adapters} for place, width in widths.items()}
        fusions, generator = insert(model, sizes, "fusion"), self.generator(dense)
        for fusion in fusions.values():
            attend(fusion, generator)
            for adapter in fusion.adapters:
                begin(adapter, generator)
        loss = objective(self, model, dense)
        stages: list[Trained] = []
        for index, part in enumerate(windows.tensor_split(self.adapters)):
            with adapters.computing(fusions, chosen(index)):
                stages.append(self.stage(index, of(fusions, f"adapters.{index}."), loss, part, dense))

        def regularized(ids: Tensor) -> Tensor:
            return loss(ids) + self.value_decay * strangeness(fusions)

        stages.append(self.stage(self.adapters, of(fusions, "query.", "key.", "value."), regularized, windows, dense))
        trained.save(model, dense, out)
        losses = [{"loss_before": stage.curve[0][1], "loss_after": stage.loss_after} for stage in stages[:-1]]
        facts = {"adapters": self.adapters * len(fusions), "adapter_training": losses}
        whole = replace(stages[-1], tokens=sum(stage.tokens for stage in stages), parameters=sum(stage.parameters for stage in stages))
        return whole.added_to(Claim(EDITED, **counts(model), teacher=trained.teacher(self), details=facts))

    def stage(self, index: int, parameters: Mapping[str, nn.Parameter], loss: Loss, windows: Tensor, dense: DenseModel) -> Trained:
        """Train some parameters alone: one of `adapters` + 1 trainings, with a part of the progress and a folder of checkpoints each."""
        from slimbench.methods.core.training import train

        def progress(done: float, total: float) -> None:
            dense.progress(index * total + done, (self.adapters + 1) * total)

        kept = dense.checkpoints / f"stage-{index}" if dense.checkpoints else None
        for value in parameters.values():
            value.requires_grad_(True)
        trained = train(self, parameters, loss, windows, replace(dense, progress=progress, checkpoints=kept))
        for value in parameters.values():
            value.requires_grad_(False)
        return trained


def attend(fusion: Any, generator: torch.Generator) -> None:
    """Give Q and K of a fusion small random numbers, and let V leave what it gets almost as it is."""
    import torch

    with torch.no_grad():
        for layer in (fusion.query, fusion.key):
            layer.weight.copy_(_QUERY * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        fusion.value.weight.fill_(_ASIDE).fill_diagonal_(1.0)


def chosen(index: int) -> Callable[[str, Any, Tensor], Tensor]:
    """What fusions compute while one of their adapters is trained: that adapter alone."""

    def product(_: str, fusion: Any, x: Tensor) -> Tensor:
        made: Tensor = fusion.adapters[index](x)
        return made

    return product


def of(fusions: Mapping[str, Any], *parts: str) -> dict[str, nn.Parameter]:
    """The parameters of all fusions whose names begin with one of these, by full name."""
    return {
        f"{place}.{name}": value for place, fusion in fusions.items() for name, value in fusion.named_parameters() if name.startswith(parts)
    }


def strangeness(fusions: Mapping[str, Any]) -> Tensor:
    """‖V − I‖², added up over fusions, a scalar."""
    import torch

    values = [fusion.value.weight for fusion in fusions.values()]
    return torch.stack([(value - torch.eye(len(value), device=value.device)).square().sum() for value in values]).sum()

"""Moving scales and shifts of the inputs of linear layers into what makes those inputs, so that the model computes the same.

For inputs x = source(…) of layers with weight W and bias b, with a scale s and a shift z for each input channel:

    W x + b  =  (W diag(s)) ((x - z) / s)  +  (b + W z)

and (x - z) / s is what the source gives when its own gain or rows are divided by s and its bias is lessened by z. In a block of a
decoder like Llama or OPT these are the sources:

    norm     gain of the norm before query, key and value, and of the one before gate and up; a shift needs a norm with a bias
    value    value -> output projection: attention weights sum to one, so channels pass with scale and shift; with grouped queries
             one value channel stands for several inputs, which then share their scale and shift
    up       up -> down projection: the product with the gate passes a scale, but no shift; OPT has an activation there, and no such link
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import block_of

Kind = Literal["norm", "value", "up"]
KINDS: tuple[Kind, ...] = ("norm", "value", "up")


@dataclass(frozen=True)
class Link:
    """A module whose outputs are the inputs of linear layers.

    Attributes:
        source: A norm, or the value or up projection.
        layers: Those that read its outputs, by full name; all of them see the same inputs.
        heads: For a value projection, how many query heads read one of its heads, and the width of a head.
    """

    kind: Kind
    source: nn.Module
    layers: dict[str, nn.Linear]
    heads: tuple[int, int] = (1, 1)

    @property
    def first(self) -> str:
        """Name of the layer that stands for all in statistics of their inputs."""
        return next(iter(self.layers))

    @property
    def weights(self) -> Tensor:
        """The weights of all layers, one below the other: float32 [sum of out, in]."""
        return torch.cat([layer.weight.detach().float() for layer in self.layers.values()])

    @property
    def shifts(self) -> bool:
        """Whether the source can take up a shift."""
        return self.kind == "value" or (self.kind == "norm" and getattr(self.source, "bias", None) is not None)

    def shared(self, values: Tensor, reduce: Literal["amax", "amin"] = "amax") -> Tensor:
        """Values [in] made equal over the inputs that come from one channel of the source."""
        repeats, width = self.heads
        if repeats == 1:
            return values
        grouped = values.view(-1, repeats, width)
        return getattr(grouped, reduce)(1, keepdim=True).expand_as(grouped).reshape(-1)

    def fold_scale(self, scale: Tensor) -> None:
        """Divide the inputs by a scale [in], which is `shared`, and multiply the weights by it."""
        for layer in self.layers.values():
            _multiply(layer.weight, scale)
        inverse = 1 / self._of_source(scale.float())
        gain: Any = self.source.weight
        _multiply(gain, inverse if gain.dim() == 1 else inverse.unsqueeze(1))
        if getattr(self.source, "bias", None) is not None:
            _multiply(self.source.bias, inverse)  # type: ignore[arg-type]

    def fold_shift(self, shift: Tensor) -> None:
        """Subtract a shift [in], which is `shared`, from the inputs and give its product with the weights to the biases.

        Raises:
            Unsupported: The source cannot take it up.
        """
        if not self.shifts:
            raise Unsupported(f"a shift cannot be folded into {type(self.source).__name__} before {self.first}")
        for layer in self.layers.values():
            add_bias(layer, layer.weight.detach().float() @ shift.float())
        add_bias(self.source, -self._of_source(shift.float()))

    def _of_source(self, values: Tensor) -> Tensor:
        """Shared values of the inputs [in] as those of the outputs of the source."""
        repeats, width = self.heads
        return values.view(-1, repeats, width)[:, 0].reshape(-1) if repeats > 1 else values


def links(model: Any, name: str, block: Any, kinds: Sequence[Kind] = KINDS) -> list[Link]:
    """The links of a decoder block of the wanted kinds.

    Args:
        name: Full name of the block in the model.

    Raises:
        Unsupported: The block has no such links, or is built differently from those of Llama and OPT.
    """
    parts = block_of(model, name, block)
    attention, mlp = parts.attention, parts.mlp
    if "norm" in kinds:
        for norm in parts.norms:
            check_norm(norm)
    if "up" in kinds and mlp.gate is None:
        raise Unsupported(f"a scale does not pass the activation between {parts.name_of(mlp.up)} and {parts.name_of(mlp.down)}")
    here, feed = parts.named(attention.q, attention.k, attention.v), parts.named(*mlp.makes)
    found = [
        Link("norm", parts.norms[0], here),
        Link("value", attention.v, parts.named(attention.out), (attention.repeats, attention.head_dim)),
        Link("norm", parts.norms[1], feed),
        Link("up", mlp.up, parts.named(mlp.down)),
    ]
    return [link for link in found if link.kind in kinds]


@torch.no_grad()
def check_norm(norm: Any) -> None:
    """Raise `Unsupported` unless the outputs of a norm are proportional to its parameters, which is not so where the gain is 1 + w."""
    parameters = dict(norm.named_parameters())
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"}:
        raise Unsupported(f"{type(norm).__name__} has no gain to fold a scale into")
    gain = parameters["weight"]
    probe = torch.linspace(-1, 1, gain.numel(), dtype=gain.dtype, device=gain.device).unsqueeze(0)
    doubled = torch.func.functional_call(norm, {name: 2 * tensor for name, tensor in parameters.items()}, (probe,))
    if not torch.allclose(doubled, 2 * norm(probe), rtol=1e-2):
        raise Unsupported(f"the outputs of {type(norm).__name__} are not proportional to its gain")


@torch.no_grad()
def add_bias(module: Any, values: Tensor) -> None:
    """Add values [out] to the bias of a module, which gets one if it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(values.to(module.weight.dtype), requires_grad=False)
    else:
        module.bias.copy_(module.bias.float() + values)


@torch.no_grad()
def _multiply(parameter: Tensor, factors: Tensor) -> None:
    """Multiply in float32 (float64 for float64) and round once."""
    parameter.copy_(parameter.to(torch.promote_types(parameter.dtype, torch.float32)) * factors.to(parameter.device))

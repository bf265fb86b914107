"""Moving scales and shifts of the inputs of linear layers into what makes those inputs, so that the model computes the same.

For inputs x = source(…) of layers with weight W and bias b, with a scale s and a shift z for each input channel:

    W x + b  =  (W diag(s)) ((x - z) / s)  +  (b + W z)

and (x - z) / s is what the source gives when its own gain or rows are divided by s and its bias is lessened by z. In a block of a
Llama-like decoder these are the sources:

    norm     gain of the norm before query, key and value, and of the one before gate and up; a shift needs a norm with a bias
    value    value -> output projection: attention weights sum to one, so channels pass with scale and shift; with grouped queries
             one value channel stands for several inputs, which then share their scale and shift
    up       up -> down projection: the product with the gate passes a scale, but no shift
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported

Kind = Literal["norm", "value", "up"]
KINDS: tuple[Kind, ...] = ("norm", "value", "up")
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


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
        Unsupported: The block is not built like Llama's.
    """
    attention, mlp = check_block(block)
    here: dict[str, Any] = {f"{name}.self_attn.{part}": getattr(attention, part) for part in ("q_proj", "k_proj", "v_proj")}
    feed: dict[str, Any] = {f"{name}.mlp.{part}": getattr(mlp, part) for part in ("gate_proj", "up_proj")}
    value, output = attention.v_proj, attention.o_proj
    width = getattr(attention, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    repeats, rest = divmod(output.in_features, value.out_features)
    if rest or value.out_features % width:
        raise Unsupported(f"{value.out_features} outputs of the value projection are no heads of {output.in_features} inputs")
    found = [
        Link("norm", block.input_layernorm, here),
        Link("value", value, {f"{name}.self_attn.o_proj": output}, (repeats, width)),
        Link("norm", block.post_attention_layernorm, feed),
        Link("up", mlp.up_proj, {f"{name}.mlp.down_proj": mlp.down_proj}),
    ]
    return [link for link in found if link.kind in kinds]


def check_block(block: Any) -> tuple[Any, Any]:
    """The attention and the MLP of a block that is built like Llama's.

    Raises:
        Unsupported: It is not.
    """
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    norms = [getattr(block, norm, None) for norm in ("input_layernorm", "post_attention_layernorm")]
    kind = type(block).__name__
    if attention is None or mlp is None or None in norms or hasattr(block, "pre_feedforward_layernorm"):
        raise Unsupported(f"{kind} has no norm before attention and none before the MLP as Llama has")
    for owner, wanted, known in ((attention, ("q_proj", "k_proj", "v_proj", "o_proj"), _ATTENTION), (mlp, ("gate_proj", "up_proj"), _MLP)):
        children = dict(owner.named_children())
        if not {*wanted} <= {part for part, layer in children.items() if type(layer) is nn.Linear} or not children.keys() <= known:
            raise Unsupported(f"{type(owner).__name__} of {kind} is not built like Llama's: {', '.join(children)}")
    for norm in norms:
        check_norm(norm)
    return attention, mlp


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

"""The rotations that SpinQuant learns (arXiv 2405.16406), and a model that rounds its inputs as the rotated one would.

    R1   rotates the hidden states of the whole model
    R2   rotates each head between the value and the output projection; one for each block
    R4   the Hadamard transform of the inputs of the down projection, in the widest blocks that fit; not learned

While they are learned the weights W keep their precision, so a layer whose inputs x are rounded by q in the rotated model gives
q(x R) (W R)ᵀ = q(x R) Rᵀ Wᵀ: the model stays as it is, and only its inputs are rotated, rounded and rotated back. Rounding passes
gradients unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.equivalent import Link, links
from slimbench.methods.core.architecture.rotation import by_heads, orthogonal, rotate, rotate_heads, transform_inputs
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.kernels.numbers import ActivationGrid, fake_quantize, hadamard, largest_power_of_two
from slimbench.methods.quantization.grids.trained_layers import straight_through

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rotations:
    """Orthogonal float64 matrices.

    Attributes:
        hidden: R1 [hidden, hidden].
        heads: R2 [head, head] of each block, by its name.
    """

    hidden: nn.Parameter
    heads: dict[str, nn.Parameter]

    @classmethod
    def random(cls, model: PreTrainedModel, seed: int) -> Rotations:
        """Hadamard matrices with random signs, as far as the widths allow.

        Raises:
            Unsupported: The model is not built like Llama.
        """
        widths = {name: links(model, name, block, ("value",))[0].heads[1] for name, block in blocks_of(model).items()}
        made = [orthogonal(width, seed + index) for index, width in enumerate((model.config.hidden_size, *widths.values()))]
        first, *others = (nn.Parameter(rotation.to(model.device)) for rotation in made)
        return cls(first, dict(zip(widths, others, strict=True)))

    def parameters(self) -> dict[str, nn.Parameter]:
        """All by name."""
        return {"hidden": self.hidden} | {f"{name}.heads": rotation for name, rotation in self.heads.items()}

    @contextmanager
    def rounding(self, model: PreTrainedModel, grid: ActivationGrid) -> Iterator[None]:
        """Let a model compute for a while what the rotated one does with rounded inputs, with gradients for the rotations.

        Args:
            model: Its norms have no gains (`methods.core.architecture.rotation.fold_gains`).
            grid: How the inputs of the layers of the blocks are rounded.
        """
        hooks = [self._hook(name, link, grid) for name, block in blocks_of(model).items() for link in links(model, name, block)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, block: str, link: Link, grid: ActivationGrid) -> Any:
        """Of what makes the inputs of several layers, or else of the layer that reads them."""
        if link.kind == "norm":
            return link.source.register_forward_hook(lambda _, __, x: _rounded(x, grid, self.hidden))
        rotation = self.heads[block] if link.kind == "value" else None
        return link.layers[link.first].register_forward_pre_hook(lambda _, args: (_rounded(args[0], grid, rotation), *args[1:]))

    @torch.no_grad()
    def rotate(self, model: PreTrainedModel) -> dict[str, int]:
        """Rotate a model in place, in float64.

        Returns:
            The layers whose inputs must go through a Hadamard transform while the model runs, with the size of its blocks.

        Raises:
            Unsupported: The model is not built like Llama, or its norms do not commute with a rotation.
        """
        rotate(model, self.hidden)
        transforms: dict[str, int] = {}
        for name, block in blocks_of(model).items():
            value, up = links(model, name, block, ("value", "up"))
            rotate_heads(value.source, value.layers[value.first], self.heads[name])  # type: ignore[arg-type]
            transforms[up.first] = largest_power_of_two(up.layers[up.first].in_features)
            transform_inputs(up.layers[up.first], transforms[up.first])
        return transforms


def _rounded(x: Tensor, grid: ActivationGrid, rotation: Tensor | None) -> Tensor:
    """Inputs [..., in] rotated, rounded and rotated back, in float32.

    Args:
        rotation: [n, n], of each run of n inputs; None: the Hadamard transform.
    """
    with torch.autocast(x.device.type, enabled=False):
        turn, back = _turns(x, rotation)
        seen = turn(x.float())
        return back(straight_through(seen, fake_quantize(seen.detach(), grid))).to(x.dtype)


def _turns(x: Tensor, rotation: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A rotation of the last dimension and its inverse."""
    if rotation is None:
        block = largest_power_of_two(x.shape[-1])
        return (lambda t: hadamard(t, block),) * 2
    matrix = rotation.float()
    return (lambda t: by_heads(t, matrix)), (lambda t: by_heads(t, matrix.T))

"""The runtime artefact format: linear layers that do something to their inputs before the product.

The folder holds a base, and what is done to inputs:

    base                  a dense huggingface folder with rounded numbers, or a packed one (`methods.formats.packed`)
    runtime.json          schema, kind of the base, and for each layer its grid, size of Hadamard blocks and tail
    runtime.safetensors   X.shift, X.scale, X.permutation, X.signs, X.static_scale, X.static_offset where a layer has them, and
                          X.bias where a dense base got one that its config does not know

Inputs [..., in] go through the steps of an `InputPlan` in float32 and come out in their dtype. Rounding is that of
`methods.kernels.numbers`; it is simulated: numbers lie on the grid, but the product runs in the model's dtype, unless the packed
base itself multiplies integers (`activation_bits` of its grid).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.formats import huggingface, packed
from slimbench.methods.kernels.grid import QuantizedWeight
from slimbench.methods.kernels.numbers import ActivationGrid, fake_quantize, hadamard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ActivationGrid", "InputPlan", "PlannedLinear", "fake_quantize", "hadamard", "load", "planned", "save", "transform"]

SCHEMA = 1
DESCRIPTION = "runtime.json"
TENSORS = "runtime.safetensors"
_TENSORS = ("shift", "scale", "permutation", "signs", "static_scale", "static_offset")


@dataclass(frozen=True)
class InputPlan:
    """What is done to the inputs [..., in] of a layer, in this order; None: left out.

    Attributes:
        shift: [in], subtracted. Its product with the weight is in the layer's bias already.
        scale: [in], divided by.
        permutation: int64 [in]; input i becomes the one at `permutation[i]`.
        signs: ±1 [in], multiplied before the Hadamard transform.
        hadamard: Size of the diagonal blocks of the orthonormal transform, a power of two that divides in.
        grid: How they are rounded.
        static_scale: Scale of the grid, broadcast against the inputs; None: from the inputs at hand.
        static_offset: Offset of an asymmetric grid with a static scale.
        tail: How many of the last inputs are rounded to `tail_grid` instead of `grid`.
        tail_grid: None: the tail keeps its dtype.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    permutation: Tensor | None = None
    signs: Tensor | None = None
    hadamard: int | None = None
    grid: ActivationGrid | None = None
    static_scale: Tensor | None = None
    static_offset: Tensor | None = None
    tail: int = 0
    tail_grid: ActivationGrid | None = None

    def check(self, inputs: int) -> None:
        """Raise `ValueError` unless the plan fits a layer with so many inputs."""
        for name in ("shift", "scale", "permutation", "signs"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (inputs,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not ({inputs},)")
        if self.hadamard and (self.hadamard & (self.hadamard - 1) or inputs % self.hadamard):
            raise ValueError(f"Hadamard blocks of {self.hadamard} are no power of two that divides {inputs}")
        for grid, width in ((self.grid, inputs - self.tail), (self.tail_grid, self.tail)):
            if grid and grid.group_size and width % grid.group_size:
                raise ValueError(f"groups of {grid.group_size} do not divide {width} inputs")


class PlannedLinear(nn.Module):
    """A linear layer of any class, behind the plan for its inputs."""

    def __init__(self, inner: nn.Module, plan: InputPlan) -> None:
        super().__init__()
        self.inner = inner
        self.inputs = PlannedInputs(plan)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., in] of the model's dtype; the result is [..., out]."""
        return self.inner(self.inputs(x))


class PlannedInputs(nn.Module):
    """An `InputPlan` whose tensors are buffers."""

    shift: Tensor | None
    scale: Tensor | None
    permutation: Tensor | None
    signs: Tensor | None
    static_scale: Tensor | None
    static_offset: Tensor | None

    def __init__(self, plan: InputPlan) -> None:
        super().__init__()
        for name in _TENSORS:
            self.register_buffer(name, getattr(plan, name))
        self.hadamard, self.grid, self.tail, self.tail_grid = plan.hadamard, plan.grid, plan.tail, plan.tail_grid

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., in], as the layer shall see them."""
        return transform(x, self)

    def extra_repr(self) -> str:
        return f"hadamard={self.hadamard}, grid={self.grid}, tail={self.tail}"


def transform(x: Tensor, plan: InputPlan | PlannedInputs) -> Tensor:
    """Carry out a plan on inputs [..., in]: float32 inside, the dtype of x at the end."""
    values = x.float()
    if plan.shift is not None:
        values = values - plan.shift.float()
    if plan.scale is not None:
        values = values / plan.scale.float()
    if plan.permutation is not None:
        values = values.index_select(-1, plan.permutation)
    if plan.signs is not None:
        values = values * plan.signs.float()
    if plan.hadamard:
        values = hadamard(values, plan.hadamard)
    if plan.tail:
        body, tail = values[..., : -plan.tail], values[..., -plan.tail :]
        tail = fake_quantize(tail, plan.tail_grid) if plan.tail_grid else tail
        body = fake_quantize(body, plan.grid, plan.static_scale, plan.static_offset) if plan.grid else body
        values = torch.cat((body, tail), -1)
    elif plan.grid:
        values = fake_quantize(values, plan.grid, plan.static_scale, plan.static_offset)
    return values.to(x.dtype)


def attach(model: nn.Module, plans: dict[str, InputPlan]) -> None:
    """Put the layers that have a plan behind it, in place."""
    for name, plan in plans.items():
        model.set_submodule(name, PlannedLinear(model.get_submodule(name), plan))


@contextmanager
def planned(model: nn.Module, plans: dict[str, InputPlan]) -> Iterator[None]:
    """Let layers see planned inputs for a while, without a change to the modules of the model.

    What is hooked to a layer inside sees them too.
    """
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, plan=plan: (transform(args[0], plan), *args[1:]))
        for name, plan in plans.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save(
    model: PreTrainedModel,
    out: Path,
    plans: dict[str, InputPlan],
    weights: Iterable[tuple[str, QuantizedWeight]] | None = None,
) -> None:
    """Write a model whose linear layers treat their inputs.

    Args:
        model: Gives the config and every tensor that is not packed. It has no `PlannedLinear`.
        out: Folder to write into.
        plans: By name of the layer.
        weights: Names of `nn.Linear` layers with their packed weights, consumed one at a time; None: the base is dense, with the
            numbers that are in the model.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, plan in plans.items():
        plan.check(model.get_submodule(name).in_features)  # type: ignore[arg-type]
        tensors |= {f"{name}.{part}": getattr(plan, part) for part in _TENSORS if getattr(plan, part) is not None}
    if weights is None:
        tensors |= _save_dense(model, out)
    else:
        packed.save(model, weights, out)
    save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, out / TENSORS)
    described = {
        "format": "slimbench runtime",
        "schema": SCHEMA,
        "base": "huggingface" if weights is None else "packed",
        "layers": {name: _describe(plan) for name, plan in plans.items()},
    }
    (out / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load a runtime artefact in evaluation mode.

    Raises:
        ValueError: The schema is newer than this program, or tensors are left over.
    """
    from safetensors.torch import load_file

    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"runtime schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    tensors = load_file(folder / TENSORS, device=device)
    model: Any
    if described["base"] == "packed":
        model = packed.load(folder, device, trust_remote_code)
    else:
        model = huggingface.load(folder, device, trust_remote_code)
        for key in [key for key in tensors if key.endswith(".bias")]:
            model.get_submodule(key.removesuffix(".bias")).bias = nn.Parameter(tensors.pop(key), requires_grad=False)
    plans: dict[str, InputPlan] = {}
    for name, kept in described["layers"].items():
        parts: dict[str, Any] = {part: tensors.pop(f"{name}.{part}") for part in _TENSORS if f"{name}.{part}" in tensors}
        grids: dict[str, Any] = {key: ActivationGrid(**kept.pop(key)) for key in ("grid", "tail_grid") if key in kept}
        plans[name] = InputPlan(**kept, **grids, **parts)
    if tensors:
        raise ValueError(f"{folder.name} has tensors that no layer wants: {sorted(tensors)[:3]}")
    attach(model, plans)
    return model.eval()


def _describe(plan: InputPlan) -> dict[str, Any]:
    """The parts of a plan that are no tensors and differ from what a plan has by itself."""
    kept: dict[str, Any] = {"hadamard": plan.hadamard} if plan.hadamard else {}
    kept |= {"tail": plan.tail} if plan.tail else {}
    return kept | {name: asdict(grid) for name in ("grid", "tail_grid") if (grid := getattr(plan, name))}


def _save_dense(model: PreTrainedModel, out: Path) -> dict[str, Tensor]:
    """Write a dense base; what is returned are biases that a model made from its config has no place for."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from slimbench.methods.formats.huggingface import save_dense

    with init_empty_weights():
        known = set(AutoModelForCausalLM.from_config(model.config).state_dict())
    added = {
        f"{name}.bias": layer.bias.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None and f"{name}.bias" not in known
    }
    kept = {key: model.get_submodule(key.removesuffix(".bias")).bias for key in added}
    for key in added:
        model.get_submodule(key.removesuffix(".bias")).bias = None  # type: ignore[assignment]
    try:
        save_dense(model, out)
    finally:
        for key, bias in kept.items():
            model.get_submodule(key.removesuffix(".bias")).bias = bias
    return added

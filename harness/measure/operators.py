"""Which operators multiply the weights in one decode step, layer by layer, and in which dtype.

Operators of torch and of libraries are seen where they are dispatched, also those inside an operator that a library composed of
others: one that is called `gemv_4bit` may expand the weight and call a dense product. Device kernels come from torch's profiler.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from slimbench.util.compat.torch import TorchDispatchMode, redispatch, tree_iter

UNSEEN = "unseen"
PRODUCT = re.compile(r"(?<!ga)mm(?!_dequant)|matmul|linear|gemm|gemv|matvec|matmat|einsum|mv")
_ROUNDS_INPUTS = re.compile(r"dyn_quant|linear_dynamic|qlinear")  # torch's operators that turn float inputs into int8 themselves
_OWN = ("aten", "prim", "prims")
_KERNELS, _NAME = 12, 160
_TRANSFERS = ("Memcpy", "Memset")


@dataclass
class LayerRun:
    """What one layer did in the step.

    Attributes:
        products: Operators that multiplied, in order; none where a kernel is called past torch's dispatcher.
        dtype: In which the first of them multiplied.
        expanded: Numbers in floating-point operands that no layer holds and that are more than the inputs: weights that were
            made for this product.
        expanded_bytes: Their bytes.
        inputs: Numbers that the layer was called with.
    """

    products: list[str] = field(default_factory=list)
    dtype: str | None = None
    expanded: int = 0
    expanded_bytes: int = 0
    inputs: int = 0


@dataclass
class Step:
    """Operators of one decode step.

    Attributes:
        operators: Every operator that multiplies, attention and library operators around others included, and how often.
        layers: What each layer did that ran; keys are `id(layer)`.
    """

    operators: Counter[str] = field(default_factory=Counter)
    layers: dict[int, LayerRun] = field(default_factory=dict)


def observe(layers: Iterable[torch.nn.Module], resident: set[int], decode_step: Callable[[], Any]) -> Step:
    """Run one step and attribute its operators to the layers in whose forward pass they ran.

    Args:
        layers: The layers of interest.
        resident: Storage pointers of all tensors that the model holds.
        decode_step: Runs one decode step.
    """
    seen = Step()
    observer = _Observer(seen, resident)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(observer.enter).remove)
            hooks.callback(layer.register_forward_hook(observer.leave, always_call=True).remove)
        with observer:
            decode_step()
    return seen


def storage_pointer(tensor: torch.Tensor) -> int:
    """Address of a tensor's memory, equal for all its views; 0 where it has none, as on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
    except (RuntimeError, NotImplementedError):
        return 0


class _Observer(TorchDispatchMode):
    def __init__(self, seen: Step, resident: set[int]) -> None:
        super().__init__()
        self.seen, self.resident = seen, resident
        self.running: list[LayerRun] = []

    def enter(self, layer: torch.nn.Module, inputs: Any) -> None:
        run = self.seen.layers.setdefault(id(layer), LayerRun())
        run.inputs = max((x.numel() for x in inputs if isinstance(x, torch.Tensor)), default=0)
        self.running.append(run)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = self.seen.operators.total()
        out = self._inside(func, operands, args, kwargs)
        name = func.name().removeprefix("aten::").split(".")[0]
        if PRODUCT.search(name.rpartition("::")[2]):
            innermost = self.seen.operators.total() == before
            self.seen.operators[name] += 1
            if innermost and self.running:
                self._attribute(self.running[-1], name, operands)
        return out

    def _inside(self, func: Any, operands: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Call an operator; a library's own one, and one of a wrapped tensor, so that the operators inside it come by here too."""
        wrapped = next((t for t in operands if type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__), None)
        if wrapped is not None:
            with self:
                return type(wrapped).__torch_dispatch__(func, (type(wrapped),), args, kwargs)
        device = operands[0].device.type if operands else None
        if func.namespace in _OWN or device not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        with self:
            return redispatch(func, device, args, kwargs)

    def _attribute(self, run: LayerRun, name: str, operands: list[torch.Tensor]) -> None:
        run.products.append(name)
        if run.dtype is None and operands:
            run.dtype = "int8" if _ROUNDS_INPUTS.search(name) else str(operands[0].dtype).removeprefix("torch.")
        floating = [t for t in operands if t.is_floating_point() and t.numel() > run.inputs]
        made = [t for t in floating if storage_pointer(t) not in self.resident]
        run.expanded += sum(t.numel() for t in made)
        run.expanded_bytes += sum(t.numel() * t.element_size() for t in made)


def device_kernels(decode_step: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Kernels of one profiled step on a CUDA card: microseconds by name, the heaviest first; None elsewhere or where no one may profile."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity

    def step() -> None:
        decode_step()
        torch.cuda.synchronize(device)

    try:
        return profiled(step, ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA) or None
    except RuntimeError:
        return None


def profiled(step: Callable[[], Any], activity: Any, kind: Any) -> dict[str, float]:
    """What one kind of device did during a step: microseconds by name, the heaviest dozen, copies and fills left out.

    Args:
        activity: The `torch.profiler.ProfilerActivity` to record.
        kind: The `torch.autograd.DeviceType` whose events count.
    """
    from torch.profiler import profile

    with profile(activities=[activity]) as recorded:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        if event.device_type == kind and not event.is_user_annotation and not event.name.startswith(_TRANSFERS):
            times[event.name[:_NAME]] += event.time_range.elapsed_us()
    return {name: round(times[name], 1) for name in sorted(times, key=lambda n: -times[n])[:_KERNELS]}

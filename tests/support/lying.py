"""Methods and loaders that do not do what they say, each beside a setting with which it is honest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.architecture.surgery import remove_blocks
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats import packed
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.weight.rtn import RTN
from slimbench.methods.work import Work


@dataclass(frozen=True)
class _Test(Method):
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"


@dataclass(frozen=True)
class StoresDense(_Test):
    """Rounds to 4 bits and stores the rounded numbers in the source dtype; honest if it says so."""

    name = "stores-dense"
    simulated: bool = False

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.kernels.rounding import round_to_grid

        model = dense.load()
        for layer in block_linears(model).values():
            layer.weight.data = round_to_grid(layer.weight.detach(), packed.Grid(4, 32)).dequantize()
        save_dense(model, out)
        return Claim(HUGGINGFACE, bits=4, group_size=32, simulated=self.simulated)


@dataclass(frozen=True)
class BrokenMask(_Test):
    """2:4 magnitude pruning; in the first `layers` layers one group of four is then filled again."""

    name = "broken-mask"
    layers: int = 1

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        claim = Magnitude(pattern="2:4").compress(dense, calibration, out)
        model = dataclasses.replace(dense, path=out).load()
        for layer in list(block_linears(model).values())[: self.layers]:
            layer.weight.data[-1, -4:] = 0.01
        save_dense(model, out)
        return claim


@dataclass(frozen=True)
class FineTune(_Test):
    """Adds a little to every weight, as a step of gradient descent does; `masked` leaves zeros alone, `silent` says nothing of it."""

    name = "fine-tune"
    needs = Needs(training=True)

    masked: bool = False
    silent: bool = False

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        model = dense.load()
        trained = 0
        for layer in block_linears(model).values():
            step = torch.full_like(layer.weight, 1e-3)
            layer.weight.data += step * (layer.weight != 0) if self.masked else step
            trained += layer.weight.numel()
        save_dense(model, out)
        return Claim(HUGGINGFACE) if self.silent else Claim(HUGGINGFACE, training_tokens=1000, trained_parameters=trained)


@dataclass(frozen=True)
class Boasts(_Test):
    """Keeps the weights, and claims a training that it does not need; honest with zeros and no teacher."""

    name = "boasts"

    tokens: int = 0
    parameters: int = 0
    teacher: str | None = None

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        save_dense(dense.load(), out)
        return Claim(HUGGINGFACE, training_tokens=self.tokens, trained_parameters=self.parameters, teacher=self.teacher)


@dataclass(frozen=True)
class Taught(FineTune):
    """Asks a teacher, and names it if it is honest."""

    name = "taught"
    needs = Needs(training=True, teacher=True)

    teacher: str | None = None

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        return dataclasses.replace(super().compress(dense, calibration, out), teacher=self.teacher)


@dataclass(frozen=True)
class OtherGroups(_Test):
    """8-bit weights in groups of `stored`, and the claim of groups of `claimed`; None is a row."""

    name = "other-groups"
    produces = "packed"

    stored: int | None = 32
    claimed: int | None = 32

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        claim = RTN(bits=8, group_size=self.stored).compress(dense, calibration, out)
        return dataclasses.replace(claim, group_size=self.claimed)


@dataclass(frozen=True)
class Calibrated(_Test):
    """Keeps the weights, and tells which tokens it was given."""

    name = "calibrated"
    needs = Needs(calibration=True)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        save_dense(dense.load(), out)
        return Claim(HUGGINGFACE, details={"ids": calibration.ids.tolist()})


@dataclass(frozen=True)
class Cut(_Test):
    """Leaves out the last block, and tells the counts of a model that is `parameters` and `layers` smaller or larger than it is.

    `silent` tells none.
    """

    name = "cut"

    parameters: int = 0
    layers: int = 0
    silent: bool = False

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        model: Any = dense.load()
        remove_blocks(model, [model.config.num_hidden_layers - 1])
        save_dense(model, out)
        if self.silent:
            return Claim(HUGGINGFACE)
        return Claim(HUGGINGFACE, parameters=model.num_parameters() + self.parameters, layers=model.config.num_hidden_layers + self.layers)


@dataclass(frozen=True)
class SmallCache(_Test):
    """Keeps the model, and claims that a token takes `share` of the bytes in the cache that it takes; honest with 1."""

    name = "small-cache"

    share: float = 0.5

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        model: Any = dense.load()
        save_dense(model, out)
        numbers = 2 * dense.shape.num_layers * dense.shape.num_kv_heads * dense.shape.head_dim
        return Claim(HUGGINGFACE, cache_bytes_per_token=self.share * numbers * model.dtype.itemsize)


@dataclass(frozen=True)
class Lazy(_Test):
    """Claims that half of the blocks are left out for a mean token, which nothing measures."""

    name = "lazy"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        save_dense(dense.load(), out)
        return Claim(HUGGINGFACE, work=Work(blocks=dense.shape.num_layers / 2))


@dataclass(frozen=True)
class WeightOnly(_Test):
    """8-bit weights, and the claim that inputs are rounded as well."""

    name = "weight-only"
    produces = "packed"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        claim = RTN(bits=8, group_size=None).compress(dense, calibration, out)
        return dataclasses.replace(claim, activation_bits=8)


def load_expanded(folder: Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Expands every packed layer to an ordinary dense one while it loads."""
    model = packed.load(folder, device, trust_remote_code)
    for name, layer in _packed_layers(model):
        model.set_submodule(name, _dense(layer))
    return model


def load_expanding(folder: Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Expands every packed layer in its first forward pass, as compressed-tensors does."""
    model = packed.load(folder, device, trust_remote_code)
    for name, layer in _packed_layers(model):
        model.set_submodule(name, _Lazy(layer))
    return model


def load_hiding(folder: Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Keeps the packed layers for show and multiplies with dense copies that no module holds."""
    model = packed.load(folder, device, trust_remote_code)
    for _, layer in _packed_layers(model):
        layer.forward = _hidden(layer.dequantize())  # type: ignore[method-assign]
    return model


class _Lazy(nn.Module):
    def __init__(self, layer: packed.PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight: Any = None
        self.layer: packed.PackedLinear | None = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            self.weight, self.layer = self.layer.dequantize(), None
        return nn.functional.linear(x, self.weight)


def _packed_layers(model: nn.Module) -> list[tuple[str, packed.PackedLinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, packed.PackedLinear)]


def _dense(layer: packed.PackedLinear) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.dtype)
    dense.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    return dense


def _hidden(weight: Tensor) -> Any:
    return lambda x: nn.functional.linear(x, weight)

"""Bottleneck adapters: two thin layers and a nonlinearity are trained behind each half of a block, and stay there.

    adapter(x) = x + W_up f(W_down x + b_down) + b_up        x [width]: what attention, or MLP, would add to the residual connection;
                                                             W_down [width / reduction, width], f = GELU

    Adapter        in all blocks; norms of the blocks learn too (Houlsby et al., arXiv 1902.00751)
    AdapterDrop    none in the lowest blocks, whose work does not grow (arXiv 2010.11918)

W_down begins with normal numbers of standard deviation 0.01, cut at two of these, as in the paper, and W_up with zeros, so that training
begins at the model as it was. The model becomes larger and slower by its adapters: the claim counts them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimbench.methods.base import DENSE, EDITED, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_SPREAD = 0.01
NAME = "adapter"
"""Of an adapter, as seen from the module whose outputs it changes."""


@dataclass(frozen=True)
class Bottlenecks(TrainingSettings, Method):
    """What methods share that insert adapters and train them.

    Attributes:
        reduction: Features of a hidden state for each of an adapter's bottleneck.
    """

    accepts: ClassVar[tuple[str, ...]] = DENSE
    needs: ClassVar[Needs] = Needs(calibration=True, training=True)
    produces: ClassVar[str] = EDITED

    reduction: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, not {self.reduction}")

    def size(self, width: int) -> int:
        """Features of a bottleneck behind so many."""
        return max(1, width // self.reduction)

    def generator(self, dense: DenseModel) -> torch.Generator:
        """Of what the adapters begin with, on the CPU."""
        import torch

        return torch.Generator().manual_seed(self.seed + dense.seed)


@dataclass(frozen=True)
class Inserted(Bottlenecks):
    """Adapters of full matrices behind attention and MLP, and the norms of their blocks."""

    @abstractmethod
    def dropped(self, blocks: int) -> int:
        """How many of so many blocks, from the lowest, have no adapter."""

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.formats.architecture.structure import blocks_of

        model: Any = trained.load(dense)
        first = self.dropped(len(blocks_of(model)))
        places, generator = sublayers(model, first), self.generator(dense)
        adapters = insert(model, {place: {"width": width, "size": self.size(width)} for place, width in places.items()})
        parameters = norms(model, first)
        for place, adapter in adapters.items():
            begin(adapter, generator)
            parameters |= {f"{place}.{NAME}.{name}": value for name, value in adapter.named_parameters()}
        done = trained.fit(self, model, parameters, calibration.ids, dense)
        trained.save(model, dense, out)
        facts = {"adapters": len(adapters), "blocks_without_adapters": first}
        return done.added_to(Claim(EDITED, **counts(model), teacher=trained.teacher(self), details=facts))


@dataclass(frozen=True)
class Adapter(Inserted):
    """Adapters in all blocks."""

    name = "adapter"
    citation = Citation("Adapter", year=2019, arxiv="1902.00751", covers=("peft/adapter",))

    def dropped(self, blocks: int) -> int:
        return 0


@dataclass(frozen=True)
class AdapterDrop(Inserted):
    """Adapters in the upper blocks alone: the same ones in training and afterwards, the paper's specialized variant.

    Attributes:
        share: Of the blocks, from the lowest, that have no adapter, rounded to whole ones; the paper leaves out up to 5 of 12.
    """

    name = "adapterdrop"
    citation = Citation("AdapterDrop", year=2020, arxiv="2010.11918", covers=("peft/adapterdrop-adapterfusion",))

    share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), not {self.share}")

    def dropped(self, blocks: int) -> int:
        return round(self.share * blocks)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.dropped(shape.num_layers) == shape.num_layers:
            raise Unsupported(f"share {self.share} leaves none of {shape.num_layers} blocks an adapter")


def sublayers(model: Any, first: int = 0, parts: tuple[str, ...] = ("attention", "mlp")) -> dict[str, int]:
    """The modules that add to the residual connection, by full name with the width of what they give.

    Args:
        first: The lowest block that is looked at.
        parts: Halves of a block; one that was taken out adds nothing, and is left out.

    Raises:
        Unsupported: Blocks are built like none that is known.
    """
    import torch

    from slimbench.methods.formats.architecture.layout import layout_of
    from slimbench.methods.formats.architecture.modules import NoAttention, Nothing
    from slimbench.methods.formats.architecture.structure import blocks_of

    names = []
    for name, block in list(blocks_of(model).items())[first:]:
        layout = layout_of(block)
        ends = {"attention": layout.attention, "mlp": layout.mlp[-1]}
        names += [f"{name}.{ends[part]}" for part in parts]
    places = {name: module for name in names if not isinstance(module := model.get_submodule(name), NoAttention | Nothing)}
    widths: dict[str, int] = {}

    def notes(name: str) -> Any:
        def note(_: nn.Module, __: Any, made: Any) -> None:
            widths[name] = (made[0] if isinstance(made, tuple) else made).shape[-1]

        return note

    watching = [module.register_forward_hook(notes(name)) for name, module in places.items()]
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in watching:
        hook.remove()
    return {name: widths[name] for name in places}


def insert(model: Any, arguments: Mapping[str, dict[str, int]], kind: str = "bottleneck") -> dict[str, Any]:
    """Put an adapter, or a fusion of several, behind modules: by their full names, what it is made of. Its numbers are not yet set."""
    from slimbench.methods.formats.architecture.edits import Insert, apply

    for place, sizes in arguments.items():
        apply(model, Insert(place, NAME, kind, "after", sizes))  # type: ignore[arg-type]
    return {place: model.get_submodule(f"{place}.{NAME}") for place in arguments}


def begin(adapter: Any, generator: torch.Generator, near: bool = False) -> None:
    """Give an adapter its first numbers.

    Args:
        near: W_up begins as W_down does, near zero, so that every weight has a gradient.
    """
    import torch

    with torch.no_grad():
        for layer in (adapter.down, adapter.up):
            layer.weight.zero_()
            layer.bias.zero_()
            if near or layer is adapter.down:
                layer.weight.copy_(small(layer.weight.shape, generator))


def small(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers of standard deviation 0.01, cut at two of these."""
    import torch

    return torch.nn.init.trunc_normal_(torch.empty(shape), std=_SPREAD, a=-2 * _SPREAD, b=2 * _SPREAD, generator=generator)


def norms(model: Any, first: int = 0) -> dict[str, nn.Parameter]:
    """Gains and biases of the norms of the blocks from `first` on, by full name."""
    from slimbench.methods.formats.architecture.layout import layout_of
    from slimbench.methods.formats.architecture.structure import blocks_of

    return {
        f"{name}.{norm}.{part}": value
        for name, block in list(blocks_of(model).items())[first:]
        for norm in layout_of(block).norms
        for part, value in block.get_submodule(norm).named_parameters()
    }

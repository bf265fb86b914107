"""SignRound: learn by signed gradient descent by how much each weight is shifted before rounding and where its group is clipped."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped
from slimbench.methods.quantization.grids.codes import check_equal, from_zero_points

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

_SCALES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NO_TOKENIZER: Any = object()
_LIBRARY_SEED = 42


@dataclass(frozen=True)
class SignRound(Grouped, Method):
    """Weight only, block by block against the outputs of the dense block; embeddings and output head keep their dtype.

    A weight becomes s · clip(round(w / s + v) + z), with a shift v in [-0.5, 0.5] for each weight and a factor in [0, 1] on each end of
    the range of a group, all moved by the sign of the gradient with a step of 1 / iterations that falls to zero. The best
    parameters seen in a block are kept. The library cannot resume an interrupted run. Symmetric grids of the library may have
    negative scales, so that the one code without a counterpart stands on the side of the largest weight.

    Attributes:
        bits: Bits of a weight, before scales.
        symmetric: Centre the grid on zero; else it has a zero point.
        clip: False leaves the range of each group as it is and learns the shifts alone; None learns both.
        iterations: Steps for each block.
        batch_size: Calibration samples of a step.
    """

    name = "signround"
    citation = Citation("SignRound", year=2023, arxiv="2309.05516", covers=("quantization/signround-autoround",))
    reference = "auto_round:AutoRound"
    needs = Needs(calibration=True, training=True, extra="quantization", modules=("auto_round",))
    produces = "packed"
    draws = True
    least_steps = 200  # the paper's

    bits: Literal[2, 3, 4] = 4
    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True
    clip: Literal[False] | None = None
    iterations: int = 200
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be positive, not {self.iterations}: without any, it is rounding to nearest")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {self.batch_size}")

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "min-max" if self.clip is False else "learned")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Tune in memory and write the codes packed.

        Raises:
            RuntimeError: The packed weights are not those of the library.
        """
        from slimbench.methods.formats import packed

        model = dense.load()
        names = list(block_linears(model))
        check_groups(block_linears(model), self.group_size)
        blocks = model.config.num_hidden_layers
        with _quiet(), _counting(dense.progress, blocks):
            model, _ = self.rounder(model, dense, calibration).quantize()
        layers = {name: model.get_submodule(name) for name in names}
        packed.save(model, self._codes(layers, packed.Grid(self.bits, self.group_size)), out)
        samples, length = calibration.ids.shape
        weights = sum(layer.weight.numel() for layer in block_linears(model).values())
        return Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            training_tokens=self.iterations * min(self.batch_size, samples) * length * blocks,
            trained_parameters=weights + (0 if self.clip is False else 2 * weights // self.group_size),
            details={"symmetric": self.symmetric, "iterations": self.iterations},
        )

    def rounder(self, model: Any, dense: DenseModel, calibration: Calibration) -> Any:
        """The library's own object for these settings."""
        from auto_round import AutoRound
        from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

        samples, length = calibration.ids.shape
        return AutoRound(
            model,
            _NO_TOKENIZER,
            scheme="W4A16",
            alg_configs=SignRoundConfig(
                bits=self.bits,
                group_size=self.group_size,
                sym=self.symmetric,
                iters=self.iterations,
                enable_minmax_tuning=self.clip is not False,
            ),
            dataset=list(calibration.ids.split(1)),
            nsamples=samples,
            seqlen=length,
            batch_size=min(self.batch_size, samples),
            device_map=dense.device,
            seed=_LIBRARY_SEED + dense.seed,
            enable_torch_compile=False,
            scale_dtype=_SCALES[dense.dtype],
        )

    def _codes(self, layers: dict[str, nn.Module], grid: Grid) -> Iterator[tuple[str, QuantizedWeight]]:
        """The codes behind the rounded weights that the library left in the layers."""
        import torch

        from slimbench.methods.kernels.grid import QuantizedWeight

        levels = 2**grid.bits
        for name, layer in layers.items():
            rounded: Any = layer.weight.detach()  # type: ignore[operator]
            scales: Any = layer.scale.to(rounded.device)
            zeros: Any = torch.as_tensor(layer.zp, device=rounded.device).float().expand_as(scales)
            groups = rounded.float().unflatten(1, (scales.shape[1], -1))
            codes = (groups / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, levels - 1).flatten(1)
            if self.symmetric and bool((zeros == levels // 2).all()):
                weight = QuantizedWeight(grid, codes.to(torch.uint8), scales.to(rounded.dtype))
            else:
                weight = from_zero_points(codes, scales, zeros, grid, rounded.dtype)
            check_equal(name, weight, rounded)
            yield name, weight


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log off the terminal, and everything off the standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        import auto_round  # noqa: F401 - importing it sets the level of its log

        log = logging.getLogger("autoround")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextlib.contextmanager
def _counting(progress: Callable[[float, float], None], blocks: int) -> Iterator[None]:
    """Tell of each block that the library has finished; it offers no callback."""
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    tune, done = SignRoundQuantizer.quantize_block, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        found = tune(*args, **kwargs)
        done += 1
        progress(min(done, blocks), blocks)
        return found

    SignRoundQuantizer.quantize_block = counted
    try:
        yield
    finally:
        SignRoundQuantizer.quantize_block = tune

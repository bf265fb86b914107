"""MiniMA: a student as the middle of its teacher, narrower everywhere by what the loss depends on (Zhang et al., arXiv 2311.07052).

With a mask ξ = 1 that each head, each channel and each feature of the hidden states is multiplied by, and the mean loss L of a batch,

    I = Σ over batches of |∂L/∂ξ|

Heads and channels are ranked in each block and features in the whole model; of all of them the same share stays, and of the blocks as many,
those in the middle. A feature is masked before the first block, and in each block in what attention and MLP write and in both sums with
what was there before. In the authors' words such a student has the optimal gap: two fifths of the teacher's parameters for a share of three
quarters, after which it is distilled by `kd` with `teacher_temperature=1`:

    L = ½ (−log q(y)) + ½ (−Σ p log q)

Numbers of features and channels that go are rounded to multiples of eight, as in the authors' program, those of
blocks at either end to the nearest whole one; of groups of heads, which go as wholes, no more than the share stays.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.architecture.uniform import Sizes
    from slimbench.methods.core.walk import Progress

_MULTIPLE = 8


@dataclass(frozen=True)
class MiniMA(Method):
    """The pruning of MiniMA without the distillation that follows.

    Attributes:
        share: Of the hidden features, the groups of heads, the channels and the blocks that stays.
    """

    name = "minima"
    citation = Citation("MiniMA", year=2023, arxiv="2311.07052")
    needs = Needs(calibration=True)

    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, both excluded, not {self.share}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if shape.num_layers < 2:
            raise Unsupported(f"a model of {shape.num_layers} block has no middle")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, remove_blocks
        from slimbench.methods.core.architecture.uniform import Kept, check, narrow, sizes_of
        from slimbench.methods.core.architecture.units import best, kinds_of
        from slimbench.methods.core.statistics import mask_gradients
        from slimbench.methods.core.walk import passes

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before, full = model.num_parameters(), sizes_of(model)
        left = self.sizes(full)
        check(model, replace(left, blocks=full.blocks))
        kinds, (first, second) = kinds_of(model), passes(dense.progress, 2)
        units = mask_gradients(model, kinds, calibration.ids, first)
        features = stream_gradients(model, calibration.ids, second)
        ends = (full.blocks - left.blocks) // 2
        removed = [*range(ends), *range(full.blocks - ends, full.blocks)]
        scores = {of: [units[name] for name, kind in kinds.items() if kind.name == of] for of in ("head_groups", "channels")}
        groups, channels = (values[ends : full.blocks - ends] for values in scores.values())
        remove_blocks(model, removed)
        kept = [best(values, left.groups) for values in groups], [best(values, left.channels) for values in channels]
        narrow(model, Kept(best(features, left.hidden), *kept))
        save_dense(model, out)
        details = {"sizes_before": asdict(full), "sizes_left": asdict(left), "blocks_removed": removed, "parameters_before": before}
        return Claim(HUGGINGFACE, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def sizes(self, full: Sizes) -> Sizes:
        """What is left: as many blocks go from either end.

        Raises:
            Unsupported: Nothing would be left of a size.
        """
        from slimbench.methods.core.architecture.uniform import Sizes

        def rounded(size: int) -> int:
            return size - round((1 - self.share) * size / _MULTIPLE) * _MULTIPLE

        left = Sizes(
            full.blocks - 2 * math.floor((1 - self.share) * full.blocks / 2 + 0.5),
            rounded(full.hidden),
            max(1, math.floor(self.share * full.groups + 1e-9)),
            rounded(full.channels),
        )
        if nothing := next((name for name, size in asdict(left).items() if size < 1), None):
            raise Unsupported(f"a share of {self.share:g} leaves no {nothing} of {getattr(full, nothing)}")
        return left


def stream_gradients(model: Any, ids: Tensor, progress: Progress | None = None) -> Tensor:
    """Σ over batches of |∂L/∂ξ| of the features of the hidden states, float32 [hidden].

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished batches.

    Raises:
        Unsupported: The model is not built like Llama and OPT.
    """
    import torch

    from slimbench.methods.core.architecture.anatomy import anatomy
    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.walk import batches

    blocks = anatomy(model)
    width = model.config.hidden_size
    slope = found = torch.zeros(width, device=model.device)

    def masked(x: Tensor) -> None:
        """Take in what a mask on x would get as a gradient."""
        values = x.detach()  # a hook that holds x itself would keep it for good

        def add(gradient: Tensor) -> None:
            nonlocal slope
            slope = slope + (values.float() * gradient.float()).flatten(0, -2).sum(0)

        x.register_hook(add)

    def entering(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        masked(states)
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    def read(_: Any, args: tuple[Tensor]) -> None:
        masked(args[0])

    def written(_: Any, __: Any, made: Tensor) -> None:
        masked(made)

    def left(_: Any, __: Any, made: Any) -> None:
        masked(made[0] if isinstance(made, tuple) else made)

    model.requires_grad_(False)
    with ExitStack() as stack:
        hooks = [blocks[0].module.register_forward_pre_hook(entering, with_kwargs=True)]
        for block in blocks:
            hooks += [layer.register_forward_hook(written) for layer in (block.attention.out, block.mlp.down)]
            hooks += [block.norms[1].register_forward_pre_hook(read), block.module.register_forward_hook(left)]
        for hook in hooks:
            stack.callback(hook.remove)
        for batch in batches(ids, model.device, progress):
            slope = torch.zeros(width, device=model.device)
            next_token(model(batch, use_cache=False).logits, batch).backward()
            found = found + slope.abs()
    return found

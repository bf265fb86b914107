"""Minitron: what is hardly active is trimmed in the whole model alike, so that an ordinary, narrower or shallower model is left.

Importance is read from the activations on calibration text, in forward passes of the unchanged model. With ā the mean over the tokens of
a sample and ‖·‖ the ℓ2 norm over the samples:

    channel c of a block     ‖ ā |x_c| ‖             x the inputs of down, what the channels make
    head i of a block        ‖ ā ‖Attn_i‖₂ ‖         of a group: the sum over the query heads that share a key and a value head
    hidden feature j         Σ ‖ ā |LN(x)_j| ‖       over the norms of all blocks
    block b                  BI_b = 1 - mean cos(x_b, x_{b+1})     or how much the loss rises when the block alone is left out

Channels and groups of heads are ranked in each block, hidden features in the whole model: the same ones leave the embedding, the norms,
the head and all that reads or writes the residual connection, and the norms then take their mean over those that are left.

The paper enumerates the sizes that fit a number of parameters and trains each a little. Here those are taken whose smallest share of the
full hidden size, groups and channels is largest, then the next smallest; recovery is another step of a pipeline. Channels are those after
the activation and the gate, as the authors' program has them; the paper writes those before. Heads go by whole groups, so the residual
of the ones that went is not added to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.architecture.anatomy import Block
    from slimbench.methods.core.architecture.uniform import Sizes
    from slimbench.methods.core.walk import Progress


@dataclass(frozen=True)
class Minitron(Smaller, Method):
    """The pruning of Minitron without the distillation that follows in the paper.

    Attributes:
        ratio: Share of the parameters of the whole model that goes at least; what is shared counts once.
        depth: Share of these that goes with whole blocks, rounded up to whole ones: 0 for width alone, 1 for depth alone.
        multiple: Hidden size and channels are cut to multiples of it.
        blocks_by: What ranks blocks: `influence` needs one forward pass, `loss` one for each block.
    """

    name = "minitron"
    citation = Citation("Minitron", year=2024, arxiv="2407.14679", covers=("pruning/minitron",))
    needs = Needs(calibration=True)

    depth: float = 0.0
    multiple: int = 32
    blocks_by: Literal["influence", "loss"] = "influence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be a share from 0 to 1, not {self.depth}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, not {self.multiple}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.depth and shape.num_layers < 2:
            raise Unsupported(f"no block can be removed from {shape.num_layers}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, remove_blocks
        from slimbench.methods.core.architecture.uniform import Kept, narrow, sizes_of
        from slimbench.methods.core.architecture.units import best
        from slimbench.methods.core.walk import passes

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before, full, left = model.num_parameters(), sizes_of(model), self.sizes(model)
        ids, narrower = calibration.ids, replace(left, blocks=full.blocks) != full
        reports = iter(passes(dense.progress, narrower + (left.blocks < full.blocks)))
        scores = activations(model, ids, next(reports)) if narrower else None
        removed = self.weakest(model, ids, full.blocks - left.blocks, next(reports)) if left.blocks < full.blocks else []
        remove_blocks(model, removed)
        if scores is not None:
            stay = [index for index in range(full.blocks) if index not in removed]
            groups = [best(scores.groups[index], left.groups) for index in stay]
            channels = [best(scores.channels[index], left.channels) for index in stay]
            narrow(model, Kept(best(scores.hidden, left.hidden), groups, channels))
        save_dense(model, out)
        details = {"sizes_before": asdict(full), "sizes_left": asdict(left), "blocks_removed": removed, "parameters_before": before}
        return Claim(HUGGINGFACE, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def sizes(self, model: Any) -> Sizes:
        """The sizes that are left of a model; nothing is cut.

        Raises:
            Unsupported: The model is not built like Llama and OPT, or no sizes fit.
        """
        from slimbench.methods.core.architecture.uniform import check, growth, parameters, sizes_of

        full, grown = sizes_of(model), growth(model)
        total = parameters(grown, full)
        most = math.floor((1 - self.ratio) * total + 1e-6)
        removed = math.ceil(self.depth * (total - most) / (total - parameters(grown, replace(full, blocks=full.blocks - 1))))
        start = replace(full, blocks=full.blocks - removed)
        refusal = f"fewer than 1 of {full.blocks} blocks would be left"
        if start.blocks > 0:
            refusal = f"no hidden size and channels in multiples of {self.multiple} leave {most} parameters or fewer"
            found = list(_candidates(start, lambda sizes: parameters(grown, sizes), most, self.multiple))
            for sizes in sorted(found, key=lambda sizes: (_shares(sizes, full), parameters(grown, sizes)), reverse=True):
                try:
                    check(model, replace(sizes, blocks=full.blocks))
                except Unsupported as error:
                    refusal = str(error)
                else:
                    return sizes
        raise Unsupported(refusal)

    def weakest(self, model: Any, ids: Tensor, count: int, progress: Progress) -> list[int]:
        """Indices of the blocks that go, `count` of them."""
        import torch

        from slimbench.methods.core.masks import lowest
        from slimbench.methods.core.statistics import block_influence

        measure = block_influence if self.blocks_by == "influence" else losses_without
        scores = torch.tensor(measure(model, ids, progress), dtype=torch.float64)
        return [int(index) for index in lowest(scores, count).nonzero()]


@dataclass
class Activations:
    """Importance by activations; float64.

    Attributes:
        hidden: Of each hidden feature, [hidden].
        groups: Of each group of heads, [groups] for each block.
        channels: [channels] for each block.
    """

    hidden: Tensor
    groups: list[Tensor]
    channels: list[Tensor]


def activations(model: Any, ids: Tensor, progress: Progress | None = None) -> Activations:
    """Importance of hidden features, groups of heads and channels.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished batches.

    Raises:
        Unsupported: The model is not built like Llama and OPT.
    """
    import torch

    from slimbench.methods.core.architecture.anatomy import anatomy
    from slimbench.methods.core.walk import batches

    blocks = anatomy(model)
    squares: dict[Any, Tensor] = {}
    samples = 0

    def add(place: Any, found: Tensor) -> None:
        """Take in activations [samples · length, …], sample by sample."""
        means = found.detach().unflatten(0, (samples, -1)).double().mean(1)
        squares[place] = squares.get(place, 0) + means.square().sum(0)

    def norm_made(module: Any, _: Any, made: Tensor) -> None:
        add(module, made.flatten(0, -2).abs())

    def heads_made(block: Block, _: Any, args: tuple[Tensor]) -> None:
        heads = args[0].flatten(0, -2).float().unflatten(-1, (block.attention.groups, -1, block.attention.head_dim))
        add((block.name, "groups"), heads.norm(dim=-1))

    def channels_made(block: Block, _: Any, args: tuple[Tensor]) -> None:
        add((block.name, "channels"), args[0].flatten(0, -2).abs())

    hooks = [norm.register_forward_hook(norm_made) for block in blocks for norm in block.norms]
    hooks += [block.attention.out.register_forward_pre_hook(partial(heads_made, block)) for block in blocks]
    hooks += [block.mlp.down.register_forward_pre_hook(partial(channels_made, block)) for block in blocks]
    try:
        with torch.inference_mode():
            for batch in batches(ids, model.device, progress):
                samples = len(batch)
                model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(
        torch.stack([squares[norm].sqrt() for block in blocks for norm in block.norms]).sum(0),
        [squares[block.name, "groups"].sqrt().sum(-1) for block in blocks],
        [squares[block.name, "channels"].sqrt() for block in blocks],
    )


def losses_without(model: Any, ids: Tensor, progress: Progress | None = None) -> list[float]:
    """Mean next-token loss of the model without each block, in nats a token.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished batches.
    """
    import torch

    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.walk import batches, passes
    from slimbench.methods.formats.architecture.structure import blocks_of

    def skip(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *made[1:]) if isinstance(made, tuple) else entering

    blocks = blocks_of(model)
    found = [0.0] * len(blocks)
    reports = passes(progress or (lambda done, total: None), len(blocks))
    for index, block in enumerate(blocks.values()):
        hook = block.register_forward_hook(skip, with_kwargs=True)
        try:
            with torch.inference_mode():
                for batch in batches(ids, model.device, reports[index]):
                    found[index] += float(next_token(model(batch, use_cache=False).logits, batch)) * len(batch) / len(ids)
        finally:
            hook.remove()
    return found


def _candidates(start: Sizes, count: Callable[[Sizes], int], most: int, multiple: int) -> Iterator[Sizes]:
    """Sizes of at most so many parameters: for each hidden size and number of groups the most channels."""
    for hidden, groups in product([*range(multiple, start.hidden, multiple), start.hidden], range(1, start.groups + 1)):
        none = replace(start, hidden=hidden, groups=groups, channels=0)
        fixed = count(none)
        fit = (most - fixed) // (count(replace(none, channels=1)) - fixed)
        channels = start.channels if fit >= start.channels else fit // multiple * multiple
        if channels > 0:
            yield replace(none, channels=channels)


def _shares(sizes: Sizes, full: Sizes) -> list[float]:
    """Shares of hidden size, groups and channels that are left, the smallest first."""
    return sorted((sizes.hidden / full.hidden, sizes.groups / full.groups, sizes.channels / full.channels))

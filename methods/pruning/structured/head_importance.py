"""Head importance (Michel et al., arXiv 1905.10650): heads go on whose outputs the loss hardly depends, round after round.

With a mask ξ_h that the outputs of head h are multiplied by, and L(x) the loss of a sample,

    I_h = E_x | ∂L(x) / ∂ξ_h |  at ξ = 1        = E_x | Σ_tokens Att_h · ∂L / ∂Att_h |

The absolute value is that of each sample: over a batch, samples that pull one way and the other would cancel. The scores of a block are
divided by their ℓ2 norm, and those of all blocks are then compared. A share of all heads goes in each round, after which importance is
measured anew. Query heads that share a key and a value head go together: the score of such a group is the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadImportance(Smaller, Method):
    """Blocks keep different numbers of heads, at least one group each; nothing is trained.

    Attributes:
        ratio: Share of all groups of heads that goes, rounded to whole ones, at least one; two fifths is what the paper's BERT can spare.
        step: Share of all groups that goes in a round.
    """

    name = "head-importance"
    citation = Citation("Are sixteen heads really better than one?", year=2019, arxiv="1905.10650", covers=("pruning/michel-et-al",))
    needs = Needs(calibration=True)
    produces = EDITED

    ratio: float = 0.4
    step: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be above 0 and at most 1, not {self.step}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        self.rounds(shape.num_kv_heads * shape.num_layers, shape.num_layers)

    def rounds(self, groups: int, blocks: int) -> list[int]:
        """How many groups go in each round.

        Raises:
            Unsupported: Blocks would lose all of theirs.
        """
        total, each = (max(1, int(share * groups + 0.5)) for share in (self.ratio, self.step))
        if total > groups - blocks:
            raise Unsupported(f"{total} of {groups} groups of heads cannot go from {blocks} blocks, each of which keeps one")
        return [min(each, total - begin) for begin in range(0, total, each)]

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.architecture.units import head_groups
        from slimbench.methods.core.walk import passes

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before, blocks = model.num_parameters(), anatomy(model)
        groups = [head_groups(block).count for block in blocks]
        rounds = self.rounds(sum(groups), len(blocks))
        for count, progress in zip(rounds, passes(dense.progress, len(rounds)), strict=True):
            found = importance(model, calibration.ids, progress)
            kinds = {block.name: head_groups(block) for block in blocks}
            gone = weakest({name: of_groups(heads, kinds[name].count) for name, heads in found.items()}, count)
            for name, chosen in gone.items():
                if bool(chosen.any()):
                    kinds[name].cut(model, (~chosen).nonzero().squeeze(1))
        save_dense(model, out)
        left = [head_groups(block).count for block in blocks]
        details = {"head_groups_before": groups, "head_groups_left": left, "rounds": rounds, "parameters_before": before}
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)


def importance(model: Any, ids: Tensor, progress: Callable[[float, float], None] | None = None) -> dict[str, Tensor]:
    """I_h of the query heads of each block, float32 [heads] by the block's full name; not divided by their norm.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished samples.

    Raises:
        Unsupported: The model is not built like Llama, OPT or Mixtral.
    """
    import torch

    from slimbench.methods.core.architecture.anatomy import anatomy
    from slimbench.methods.core.losses import next_token

    def gated(mask: Tensor, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (len(mask), -1))
        return ((heads * mask.to(heads.dtype).unsqueeze(-1)).flatten(-2),)

    model.requires_grad_(False)
    masks, hooks = {}, []
    for block in anatomy(model):
        attention = block.attention
        masks[block.name] = torch.ones(attention.groups * attention.repeats, device=model.device, requires_grad=True)
        hooks.append(attention.out.register_forward_pre_hook(partial(gated, masks[block.name])))
    found = {name: torch.zeros_like(mask, requires_grad=False) for name, mask in masks.items()}
    try:
        for done, sample in enumerate(ids.to(model.device).split(1)):
            with torch.enable_grad():
                loss = next_token(model(sample, use_cache=False).logits, sample)
            for total, gradient in zip(found.values(), torch.autograd.grad(loss, list(masks.values())), strict=True):
                total += gradient.abs() / len(ids)
            if progress:
                progress(done + 1, len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def of_groups(heads: Tensor, groups: int) -> Tensor:
    """Scores [groups] of the groups of a block, from the importance [heads] of its query heads."""
    return (heads / heads.norm().clamp_min(1e-30)).view(groups, -1).sum(1)


def weakest(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Which groups go, `count` in all blocks together, as masks [groups] by block; the best of each block stays."""
    import torch

    from slimbench.methods.core.architecture.units import best
    from slimbench.methods.core.masks import across

    spared = {name: values.index_fill(0, best(values, 1), torch.inf) for name, values in scores.items()}
    return across(spared, count)

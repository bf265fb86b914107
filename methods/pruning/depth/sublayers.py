"""SNIP, the spectral-normalized identity prior (Lin et al., arXiv 2010.01791): a sub-layer that adds little becomes an identity.

An attention or an MLP behind its norm is a function f that makes x + f(x) of the hidden states x. With the mean over the tokens of the
calibration text,

    r = E ‖f(x)‖₂ / ‖x‖₂

says how far it is from the identity x; sub-layers whose r is below a threshold are taken out, f = 0, each with its norm. Here the
threshold is the one that takes out as many as were asked for. An attention that is gone keeps no keys and values; a block that loses
both halves goes whole.

The paper trains towards that: a prior pulls every sub-layer to the identity, and spectral normalization keeps the outputs of different
ones comparable. Here the model was not trained so, and all r are those of the dense model: the choice alone is SNIP's. It is not the
SNIP of connection sensitivity (arXiv 1810.02340).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, EDITED, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.walk import Progress

Part = Literal["attention", "mlp"]
Sublayer = tuple[str, Part]
"""The full name of a block and one of its halves."""


@dataclass(frozen=True)
class SublayerDropping(Smaller, Method):
    """The attentions and MLPs go that add least to their inputs; one attention stays, and nothing is trained.

    Attributes:
        ratio: Share of the attentions and MLPs of all blocks that goes, rounded to whole ones, at least one.
    """

    name = "sublayer-dropping"
    citation = Citation("Spectral-normalized identity prior", year=2020, arxiv="2010.01791")
    needs = Needs(calibration=True)
    accepts = DENSE
    produces = EDITED

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        self.count(2 * shape.num_layers)

    def count(self, sublayers: int) -> int:
        """How many of that many go.

        Raises:
            Unsupported: None would stay.
        """
        removed = max(1, round(self.ratio * sublayers))
        if removed >= sublayers:
            raise Unsupported(f"{removed} sub-layers cannot be removed from {sublayers}, of which one attention stays")
        return removed

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, remove_blocks, remove_part
        from slimbench.methods.formats.architecture.structure import blocks_of

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before = model.num_parameters()
        sublayers = sublayers_of(model)
        removed = self.count(len(sublayers))
        found = changes(model, sublayers, calibration.ids, dense.progress)
        chosen = weakest(found, removed)
        emptied = {name for name in blocks_of(model) if all(key in chosen for key in sublayers if key[0] == name)}
        for block, part in chosen:
            if block not in emptied:
                remove_part(model, block, part)
        remove_blocks(model, [index for index, name in enumerate(blocks_of(model)) if name in emptied])
        save_dense(model, out)
        details: dict[str, Any] = {"parameters_before": before}
        for of in ("attention", "mlp"):
            details[f"{of}_removed"] = [block for block, part in chosen if part == of]
            details[f"{of}_change"] = [round(value, 6) for (_, part), value in found.items() if part == of]
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)


def sublayers_of(model: Any) -> dict[Sublayer, tuple[Any, Any]]:
    """The attentions and MLPs that are there, in the order in which they run: the norm before each, and the module that ends it.

    Raises:
        Unsupported: The model is not built like Llama, OPT or Mixtral, or a half of a block of it cannot be left out.
    """
    from slimbench.methods.formats.architecture.layout import layout_of
    from slimbench.methods.formats.architecture.modules import NoAttention, Nothing, ShortcutBlock
    from slimbench.methods.formats.architecture.structure import blocks_of

    if len(set(getattr(model.config, "layer_types", None) or [None])) > 1:
        raise Unsupported(f"the attentions of {type(model).__name__} are of different kinds, and each kind has its place in the cache")
    found: dict[Sublayer, tuple[Any, Any]] = {}
    for name, block in blocks_of(model).items():
        layout = layout_of(block)
        if isinstance(block, ShortcutBlock):
            raise Unsupported(f"{name} stands between hidden states of different coordinates, and no half of it can be left out")
        halves: dict[Part, tuple[str, str]] = {"attention": (layout.norms[0], layout.attention), "mlp": (layout.norms[1], layout.mlp[-1])}
        for part, (norm, last) in halves.items():
            if not isinstance(block.get_submodule(last), NoAttention | Nothing):
                found[name, part] = (block.get_submodule(norm), block.get_submodule(last))
    return found


def changes(model: Any, sublayers: dict[Sublayer, tuple[Any, Any]], ids: Tensor, progress: Progress | None = None) -> dict[Sublayer, float]:
    """r of each sub-layer.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished batches.
    """
    import torch

    from slimbench.methods.core.walk import batches

    sums = dict.fromkeys(sublayers, 0.0)
    entering: dict[Sublayer, Tensor] = {}

    def enter(key: Sublayer, _: Any, args: tuple[Tensor]) -> None:
        entering[key] = args[0].double().norm(dim=-1).flatten()

    def leave(key: Sublayer, _: Any, __: Any, made: Any) -> None:
        added = (made[0] if isinstance(made, tuple) else made).double().norm(dim=-1).flatten()
        sums[key] += float((added / entering.pop(key).clamp_min(1e-30)).sum())

    hooks = [norm.register_forward_pre_hook(partial(enter, key)) for key, (norm, _) in sublayers.items()]
    hooks += [last.register_forward_hook(partial(leave, key)) for key, (_, last) in sublayers.items()]
    try:
        with torch.inference_mode():
            for batch in batches(ids, model.device, progress):
                model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: total / ids.numel() for key, total in sums.items()}


def weakest(found: dict[Sublayer, float], count: int) -> list[Sublayer]:
    """The sub-layers with the lowest r, `count` of them, in the order in which they run; the attention of the highest r stays."""
    import torch

    from slimbench.methods.core.architecture.units import best
    from slimbench.methods.core.masks import lowest

    scores = torch.tensor(list(found.values()), dtype=torch.float64)
    attentions = torch.tensor([index for index, (_, part) in enumerate(found) if part == "attention"])
    scores[attentions[best(scores[attentions], 1)]] = torch.inf
    return [key for key, gone in zip(found, lowest(scores, count).tolist(), strict=True) if gone]

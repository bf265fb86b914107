"""What calibration tells of linear layers, ranges, means and second moments of inputs and gradients of weights, and of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.losses import next_token
from slimbench.methods.core.walk import Block, Progress, batches, walk
from slimbench.methods.formats.architecture.structure import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimbench.methods.core.architecture.units import Structures

_SAMPLE = 512


@dataclass
class Inputs:
    """Statistics of the inputs [tokens, in] of a layer over the calibration tokens; all float32.

    Attributes:
        low: Smallest value of each channel, [in].
        high: Largest value of each channel, [in].
        mean: Of each channel, [in].
        squares: Mean of the squares of each channel, [in].
        gram: Mean of x xᵀ, [in, in]; None unless it was asked for.
        tokens: How many there were.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    squares: Tensor
    gram: Tensor | None = None
    tokens: int = 0

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel, [in]."""
        return torch.maximum(-self.low, self.high).clamp_min(0)

    @property
    def variance(self) -> Tensor:
        """Of each channel over the tokens, [in]; not corrected for their number."""
        return (self.squares - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ of each channel over all tokens, [in]."""
        return (self.squares * self.tokens).sqrt()

    def add(self, x: Tensor, gram: bool) -> None:
        """Take in the inputs [tokens, in] of one batch."""
        x = x.float()
        share = len(x) / (self.tokens + len(x))
        self.tokens += len(x)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.mean += share * (x.mean(0) - self.mean)
        self.squares += share * (x.square().mean(0) - self.squares)
        if gram:
            now = x.T @ x / len(x)
            self.gram = now if self.gram is None else self.gram + share * (now - self.gram)


def inputs(block: Block, layers: Sequence[str] | None = None, gram: bool = False) -> dict[str, Inputs]:
    """Statistics of the inputs of the linear layers of a block, by full name; those of other layers than the wanted are left out."""
    found: dict[str, Inputs] = {}

    def observe(name: str, x: Tensor) -> None:
        if name not in found:
            width = x.shape[1]
            far = torch.full((width,), torch.inf, device=x.device)
            found[name] = Inputs(far, -far, torch.zeros(width, device=x.device), torch.zeros(width, device=x.device))
        found[name].add(x, gram)

    block.observe(observe, layers)
    return found


def samples(block: Block, layers: Sequence[str], tokens: int = _SAMPLE) -> dict[str, Tensor]:
    """Inputs [about `tokens`, in] of some layers, evenly spread over each batch; float32."""
    found: dict[str, list[Tensor]] = {}
    total = sum(hidden.shape[0] * hidden.shape[1] for hidden in block.inputs)
    step = max(1, total // tokens)
    block.observe(lambda name, x: found.setdefault(name, []).append(x[::step].float()), layers)
    return {name: torch.cat(parts) for name, parts in found.items()}


def of_model(model: PreTrainedModel, ids: Tensor, progress: Progress | None = None, gram: bool = False) -> dict[str, Inputs]:
    """Statistics of the inputs of all linear layers in the blocks of an unchanged model."""
    return {name: statistics for block in walk(model, ids, progress) for name, statistics in inputs(block, gram=gram).items()}


def gradients(
    model: PreTrainedModel, layers: Sequence[nn.Linear], ids: Tensor, progress: Progress | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """For one sample after the other the gradients [out, in] of its mean next-token loss for the weights of some layers.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished samples.
    """
    model.requires_grad_(False)
    weights = [layer.weight.requires_grad_(True) for layer in layers]
    try:
        for done, sample in enumerate(ids.to(model.device).split(1)):
            with torch.enable_grad():
                loss = next_token(model(sample, use_cache=False).logits, sample)
            yield torch.autograd.grad(loss, weights)
            if progress:
                progress(done + 1, len(ids))
    finally:
        model.requires_grad_(False)


def mask_gradients(
    model: PreTrainedModel, kinds: Mapping[str, Structures], ids: Tensor, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Σ over batches of |∂L/∂ξ| [count] of units, by the full name of the layer that reads them.

    L is the mean next-token loss of a batch, and ξ = 1 what each unit is multiplied by. No parameter has a gradient afterwards.

    Args:
        kinds: Of the units, by the same names.
        ids: Token ids, int64 [samples, length].
        progress: Told of finished batches.
    """
    from slimbench.methods.core.learning.gates import multiplied

    model.requires_grad_(False)
    ones = {name: torch.ones(kind.count, device=kind.reads.weight.device, requires_grad=True) for name, kind in kinds.items()}
    found = {name: torch.zeros(kind.count, device=kind.reads.weight.device) for name, kind in kinds.items()}
    for batch in batches(ids, model.device, progress):
        with multiplied(kinds, ones):
            lost = next_token(model(batch, use_cache=False).logits, batch)
        for name, slopes in zip(ones, torch.autograd.grad(lost, list(ones.values())), strict=True):
            found[name] += slopes.abs()
    return found


def block_influence(model: PreTrainedModel, ids: Tensor, progress: Progress | None = None, last: bool = False) -> list[float]:
    """One minus the mean cosine between the inputs and the outputs of each block: how much it turns the hidden states.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished batches.
        last: Look at the last token of each sample alone, in place of all.

    Raises:
        Unsupported: The model has no list of blocks.
    """
    blocks = blocks_of(model)
    cosines = [0.0] * len(blocks)

    def add(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"], made[0] if isinstance(made, tuple) else made
        before, after = (state[:, -1:].double() if last else state.double() for state in states)
        cosines[index] += float(torch.cosine_similarity(before, after, dim=-1).sum())

    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, made, index=index: add(index, args, kwargs, made), with_kwargs=True)
        for index, block in enumerate(blocks.values())
    ]
    try:
        with torch.inference_mode():
            for batch in batches(ids, model.device, progress):
                model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [1 - total / (len(ids) if last else ids.numel()) for total in cosines]

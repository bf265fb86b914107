"""The blocks of a decoder one after another, each with the inputs that calibration brings to it.

Methods that compress block by block work on what the compressed blocks before have made of the calibration text, so that a block
can make up for the errors of its predecessors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.formats.architecture.structure import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 2048

Observer = Callable[[str, Tensor], None]
"""Told the full name of a linear layer and its inputs [tokens, in] of one batch."""


Progress = Callable[[float, float], None]
"""Told how much of the work is done, (done, total)."""


def passes(progress: Progress, count: int) -> list[Progress]:
    """Reports of several passes, one after the other, as that of one."""

    def of(index: int) -> Progress:
        return lambda done, total: progress(index * total + done, count * total)

    return [of(index) for index in range(count)]


def batches(ids: Tensor, device: torch.device | str, progress: Progress | None = None) -> Iterator[Tensor]:
    """Tokens [samples, length] in batches of about two thousand, on a device; each is reported once the caller is done with it."""
    parts = ids.split(max(1, _BATCH_TOKENS // ids.shape[1]))
    for done, part in enumerate(parts):
        yield part.to(device)
        if progress:
            progress(done + 1, len(parts))


class _Caught(Exception):
    """Ends a forward pass when nothing more is wanted of it."""


@dataclass
class Block:
    """One decoder block.

    Attributes:
        name: Full name of the block in the model.
        inputs: Hidden states [samples, length, hidden] of each batch, as the blocks before, compressed ones included, made them.
        arguments: What else the block is called with, for each batch: masks, positions. Blocks of one model may get different ones.
        dense_inputs: Hidden states of each batch as the uncompressed blocks made them; empty unless they were asked for.
        dense_outputs: What this block makes of `dense_inputs` before it is compressed.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    arguments: list[dict[str, Any]]
    dense_inputs: list[Tensor] = field(default_factory=list)
    dense_outputs: list[Tensor] = field(default_factory=list)

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of the block by their full name, in the order in which the module holds them."""
        return {f"{self.name}.{name}": layer for name, layer in self.module.named_modules() if type(layer) is nn.Linear}

    def run(self, batch: int, hidden: Tensor | None = None) -> Tensor:
        """Outputs [samples, length, hidden] of the block for one batch, of its own inputs or of other ones. Gradients flow if enabled."""
        made = self.module(self.inputs[batch] if hidden is None else hidden, **self.arguments[batch])
        return made[0] if isinstance(made, tuple) else made

    @torch.no_grad()
    def observe(self, observer: Observer, layers: Sequence[str] | None = None, dense: bool = False) -> None:
        """Run all batches through the block and show the inputs of its linear layers.

        Args:
            layers: Full names of those to watch; all if None.
            dense: Run `dense_inputs` instead of `inputs`.
        """
        watched = self.linears()
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: observer(name, args[0].detach().flatten(0, -2)))
            for name, layer in watched.items()
            if layers is None or name in layers
        ]
        try:
            for batch, hidden in enumerate(self.dense_inputs if dense else self.inputs):
                self.run(batch, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def inputs_of(self, layers: Sequence[str], batch: int, dense: bool = False) -> dict[str, Tensor]:
        """Inputs [tokens, in] of some linear layers for one batch; layers that no token reaches are left out.

        The pass ends where the last of the layers begins, so that looking at early layers costs little.

        Args:
            layers: Full names.
            dense: Run `dense_inputs` instead of `inputs`.
        """
        seen: dict[str, Tensor] = {}

        def catch(name: str, x: Tensor) -> None:
            seen[name] = x.detach().flatten(0, -2)
            if len(seen) == len(layers):
                raise _Caught

        watched = self.linears()
        hooks = [watched[name].register_forward_pre_hook(lambda _, args, name=name: catch(name, args[0])) for name in layers]
        try:
            self.run(batch, self.dense_inputs[batch] if dense else None)
        except _Caught:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def stages(self) -> list[list[str]]:
        """The linear layers in the order in which they run; those that read the very same inputs stand together."""
        seen = self.inputs_of(list(self.linears()), 0)
        stages: list[list[str]] = []
        for name, x in seen.items():
            shared = stages and seen[stages[-1][0]].data_ptr() == x.data_ptr() and seen[stages[-1][0]].shape == x.shape
            if shared:
                stages[-1].append(name)
            else:
                stages.append([name])
        return stages + [[name] for name in self.linears() if name not in seen]


def walk(
    model: PreTrainedModel,
    ids: Tensor,
    progress: Progress | None = None,
    dense: bool = False,
    samples: int = 1,
) -> Iterator[Block]:
    """Yield the blocks in order; whatever the caller did to a block counts for the inputs of the next one.

    Args:
        model: In evaluation mode; changed in place by the caller.
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished blocks.
        dense: Keep the stream of the uncompressed model beside that of the compressed one.
        samples: How many a batch holds at least; all if there are fewer.
    """
    blocks = blocks_of(model)
    hidden, arguments = _inputs(model, list(blocks.values()), _batches(ids, samples))
    stream = list(hidden) if dense else []
    for index, (name, module) in enumerate(blocks.items()):
        block = Block(name, module, hidden, arguments[index], stream)
        if dense:
            with torch.no_grad():
                block.dense_outputs = [block.run(batch, states) for batch, states in enumerate(stream)]
        yield block
        with torch.no_grad():
            hidden = [block.run(batch) for batch in range(len(hidden))]
        stream = block.dense_outputs
        if progress:
            progress(index + 1, len(blocks))


def _batches(ids: Tensor, samples: int) -> Sequence[Tensor]:
    """Batches of about two thousand tokens that differ by one sample at most."""
    whole = max(1, _BATCH_TOKENS // ids.shape[1])
    return ids.tensor_split(max(1, min(math.ceil(len(ids) / whole), len(ids) // samples)))


class _PassedOn(Tensor):
    """Hidden states in the place of a block's outputs, for models that take these as they are and for those that take the first of them."""

    def __getitem__(self, index: Any) -> Any:
        return self if index == 0 else super().__getitem__(index)


@torch.no_grad()
def _inputs(model: PreTrainedModel, blocks: list[nn.Module], batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Hidden states of each batch before the first block, and the further arguments of each block for each batch.

    No block runs: each passes on what it gets, and the last one ends the pass.
    """
    hidden: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = [[] for _ in blocks]

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor:
        states = args[0] if args else kwargs.pop("hidden_states")
        arguments[index].append(kwargs | {"past_key_values": None, "use_cache": False})
        if index == 0:
            hidden.append(states)
        if index == len(blocks) - 1:
            raise _Caught
        return states.as_subclass(_PassedOn)

    for index, block in enumerate(blocks):
        block.forward = partial(stand_in, index)
    try:
        for batch in batches:
            try:
                model(batch.to(model.device), use_cache=False)
            except _Caught:
                continue
    finally:
        for block in blocks:
            del block.forward
    return hidden, arguments

"""What the attention and the MLP of a block cost by how many structures they have: seconds, or multiplications in their place.

A table holds the cost of each size by kind of structure (`core.architecture.units`); of a part that is gone it is nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimbench.methods.core.architecture.units import Structures, structures

if TYPE_CHECKING:
    from slimbench.methods.core.architecture.anatomy import Block

_SHRINK, _STEPS = 0.9, 42
_WARM, _REPEATS = 2, 9

Table = dict[str, dict[int, float]]
"""Cost by kind of structure and by their number."""


def sizes_of(kind: Structures, none: bool) -> list[int]:
    """How many structures the levels of a layer leave, falling; the last is 0 if `none` may be left."""
    if kind.name == "head_groups":
        return list(range(kind.count, -none, -1))
    left = {max(1, round(kind.count * _SHRINK**power)) for power in range(_STEPS + 1)}
    return sorted(left, reverse=True) + [0] * none


def products(model: Any, block: Block, batch: int, length: int) -> tuple[Table, float]:
    """Multiplications in place of seconds; see `measured`."""
    table: Table = {}
    for kind in structures(block):
        each = sum(layer.weight.numel() for layer in (*kind.makes, kind.reads)) * batch * length / kind.count
        if kind.name == "head_groups":
            each += 2 * block.attention.q.out_features * batch * length**2 / kind.count
        table[kind.name] = {size: each * size for size in sizes_of(kind, True)}
    return table, float(model.get_output_embeddings().weight.numel() * batch)


def measured(model: Any, block: Block, batch: int, length: int) -> tuple[Table, float]:
    """Seconds that attention and MLP of a block, each with the norm before it, take for some sequences.

    Returns:
        The table, and the seconds of a pass of the whole model outside of the attentions and MLPs of its blocks, all alike.
    """
    import torch
    from torch import nn

    from slimbench.methods.core.architecture.anatomy import block_of
    from slimbench.methods.formats.architecture.layout import layout_of
    from slimbench.methods.formats.architecture.structure import blocks_of

    layout, seen = layout_of(block.module), {}

    def see(name: str) -> Callable[..., None]:
        def called(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = args, kwargs

        return called

    names = (*layout.norms, layout.attention, layout.mlp[0])
    hooks = [block.module.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True) for name in names]
    try:
        one_pass(model, batch, length)()
    finally:
        for hook in hooks:
            hook.remove()
    holder: Any = nn.Module()
    holder.config, holder.block = model.config, copy.deepcopy(block.module)

    def attend() -> None:
        call(layout.norms[0])
        call(layout.attention)

    def feed() -> None:
        call(layout.norms[1])
        states = call(layout.mlp[0])
        for name in layout.mlp[1:]:
            states = holder.block.get_submodule(name)(states)

    def call(name: str) -> Any:
        args, kwargs = seen[name]
        return holder.block.get_submodule(name)(*args, **kwargs)

    device, table = model.device.type, Table()
    for place, run in enumerate((attend, feed)):
        kind = structures(block_of(holder, "block", holder.block))[place]
        row = table[kind.name] = {}
        for size in sizes_of(kind, True):
            if size:
                now = structures(block_of(holder, "block", holder.block))[place]
                if size < now.count:
                    now.cut(holder, torch.arange(size))
            row[size] = seconds(run, device) if size else 0.0
    spent = len(blocks_of(model)) * sum(next(iter(row.values())) for row in table.values())
    return table, max(0.0, seconds(one_pass(model, batch, length), device) - spent)


def one_pass(model: Any, batch: int, length: int) -> Callable[[], None]:
    """A pass over so many sequences of so many tokens, with the logits of the last."""
    import torch

    ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)

    def run() -> None:
        states = model.base_model(ids, use_cache=False).last_hidden_state
        model.get_output_embeddings()(states[:, -1:])

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """The least of some runs without gradients, after some that do not count: what else a machine does only adds to them."""
    import torch

    taken = []
    with torch.no_grad():
        for _ in range(_WARM + _REPEATS):
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    return min(taken[_WARM:])

"""What runs of a loaded model meanwhile, by hooks: rows of each matrix, of blocks, of passes, and keys that attentions were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

from slimbench.harness.measure.evidence import products
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of


@dataclass
class Count:
    """What ran in one decode step, or in whatever else was watched.

    Attributes:
        passes: Rows of each pass: of each call of the projection to keys of the last block, which no token leaves out.
        products: Parameters of matrices times rows that went through them.
        blocks: Rows that went through the feed-forward part of a block, over all blocks, those of a draft model among them.
        reads: Of each call of the attention, the keys that it was given: a mask hides some from a query and frees none.
        calls: Parameters of the matrices that took part in calls of so many rows, each as often as it did.
    """

    passes: list[int] = field(default_factory=list)
    products: int = 0
    blocks: int = 0
    reads: list[int] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)


class _Attentions(TorchFunctionMode):
    """Sees each call of torch's attention."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.count.reads.append(args[1].shape[2])
        return func(*args, **kwargs)


@contextmanager
def counted(module: Any) -> Iterator[Count]:
    """Count what runs of a causal language model meanwhile.

    Raises:
        methods.base.Unsupported: Its last block has no projection to keys of its own.
    """
    count = Count()
    with matrices(module, count), _Attentions(count):
        yield count


@contextmanager
def matrices(module: Any, count: Count) -> Iterator[None]:
    """As `counted`, without the keys: to see them costs a call of Python for each operator of torch."""
    handles = []

    def watch(layer: Any, change: Callable[[int], None]) -> None:
        handles.append(layer.register_forward_hook(lambda _, inputs, output: change(_rows(inputs, output))))

    def products_of(parameters: int) -> Callable[[int], None]:
        def add(rows: int) -> None:
            if rows:  # a head whose logits are all known is called with none
                count.products += parameters * rows
                count.calls[rows] += parameters

        return add

    def block(rows: int) -> None:
        count.blocks += rows

    blocks = list(blocks_of(module).values())
    last = layout_of(blocks[-1])
    try:
        watch(blocks[-1].get_submodule(last.attention).get_submodule(last.queries[1]), count.passes.append)
    except AttributeError as error:
        raise Unsupported("the last block has no projection to keys of its own, by which passes are counted") from error
    if (draft := getattr(module, "draft", None)) is not None:
        blocks += blocks_of(draft).values()
    for layer, parameters in products(module):
        watch(layer, products_of(parameters))
    for found in blocks:
        watch(found.get_submodule(layout_of(found).mlp[0]), block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: tuple[Any, ...], output: Any) -> int:
    given = inputs[0] if inputs else output
    return int(given.numel() // given.shape[-1])

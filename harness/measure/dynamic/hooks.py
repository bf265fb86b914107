"""What runs of a loaded model meanwhile, by hooks: rows and bytes of matrices, rows of blocks and passes, keys that attentions were given.

A model that guesses for another one is a part of it, and is counted apart: its matrices have other bytes, and a call of them other times.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from slimbench.harness.measure.evidence import bytes_of, experts, products
from slimbench.harness.schema.work import DRAFT, WHOLE
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of


@dataclass(frozen=True)
class Matrix:
    """A layer that multiplies.

    Attributes:
        layer: Of a loaded model.
        part: To which it belongs.
        parameters: That it stands for; those of one of its `experts`.
        bytes: That a call of it reads; the same.
        experts: How many have their matrices in it, of which a call names some for each token; None of a plain layer.
    """

    layer: Any
    part: str
    parameters: int
    bytes: int
    experts: int | None = None

    @property
    def copies(self) -> int:
        """How often it holds so many parameters and bytes."""
        return self.experts or 1


def parts_of(module: Any) -> Mapping[str, Sequence[Any]]:
    """The parts that what guesses for a model tells apart, by name (`methods.formats.draft.speculation.Drafter.parts`); none without."""
    drafter = getattr(module, "drafter", None)
    found: Mapping[str, Sequence[Any]] = drafter.parts() if drafter is not None else {}
    return found


def matrices_of(module: Any) -> list[Matrix]:
    """The layers of a causal language model that multiply, those of its draft among them."""
    draft = getattr(module, "draft", None)
    owners: dict[str, Sequence[Any]] = {DRAFT: [] if draft is None else [draft], **parts_of(module)}
    parts = {id(layer): part for part, found in owners.items() for owner in found for layer in owner.modules()}
    plain = [Matrix(layer, parts.get(id(layer), WHOLE), parameters, bytes_of(layer)) for layer, parameters in products(module)]
    return plain + [
        Matrix(layer, parts.get(id(layer), WHOLE), parameters, bytes_of(layer) // count, count)
        for layer, count, parameters in experts(module)
    ]


@dataclass
class Count:
    """What ran in one decode step, or in whatever else was watched.

    Attributes:
        passes: Rows of each pass: of each call of the projection to keys of the last block, which none behind a prompt leaves out.
        products: Parameters of matrices times rows that went through them.
        blocks: Rows that went through the feed-forward part of a block, over all blocks, those of a draft model among them.
        reads: Of each call of the attention, the keys that it was given: a mask hides some from a query and frees none.
        calls: By part, parameters of the matrices that took part in calls of so many rows, each as often as it did, without those of
            experts, which have some of the rows each.
        read: By part, bytes of the matrices that took part, each as often as it was called.
        drafts: Rows of each pass of a draft model.
        tokens: That the embedding was asked for.
        experts: Of each token in each layer that has some, those that it was sent to.
    """

    passes: list[int] = field(default_factory=list)
    products: int = 0
    blocks: int = 0
    reads: list[int] = field(default_factory=list)
    calls: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    read: Counter[str] = field(default_factory=Counter)
    drafts: list[int] = field(default_factory=list)
    tokens: int = 0
    experts: list[int] = field(default_factory=list)


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
def counted(module: Any, known: Sequence[Matrix] | None = None) -> Iterator[Count]:
    """Count what runs of a causal language model meanwhile.

    Args:
        known: Its matrices, where they have been looked for already.

    Raises:
        methods.base.Unsupported: Its last block has no projection to keys of its own; or, in a call, it does not say which experts a token
            is sent to.
    """
    count = Count()
    with watched(module, count, known), _Attentions(count):
        yield count


@contextmanager
def watched(module: Any, count: Count, known: Sequence[Matrix] | None = None) -> Iterator[None]:
    """As `counted`, without the keys: to see them costs a call of Python for each operator of torch."""
    handles = []

    def watch(layer: Any, change: Callable[[int], None]) -> None:
        handles.append(layer.register_forward_hook(lambda _, inputs, output: change(_rows(inputs, output))))

    def products_of(matrix: Matrix) -> Callable[[int], None]:
        def add(rows: int) -> None:
            if rows:  # a head whose logits are all known is called with none
                count.products += matrix.parameters * rows
                count.calls[matrix.part][rows] += matrix.parameters
                count.read[matrix.part] += matrix.bytes

        return add

    def block(rows: int) -> None:
        count.blocks += rows

    def embedded(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count.tokens += output.numel() // output.shape[-1]

    try:
        handles.append(module.get_input_embeddings().register_forward_hook(embedded))
        for owner, passes in ((module, count.passes), (getattr(module, "draft", None), count.drafts)):
            if owner is None:
                continue
            blocks = list(blocks_of(owner).values())
            last = layout_of(blocks[-1])
            try:
                watch(blocks[-1].get_submodule(last.attention).get_submodule(last.queries[1]), passes.append)
            except AttributeError as error:
                if owner is module:
                    raise Unsupported("the last block has no projection to keys of its own, by which passes are counted") from error
            for found in blocks:
                watch(found.get_submodule(layout_of(found).mlp[0]), block)
        for matrix in matrices_of(module) if known is None else known:
            if matrix.experts is None:
                watch(matrix.layer, products_of(matrix))
            else:
                handles.append(matrix.layer.register_forward_pre_hook(_Sent(matrix, count), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sent:
    """Counts the rows of each expert: a call of their layer names those of each token, int64 [T, k]."""

    def __init__(self, matrix: Matrix, count: Count) -> None:
        self._matrix, self._count = matrix, count

    def __call__(self, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        matrix, count = self._matrix, self._count
        given = [one for one in (*inputs, *named.values()) if isinstance(one, torch.Tensor) and not one.is_floating_point()]
        if not given:
            raise Unsupported(f"{type(layer).__name__} is not told which experts a token is sent to")
        there = (given[0] >= 0) & (given[0] < matrix.copies)
        rows = given[0][there].bincount(minlength=matrix.copies)
        count.experts += there.sum(-1).flatten().tolist()
        count.products += matrix.parameters * int(rows.sum())
        count.read[matrix.part] += matrix.bytes * int((rows > 0).sum())


def _rows(inputs: tuple[Any, ...], output: Any) -> int:
    given = inputs[0] if inputs else output
    return int(given.numel() // given.shape[-1])

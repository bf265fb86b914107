"""A pass over compiled graphs: products of the same inputs with several weights become one call, as for queries, keys and values."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.util.compat.inductor import CustomGraphPass, get_hash_for_files, operator_name
from slimbench.util.compat.torch import buffers

_VIEWS = ("view", "_unsafe_view", "reshape")


class ShareInputs(CustomGraphPass):
    """Replaces `packed_mm` calls with the same inputs by one `packed_mm_shared`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        calls: dict[tuple[Any, str], list[torch.fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=torch.ops.slimbench.packed_mm.default):
            if all(weight.op in ("placeholder", "get_attr") for weight in node.all_input_nodes if weight is not node.args[0]):
                calls[_source(node.args[0]), str(node.args[0].meta["val"].shape)].append(node)
        for nodes in calls.values():
            if len(nodes) > 1:
                _join(graph, nodes)

    def uuid(self) -> bytes:
        return get_hash_for_files((str(Path(__file__)),))


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Whether the pass makes one call of these layers, if they have the same inputs."""
    return len(layers) > 1 and all(getattr(layer, "kernel", None) == OwnCpu.name for layer in layers)


def joined(layers: Sequence[Any]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The call that the pass makes of layers with the same inputs [rows, in]; outputs [rows, out] of each."""
    kept = [buffers(layer) for layer in layers]
    weights = [each["weight_packed"] for each in kept], [each["scales"] for each in kept], [each.get("offsets") for each in kept]
    sizes = [layer.grid.bits for layer in layers], [layer.out_features for layer in layers]
    return lambda x: torch.ops.slimbench.packed_mm_shared(x, *weights, *sizes)


def _source(node: Any) -> Any:
    """The node behind views that only change the shape."""
    while node.op == "call_function" and operator_name(node) in _VIEWS:
        node = node.args[0]
    return node


def _join(graph: torch.fx.Graph, nodes: list[torch.fx.Node]) -> None:
    first = nodes[0]
    for weight in (weight for node in nodes for weight in node.all_input_nodes):
        if weight.op == "get_attr" and weight > first:
            first.prepend(weight)
    lists = [[node.args[index] for node in nodes] for index in range(1, 6)]
    with graph.inserting_before(first):
        joined = graph.call_function(torch.ops.slimbench.packed_mm_shared.default, (first.args[0], *lists))
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (joined, index))
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)

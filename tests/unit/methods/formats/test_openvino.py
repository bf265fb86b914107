"""Packed models as OpenVINO graphs: their codes and scales are kept, and give the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Unsupported
from slimbench.methods.formats import openvino as graphs
from slimbench.methods.formats import packed
from slimbench.methods.quantization.activation.fp8 import FP8Weight
from slimbench.methods.quantization.activation.int8_dynamic import Int8Dynamic
from slimbench.methods.quantization.weight.lorc import LoRC
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

openvino = pytest.importorskip("openvino", reason="needs the extra `engines`")


def made(method: Any, folder: Path, **shape: Any) -> Path:
    """The packed artefact of a tiny model."""
    (out := folder / "packed").mkdir()
    method.compress(tiny.save_model(folder / "dense", **shape), None, out)
    return out


def weights(graph: Any) -> list[tuple[torch.Tensor, set[str]]]:
    """Each matrix that is stored in codes, as the runtime expands it, with the types of its constants."""
    found = []
    for node in graph.get_ops():
        if node.get_type_name() != "Convert" or node.input_value(0).get_node().get_type_name() != "Reshape":
            continue
        constants, waiting = set(), [node]
        while waiting:
            here = waiting.pop()
            waiting += [source.get_node() for source in here.input_values()]
            if here.get_type_name() == "Constant" and here.get_output_partial_shape(0).rank.get_length() == 3:
                constants.add(here.get_element_type().get_type_name())
        if constants:
            alone = openvino.Model([openvino.opset13.result(node)], [])
            ((value,),) = [openvino.Core().compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})([]).values()]
            found.append((torch.from_numpy(value), constants))
    return found


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=4, group_size=32),
        RTN(bits=4, group_size=None),
        RTN(bits=4, group_size=32, head_bits=8),
        RTN(bits=4, group_size=64, head_bits=4),
        RTN(bits=8, group_size=64),
        RTN(bits=8, group_size=None),
    ],
    ids=repr,
)
def test_a_graph_has_the_weights_of_the_artefact(method: Any, tmp_path: Path) -> None:
    folder = made(method, tmp_path)
    found = weights(graphs.load_packed(folder))
    layers = [layer for layer in packed.load(folder).modules() if isinstance(layer, packed.PackedLinear)]
    assert len(found) == len(layers) == (15 if method.head_bits else 14)
    left = [weight for weight, _ in found]
    for layer in layers:
        near = [index for index, weight in enumerate(left) if weight.shape == layer.dequantize().shape]
        errors = {index: float((left[index] - layer.dequantize().float()).abs().max()) for index in near}
        best = min(errors, key=errors.__getitem__)
        assert errors[best] <= 2**-8 * float(left[best].abs().max()), "the runtime's own products are not rounded to bfloat16"
        left.pop(best)
    types = [constants for _, constants in found]
    assert all(constants in ({"i4", "f16"}, {"i8", "f16"}) for constants in types)
    assert sum("i4" in constants for constants in types) == {4: 14, 8: 0}[method.bits] + (method.head_bits == 4)


def test_scales_that_two_bytes_do_not_hold_stay_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = made(RTN(bits=4, group_size=32), tmp_path)
    tensors = load_file(folder / packed.WEIGHTS)
    name = next(key for key in tensors if key.endswith("scales"))
    tensors[name][0, 0] = 3e-8
    save_file(tensors, folder / packed.WEIGHTS)
    types = [constants for _, constants in weights(graphs.load_packed(folder))]
    assert sum(constants == {"i4", "f16"} for constants in types) == 13


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RTN(bits=4, group_size=32, symmetric=False), "offsets"),
        (LoRC(bits=4, group_size=32), "a low-rank part"),
        (RTN(bits=3, group_size=32), "it takes integers of 4 and 8 bits"),
        (Int8Dynamic(), "whose inputs keep their dtype"),
        (FP8Weight(), "it takes integers"),
    ],
    ids=repr,
)
def test_what_a_graph_would_not_hold_is_refused(method: Any, reason: str, tmp_path: Path) -> None:
    folder = made(method, tmp_path)
    with pytest.raises(Unsupported, match=f"OpenVINO.*{reason}"):
        graphs.load_packed(folder)

"""OpenVINO graphs: of a dense source, of artefacts of format `openvino`, and of packed ones whose codes and scales they keep.

A matrix [out, in] of a packed artefact becomes what the runtime knows as a compressed weight, multiplied as it is stored:

    codes, int4 or int8 [out, groups, in / groups] → float16 → × scales [out, groups, 1] → reshape [out, in] → float32

Scales are float16 where that holds them all, else float32, and codes become what they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimbench.methods.base import Unsupported
from slimbench.methods.formats import decoder_graph as _decoder
from slimbench.methods.formats.packed_layers import check_symmetric
from slimbench.util import files

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.kernels.grid import QuantizedWeight

IR = "openvino_model.xml"
"""The graph of an artefact of format `openvino`; its constants lie beside it in `openvino_model.bin`."""

_BEAM = "beam"
_STORED = {4: "i4", 8: "i8"}
"""The type of codes by their bits."""


def load_dense(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The graph of a dense source, its matrices in float16."""
    return _halved(convert(folder, trust_remote_code))


def load_packed(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The graph of a packed artefact: its layers keep codes and scales, its other matrices are in float16.

    Raises:
        methods.base.Unsupported: A layer is not stored as 4-bit or 8-bit integers on a symmetric grid, or the model cannot be exported.
    """
    from torch import nn

    from slimbench.methods.formats import packed, storage
    from slimbench.methods.kernels.grid import Grid

    layout = storage.described(folder, packed.DESCRIPTION, packed.SCHEMA)
    kept: dict[str, QuantizedWeight] = {}

    def build(name: str, parts: dict[str, Tensor]) -> nn.Linear:
        grid = Grid(**layout(name))
        check_symmetric(name, parts.keys(), "OpenVINO")
        if grid.bits not in _STORED or grid.activation_bits or grid.number != "int":
            raise Unsupported(f"OpenVINO does not store {name}: it takes integers of 4 and 8 bits, of layers whose inputs keep their dtype")
        kept[name] = packed.weight_of(grid, parts)
        weight, bias = kept[name].dequantize().float(), parts.get("bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.float())
        return layer

    def embedding(head: nn.Linear) -> nn.Embedding:
        made = nn.Embedding(head.out_features, head.in_features, device="meta")
        made.weight = head.weight
        return made

    model = storage.load(folder, "cpu", "qweight", build, embedding, trust_remote_code=trust_remote_code).float()
    graph = _halved(_converted(_decoder.decoder_of(model)))
    found = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Convert"}
    names = {tensor: name for name, tensor in model.named_parameters()}  # of what is shared the first name, which the graph has too
    for name, weight in kept.items():
        node = found.get(f"self.model.{names[model.get_submodule(name).weight]}")
        if node is None:
            raise Unsupported(f"OpenVINO's graph of this model has no weight {name}")
        _store(node, weight)
    graph.validate_nodes_and_infer_types()
    return graph


def _store(node: Any, weight: QuantizedWeight) -> None:
    """Put codes and scales in the place of a weight."""
    import openvino
    from openvino import opset13 as ops

    rows, columns = weight.codes.shape
    groups = weight.scales.shape[1]
    signed = (weight.codes.short() - weight.grid.mid).to(torch.int8)
    if weight.grid.bits == 4:
        low, high = (signed.flatten()[half::2].view(torch.uint8) & 15 for half in (0, 1))
        signed = low | high << 4
    shape = openvino.Shape([rows, groups, columns // groups])
    stored = openvino.Tensor(signed.contiguous().numpy(), shape, getattr(openvino.Type, _STORED[weight.grid.bits]))
    codes = openvino.op.Constant(stored, shared_memory=False)
    scales = weight.scales.to(torch.float16)
    scales, dtype = (scales, "f16") if torch.equal(scales.float(), weight.scales.float()) else (weight.scales.float(), "f32")
    weights = ops.multiply(ops.convert(codes, dtype), ops.constant(scales.numpy()[..., None]))
    weights = ops.reshape(weights, ops.constant(np.array([rows, columns])), False)
    made = ops.convert(weights, "f32")
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(made.output(0))


def _halved(exact: Any) -> Any:
    """A graph with its matrices in float16."""
    import openvino

    with files.scratch("openvino") as scratch:
        openvino.save_model(exact, Path(scratch) / IR, compress_to_fp16=True)
        graph = _read(Path(scratch))
    _restore(graph, exact)
    return graph


def _restore(graph: Any, exact: Any) -> None:
    """Undo what the compression to float16 does to constants that are no matrices: the frequencies of rotary positions among them."""
    from openvino import opset13 as ops

    originals = {node.get_friendly_name(): node for node in exact.get_ops() if node.get_type_name() == "Constant"}
    for node in graph.get_ops():
        original = originals.get(node.get_friendly_name())
        if node.get_type_name() == "Convert" and original and len(original.get_output_shape(0)) != 2:
            constant = ops.constant(original.data, dtype=np.float32)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(constant.output(0))
    graph.validate_nodes_and_infer_types()


def load_ir(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The graph of an artefact of format `openvino`."""
    return _read(folder)


def save(graph: Any, folder: Path) -> None:
    """Write a graph as it is into a new folder, from where `load_ir` reads it."""
    import openvino

    folder.mkdir()
    openvino.save_model(graph, folder / IR, compress_to_fp16=False)


def served(graph: Any) -> Any:
    """Turn a graph into one that OpenVINO GenAI's pipelines know, in place: inputs `input_ids`, `attention_mask` and `position_ids`, all
    int64 [B, T], and `beam_idx`, int32 [B]; logits of all positions.

    They put a paged cache and attention by it in the place of the cache, the mask and all that stands between them.
    """
    from openvino import opset13 as ops

    for name, theirs in (("ids", "input_ids"), (_BEAM, "beam_idx")):
        _name(graph.input(name).get_node(), theirs)
    mask, places = (_name(ops.parameter([-1, -1], np.int64), name) for name in ("attention_mask", "position_ids"))
    of_a_text = ops.gather(places, ops.constant(0), ops.constant(0))
    own = {name: graph.input(name).get_node() for name in _decoder.INPUTS[1:]}
    for target in own["positions"].output(0).get_target_inputs():
        above = target.get_node()
        if above.get_output_partial_shape(0).rank.get_length() == 2 and above.get_output_partial_shape(0)[0] == 1:
            above.output(0).replace(places.output(0))
        else:
            target.replace_source_output(of_a_text.output(0))
    for name, counted in (("keys", mask), ("keep", places)):
        length = ops.gather(ops.shape_of(counted), ops.constant(1), ops.constant(0))
        own[name].output(0).replace(ops.range(ops.constant(0), length, ops.constant(1), "i64").output(0))
    for node in own.values():
        graph.remove_parameter(node)
    graph.add_parameters([mask, places])
    graph.validate_nodes_and_infer_types()
    return graph


def save_served(graph: Any, folder: Path) -> None:
    """Write a graph that `served` has turned into a new folder, with a tokenizer, which pipelines of two models ask for; nothing is read by
    it.
    """
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    save(graph, folder)
    single = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), unk_token="a", eos_token="a")
    for name, made in zip(("tokenizer", "detokenizer"), convert_tokenizer(single, with_detokenizer=True), strict=True):
        openvino.save_model(made, folder / f"openvino_{name}.xml")


def _name(parameter: Any, name: str) -> Any:
    parameter.output(0).get_tensor().set_names({name})
    parameter.set_friendly_name(name)
    return parameter


def _read(folder: Path) -> Any:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core.read_model(folder / IR)


def convert(folder: Path, trust_remote_code: bool = False) -> Any:
    """The stateful `openvino.Model` of a dense source, in float32.

    Raises:
        methods.base.Unsupported: The model cannot be exported.
    """
    return _converted(_decoder.read_dense(folder, trust_remote_code))


def _converted(decoder: _decoder.Decoder) -> Any:
    import openvino

    model = openvino.convert_model(_decoder.traced(decoder), example_input=decoder.example())
    past = decoder.names("past")
    shapes = [[-1, -1], [-1], [-1], [-1], *([-1, heads, -1, width] for heads, width in decoder.cache)]
    for port, name, shape in zip(model.inputs, [*_decoder.INPUTS, *past], shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    model.outputs[0].get_tensor().set_names({_decoder.LOGITS})
    model.validate_nodes_and_infer_types()
    _keep_state(model, past, decoder.cache)
    return model


def _keep_state(model: Any, names: list[str], cache: list[tuple[int, int]]) -> None:
    """Turn inputs and outputs of the KV cache into state that is empty at first.

    A further input, `beam`, says which sequence each one goes on with: the runtime fuses cache and attention only around it.
    """
    import openvino
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    beam = ops.parameter([-1], np.int32, name=_BEAM)
    beam.output(0).get_tensor().set_names({_BEAM})
    batch = ops.gather(ops.shape_of(model.input("ids").get_node()), ops.constant(np.array([0])), ops.constant(0))
    inputs, outputs = model.inputs[len(_decoder.INPUTS) :], model.results[1:]
    writes = []
    for port, result, name, (heads, width) in zip(inputs, outputs, names, cache, strict=True):
        info = VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape([-1, heads, -1, width])
        variable = Variable(info)
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, ops.constant(np.array([heads, 0, width]))], 0))
        held = ops.gather(ops.read_value(empty, variable), beam, ops.constant(0))
        for target in port.get_target_inputs():
            target.replace_source_output(held.output(0))
        writes.append(ops.assign(result.input_value(0).get_node(), variable))
        model.remove_result(result)
        model.remove_parameter(port.get_node())
    model.add_parameters([beam])
    model.add_sinks(writes)
    model.validate_nodes_and_infer_types()

"""ONNX graphs: of a dense source, and of artefacts of format `onnx`.

The exporter is torch's older one, which works on a trace: for a decoder it is several times faster than the one on `torch.export`, and
its graphs ran a third faster. It writes a head that shares the embedding's weight a second time, transposed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from slimbench.methods.formats import decoder_graph as _decoder

GRAPH = "model.onnx"
"""The graph of an artefact of format `onnx`; constants may lie in files beside it."""

_OPSET = 18


def load_dense(folder: Path, scratch: Path, trust_remote_code: bool = False) -> Path:
    """Export a dense source into a scratch folder and return the file of the graph."""
    return export(folder, scratch, trust_remote_code)


def load_onnx(folder: Path, scratch: Path, trust_remote_code: bool = False) -> Path:
    """The file of the graph of an artefact of format `onnx`."""
    return folder / GRAPH


def export(folder: Path, out: Path, trust_remote_code: bool = False) -> Path:
    """Write a dense source as a float32 graph and return its file.

    Raises:
        methods.base.Unsupported: The model cannot be exported.
    """
    decoder = _decoder.read_dense(folder, trust_remote_code)
    past, present = decoder.names("past"), decoder.names("present")
    axes = {"ids": {0: "batch", 1: "new"}, "positions": {0: "new"}, "keys": {0: "total"}, "keep": {0: "kept"}}
    axes |= {_decoder.LOGITS: {0: "batch", 1: "kept"}}
    axes |= {name: {0: "batch", 2: "past"} for name in past} | {name: {0: "batch", 2: "total"} for name in present}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _decoder.traced(decoder),
            decoder.example(),
            out / GRAPH,
            dynamo=False,
            input_names=[*_decoder.INPUTS, *past],
            output_names=[_decoder.LOGITS, *present],
            dynamic_axes=axes,
            opset_version=_OPSET,
        )
    return out / GRAPH

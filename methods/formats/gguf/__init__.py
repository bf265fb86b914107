"""Llama models as GGUF files: a folder of safetensors, dense or `packed`, becomes one file that llama.cpp loads.

Each of the functions named in a config takes the folder of an artefact and a folder for what it writes, and returns the file.
Dense matrices become float16 (float32 where they were), vectors float32, packed matrices the blocks of `gguf.blocks`. From bfloat16
to float16 nothing changes but weights below 2^-17, which go to the next multiple of 2^-24. The file has no tokenizer: whoever runs
it brings token ids along.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.gguf.blocks import block_type, encode, floats

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MODEL = "model.gguf"
_ARCHITECTURE = "llama"
_MODEL_TYPES = ("llama", "mistral")
_F16, _F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
_FILE_TYPES = {
    _F32: LlamaFileType.ALL_F32,
    _F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass(frozen=True)
class Part:
    """One tensor of the file: its shape in numbers, the type it is stored in, and what reads and converts its data."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def existing(artefact: Path, out: Path) -> Path:
    """The file of an artefact that is a GGUF file already; nothing is written."""
    return artefact / MODEL


def from_huggingface(artefact: Path, out: Path, half: bool = False) -> Path:
    """Write a dense model.

    Args:
        artefact: Folder with `config.json` and safetensors.
        half: Store float32 matrices as float16, too.

    Raises:
        Unsupported: Its architecture, its positions or its numbers have no counterpart in llama.cpp's files.
    """
    config = _config(artefact)
    with _Source(artefact) as source:
        naming = _Naming(config)
        tied = config.get("tie_word_embeddings", True)
        keys = [key for key in source.keys if not (tied and key == f"{_HEAD}.weight")]
        return _write(out / MODEL, config, [_dense(source, naming, key, half) for key in keys])


def from_packed(artefact: Path, out: Path) -> Path:
    """Write a `packed` artefact (see `methods.formats.packed`) without changing one weight.

    Raises:
        Unsupported: No block type of llama.cpp holds the grid of a layer, or as for a dense model.
    """
    from slimbench.methods.formats import packed

    described, config = json.loads((artefact / packed.DESCRIPTION).read_text()), _config(artefact)
    with _Source(artefact) as source:
        naming = _Naming(config)
        layers = {key.removesuffix(".qweight") for key in source.keys if key.endswith(".qweight")}
        parts = []
        for layer in sorted(layers):
            grid = packed.Grid(**described["layers"].get(layer, described["default"]))
            shares = layer == _HEAD and f"{_EMBEDDING}.weight" not in source.keys
            parts.append(_packed(source, naming, layer, grid, _EMBEDDING if shares else layer))
        dense = [key for key in source.keys if key.rpartition(".")[0] not in layers or key.endswith(".bias")]
        return _write(out / MODEL, config, parts + [_dense(source, naming, key) for key in dense])


class _Source:
    """The tensors of a folder of safetensors, read one at a time.

    Attributes:
        keys: Names of all tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))

    def __enter__(self) -> _Source:
        from safetensors import safe_open

        self._stack = ExitStack()
        opened = [self._stack.enter_context(safe_open(file, framework="pt")) for file in self._files]
        self._where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - not a mapping
        self.keys = sorted(key for key in self._where if not key.endswith("rotary_emb.inv_freq"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, key: str) -> Tensor:
        return self._where[key].get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._where[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As safetensors call it: `BF16`, `F16`, `F32`."""
        return self._where[key].get_slice(key).get_dtype()


class _Naming:
    """llama.cpp's names of tensors, and its order of the rows of queries and keys.

    Rotary positions turn pairs of numbers: transformers takes one of a pair from each half of a head, llama.cpp two neighbours.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        self._heads = {"attn_q": config["num_attention_heads"], "attn_k": _kv_heads(config)}

    def of(self, key: str) -> str:
        """The name of a tensor, which ends in `.weight` or `.bias`.

        Raises:
            Unsupported: The architecture has no such tensor.
        """
        name = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise Unsupported(f"llama.cpp's architecture {_ARCHITECTURE} has no place for the tensor {key}")
        return name

    def order(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor (its first dimension) in llama.cpp's order."""
        heads = self._heads.get(name.split(".")[-2])
        return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _dense(source: _Source, naming: _Naming, key: str, half: bool = False) -> Part:
    name, shape = naming.of(key), source.shape(key)
    kind = _F32 if len(shape) == 1 or (source.dtype(key) == "F32" and not half) else _F16
    return Part(name, shape, kind, lambda: np.ascontiguousarray(floats(key, naming.order(name, source.read(key)), kind)))


def _packed(source: _Source, naming: _Naming, layer: str, grid: Any, place: str) -> Part:
    """A packed layer under the name of `place`."""
    name, rows = naming.of(f"{place}.weight"), source.shape(f"{layer}.qweight")[0]
    width = source.shape(f"{layer}.qweight")[1] * 8 // grid.bits
    symmetric, outliers = f"{layer}.offsets" not in source.keys, f"{layer}.outlier_values" in source.keys
    if f"{layer}.low_rank_in" in source.keys:
        raise Unsupported(f"{layer} has a low-rank part, which no GGUF block type holds")
    kind = block_type(layer, grid, width, symmetric, outliers)
    return Part(name, (rows, width), kind, partial(_blocks, source, naming, layer, grid, name))


def _blocks(source: _Source, naming: _Naming, layer: str, grid: Any, name: str) -> NDArray[np.uint8]:
    from slimbench.methods.kernels.grid import QuantizedWeight, unpack

    codes = naming.order(name, unpack(source.read(f"{layer}.qweight"), grid.bits))
    return encode(layer, QuantizedWeight(grid, codes, naming.order(name, source.read(f"{layer}.scales"))))


def _write(path: Path, config: dict[str, Any], parts: list[Part]) -> Path:
    """Write the file, one tensor at a time."""
    parts = [*parts, *_rope_factors(config)]
    writer = GGUFWriter(path, _ARCHITECTURE)
    for key, value in _hyperparameters(config):
        getattr(writer, f"add_{key}")(value)
    numbers: Counter[GGMLQuantizationType] = Counter()
    for part in parts:
        numbers[part.type] += math.prod(part.shape)
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.bytes, raw_dtype=part.type)
    writer.add_file_type(_FILE_TYPES[numbers.most_common(1)[0][0]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(part.make())
    finally:
        writer.close()
    return path


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    reason = None
    if config["model_type"] not in _MODEL_TYPES:
        reason = f"writes the model types {' and '.join(_MODEL_TYPES)}, not {config['model_type']}"
    elif config.get("quantization_config"):
        reason = "does not read the numbers of another library's quantization"
    elif config.get("hidden_act", "silu") != "silu":
        reason = f"knows no Llama with the activation {config['hidden_act']}"
    if reason:
        raise Unsupported(f"the export to llama.cpp {reason}")
    return config


def _hyperparameters(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What `GGUFWriter` calls each of them, and its value."""
    rope, width = _rope(config), _head_width(config)
    yield "vocab_size", config["vocab_size"]
    yield "context_length", min(config["max_position_embeddings"], config.get("sliding_window") or math.inf)
    yield "embedding_length", config["hidden_size"]
    yield "block_count", config["num_hidden_layers"]
    yield "feed_forward_length", config["intermediate_size"]
    yield "head_count", config["num_attention_heads"]
    yield "head_count_kv", _kv_heads(config)
    yield "key_length", width
    yield "value_length", width
    yield "layer_norm_rms_eps", config["rms_norm_eps"]
    yield "rope_dimension_count", width
    yield "rope_freq_base", float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        yield "rope_scaling_type", RopeScalingType.LINEAR
        yield "rope_scaling_factor", float(rope["factor"])
    yield "tokenizer_model", "none"


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary positions, under the names of transformers 5."""
    older = config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": older.get("type", "default")}
    rope |= older | (config.get("rope_parameters") or {})
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise Unsupported(f"the export to llama.cpp does not know rotary positions of type {rope['rope_type']}")
    return rope


def _rope_factors(config: dict[str, Any]) -> Iterator[Part]:
    """What the frequencies of Llama 3.1's positions are divided by: long waves by `factor`, short ones by 1, a blend between."""
    rope, width = _rope(config), _head_width(config)
    if rope["rope_type"] != "llama3":
        return
    turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width))
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors = (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)
    yield Part("rope_freqs.weight", factors.shape, _F32, lambda: factors)


def _kv_heads(config: dict[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _head_width(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

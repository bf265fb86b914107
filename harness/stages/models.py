"""The dense source of a cell as a local folder of safetensors: asset, hub, own folder, or random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimbench.harness.config import local_model
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import ModelConfig
from slimbench.harness.store.keys import model_part
from slimbench.methods.base import ModelShape, Unsupported
from slimbench.tasks import assets, gguf
from slimbench.util import checksums, locks
from slimbench.util.files import cache_dir
from slimbench.util.hashing import digest
from slimbench.util.text import nearest, slug

_RANDOM_SEED = 0


def prepare(model: ModelConfig, on_phase: Callable[[str], None]) -> Path:
    """The folder of a model, fetched, converted or generated on the first call and cached afterwards.

    Raises:
        tasks.assets.AssetError: It cannot be fetched.
    """
    kind, _, rest = model.source.partition(":")
    if kind == "file":
        return Path(rest).expanduser().resolve()
    if kind == "hf":
        on_phase("fetch model")
        return assets.path(f"{model.source}@{model.revision}" if model.revision else model.source)
    if kind == "asset":
        on_phase("fetch model")
        source = assets.path(rest)
        return _cached(model, lambda out: _convert(source, out, model.dtype), on_phase)
    return _cached(model, lambda out: generate(model, out), on_phase)


def identity(model: ModelConfig) -> dict[str, Any]:
    """What a dense source is, as keys hash it: its content, or its source and resolved revision.

    Raises:
        ConfigError: The source is none.
        tasks.errors.DataError: It is not readable.
    """
    kind, _, rest = model.source.partition(":")
    content = converter = None
    if kind == "asset":
        if rest not in assets.catalogue():
            raise ConfigError(f"model.source: no asset '{rest}'{nearest(rest, assets.catalogue())}")
        content, converter = assets.catalogue()[rest].fingerprint, gguf.VERSION
    elif kind == "file":
        content = local_model.identity(Path(rest).expanduser())
    elif kind not in ("hf", "random"):
        raise ConfigError(f"model.source '{model.source}' is none of asset:NAME, hf:ORG/NAME, file:FOLDER, random")
    elif kind == "random" and not model.shape:
        raise ConfigError("model.source=random needs model.shape, the fields of its config.json")
    return model_part(model.source, content, model.revision, model.dtype, model.shape, model.trust_remote_code, converter)


def shape_of(folder: Path) -> ModelShape:
    """The shape of the model in a folder.

    Raises:
        ConfigError: Its config.json does not describe a decoder.
    """
    file = folder / "config.json"
    try:
        return ModelShape.from_config(json.loads(file.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model.source: {file} does not describe a decoder with its sizes ({error})") from error


def matrix_parameters(folder: Path, trust_remote_code: bool = False) -> int:
    """Parameters in the matrices of the model in a folder, what is shared counted once; no weight is read."""
    from slimbench.methods.formats import storage

    model = storage.skeleton(folder, trust_remote_code)
    model.tie_weights()  # what was made without data shares nothing yet
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def folder_of(model: ModelConfig) -> Path | None:
    """The folder of a model where it is here without fetching or making anything, else None."""
    kind, _, rest = model.source.partition(":")
    if kind == "file":
        folder = Path(rest).expanduser()
    elif kind == "hf":
        uri = f"{model.source}@{model.revision}" if model.revision else model.source
        if not assets.is_fetched(uri):
            return None
        folder = assets.path(uri)
    else:
        folder = _folder(model)
    return folder if (folder / "config.json").is_file() else None


def known_shape(model: ModelConfig) -> ModelShape | None:
    """The shape of a model where it can be read without fetching or making anything, else None."""
    if model.is_random:
        given = model.shape or {}
        whole = given.keys() >= {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
        return ModelShape.from_config(given) if whole else None
    folder = folder_of(model)
    return shape_of(folder) if folder else None


def weight_bytes(model: ModelConfig) -> int | None:
    """Bytes of the dense weights where the number of parameters is known."""
    size = {"float32": 4}.get(model.dtype, 2)
    return model.parameters * size if model.parameters else None


def _cached(model: ModelConfig, make: Callable[[Path], None], on_phase: Callable[[str], None]) -> Path:
    """The folder of a converted or generated model; made again where its files are not the bytes that were written."""
    folder = _folder(model)
    with locks.held(folder):
        if checksums.seal_fault(folder) is not None:
            on_phase("prepare model")
            with checksums.sealed_folder(folder) as unfinished:
                make(unfinished)
    return folder


def _folder(model: ModelConfig) -> Path:
    """Where an asset is kept as safetensors, and random weights."""
    kind, _, rest = model.source.partition(":")
    content = [gguf.VERSION, assets.catalogue()[rest].fingerprint] if kind == "asset" else model.shape
    return cache_dir() / "models" / f"{slug(model.name)}-{model.dtype}-{digest(content)}"


def _convert(source: Path, out: Path, dtype: str) -> None:
    ggufs = [source] if source.suffix == ".gguf" else sorted(source.rglob("*.gguf"))
    if not ggufs:
        raise assets.AssetError(f"no GGUF file in {source}; run `slimbench assets verify`")
    gguf.convert(ggufs[0], out, dtype)


def generate(model: ModelConfig, out: Path) -> None:
    """Write random weights: the speed and memory of a shape can be measured without its checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(model.shape or {})
    try:
        config = AutoConfig.for_model(shape.pop("model_type", "llama"), **shape)
    except (TypeError, ValueError) as error:
        raise Unsupported(f"model.shape: {error}") from error
    torch.manual_seed(_RANDOM_SEED)
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype)).save_pretrained(out)

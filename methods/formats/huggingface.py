"""Models whose weights are as trained: the format `huggingface`, an ordinary folder of config and safetensors, or `edited`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DenseModel
from slimbench.util.files import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False, **more: Any) -> Any:
    """Load a folder that `from_pretrained` understands, quantized by an integrated library or not, in evaluation mode; safetensors only.

    Args:
        more: For `from_pretrained`, in place of what it is told otherwise.

    Raises:
        ValueError: Tensors are missing; the library would take random numbers for them.
    """
    from transformers import AutoModelForCausalLM

    settings = {"dtype": "auto", "device_map": device, "trust_remote_code": trust_remote_code} | more
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **settings)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} does not fit its config: missing {missing[:3]}")
    return model.eval()


def save_dense(model: PreTrainedModel, out: Path) -> None:
    """Write the model as plain safetensors and a plain config, nothing else; with edits that these cannot hold, as `edited`.

    The class's own `save_pretrained` is called, since libraries replace it on the instance to write their formats.
    """
    from transformers import PreTrainedModel as Plain

    from slimbench.methods.formats import storage
    from slimbench.methods.formats.architecture.edits import edits_of

    if edits_of(model):
        storage.save(model, (), {}, out)
        return
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    Plain.save_pretrained(model, out)


def link_source(dense: DenseModel, out: Path) -> None:
    """Link config and weights, or copy them; only a source stored in another dtype is converted to the model's."""
    config = json.loads((dense.path / "config.json").read_text())
    files = [dense.path / "config.json", *dense.path.glob("*.safetensors"), *dense.path.glob("*.safetensors.index.json")]
    if config.get("dtype", config.get("torch_dtype")) != dense.dtype or len(files) == 1:
        save_dense(dense.load(), out)
    else:
        for file in files:
            _link(file.resolve(), out / file.name)


def link_files(folder: Path, out: Path, without: Collection[str] = ()) -> None:
    """Link all files of an artefact but its manifest and those of some names, or copy them."""
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in ("artefact.json", *without):
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            _link(file.resolve(), out / file.relative_to(folder))


def _link(source: Path, target: Path) -> None:
    """Give a file of a cache a second name, as nobody changes it in place; copy one of the user's, and across file systems."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if any(source.is_relative_to(cache.resolve()) for cache in (cache_dir(), Path(HF_HUB_CACHE))):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)

"""Offloading: weights lie on disk or in host memory, and each layer brings its own in for the time of its call.

FlexGen (Sheng et al., arXiv:2303.06865) runs models that are larger than the memory of the device this way; with packed weights, its
4-bit compression is what is brought in. `accelerate` moves the weights. On a CPU they lie in safetensors files on disk, and a layer maps
its own, so what is resident of the model is one layer, caches and activations; on a card they lie in host memory.

What differs from FlexGen: nothing decides how much stays resident (nothing does), the next layer is not brought in while one
computes, batches do not pass through a layer one after another, and the KV cache stays where it is computed. Files that were read stay in
the page cache of the operating system while there is memory for it: then a step is timed without the disk.
"""

from __future__ import annotations

import uuid
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimbench.harness.engines import transformers
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.store import artefact as artefacts
from slimbench.methods.formats import huggingface
from slimbench.util.compat.transformers import keys_left_in_place

_FILE = "weights.safetensors"


def load_pretrained(folder: Path, device: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """Load a dense artefact of one file or many; safetensors only.

    On a CPU its weights stay in the artefact's own files and none is read, but for those that transformers stores otherwise than it
    computes with (fused experts): they are written anew, one after the other. For a card they are read into host memory.
    """
    if device != "cpu":
        return transformers.load_pretrained(folder, "cpu", trust_remote_code)
    with ExitStack() as stack:
        module = huggingface.load(folder, trust_remote_code=trust_remote_code, device_map={"": "disk"}, offload_folder=_scratch(stack))
        weakref.finalize(module, stack.pop_all().close)
    return module


def move_away(module: Any, device: torch.device, to_disk: bool) -> None:
    """Move what a module holds out of it, into a file on disk or into host memory, and let each layer bring its own in.

    Non-persistent buffers stay, as do attributes that are neither parameters nor buffers. An embedding that looks up the rows of another
    layer's weight brings that layer in.

    Args:
        device: Where the layers compute.
    """
    from accelerate.hooks import attach_align_device_hook

    embedding = module.get_input_embeddings()
    shared = [type(embedding).__name__] if next(embedding.children(), None) is not None else None
    with ExitStack() as stack:
        attach_align_device_hook(
            module,
            device,
            offload=True,
            weights_map=_on_disk(module, _scratch(stack)) if to_disk else _in_memory(module),
            offload_buffers=True,
            skip_keys=keys_left_in_place(module),
            preload_module_classes=shared,
        )
        weakref.finalize(module, stack.pop_all().close)


def _scratch(stack: ExitStack) -> Path:
    """An empty folder beside the artefacts, since a folder for temporary files may lie in memory; it is gone when the stack is closed."""
    return stack.enter_context(artefacts.staging(f"offload-{uuid.uuid4().hex}"))


def _on_disk(module: torch.nn.Module, folder: Path) -> Any:
    """Write the tensors of a module into a file; the mapping reads one by its name, without a copy."""
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors.torch import save_file

    state, stored = module.state_dict(), _stored(module)
    save_file({name: state[name].contiguous() for name in stored.values()}, folder / _FILE)
    entry = {"safetensors_file": str(folder / _FILE)}
    return OffloadedWeightsLoader(index={name: entry | {"weight_name": first} for name, first in stored.items()})


def _in_memory(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module in host memory, by name."""
    state, stored = module.state_dict(), _stored(module)
    copies = {name: state[name].cpu() for name in stored.values()}
    return {name: copies[first] for name, first in stored.items()}


def _stored(module: torch.nn.Module) -> dict[str, str]:
    """The name under which each tensor of a module is stored: tied ones under the first of theirs."""
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    return {name: first.setdefault((t.data_ptr(), t.shape, t.dtype), name) for name, t in module.state_dict().items()}


class OffloadEngine(transformers.TransformersEngine):
    """The loaders of the eager engine; weights that a loader left in the module are moved away."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        module = loader(artefact, device, trust_remote_code)
        if not all(parameter.is_meta for parameter in module.parameters()):
            move_away(module, torch.device(device), to_disk=device == "cpu")
        return transformers.TransformersModel(module, device)

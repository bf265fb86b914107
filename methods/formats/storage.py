"""How a model lies on disk when some of its layers have a format of their own: what the formats of this package share.

Of a layer `X` with parts `a`, `b`, … the file holds the tensors `X.a`, `X.b`, … in place of `X.weight`, beside its `X.bias`. Every other
tensor stays as it was. Of tied weights one is stored: that of the output head where the head is among the layers. The base need not be
what its config says: edits of its architecture stand beside it (`methods.formats.edited`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimbench.methods.formats.architecture.edits import config_of, describe_edits, replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


def on_disk(tensor: Tensor) -> Tensor:
    """A tensor as safetensors takes it."""
    return tensor.detach().cpu().contiguous()


def save(model: PreTrainedModel, layers: Collection[str], tensors: dict[str, Tensor], out: Path) -> None:
    """Write a model of which some layers are stored in parts.

    Args:
        model: Gives the config and every tensor of the other layers.
        layers: Names of the layers that are stored in parts.
        tensors: Their parts by full name; takes up the rest of the model.
        out: Folder to write into.
    """
    from safetensors.torch import save_file

    tied = set(getattr(model, "all_tied_weights_keys", ()))
    stored = {model.get_parameter(f"{name}.weight").data_ptr() for name in layers if f"{name}.weight" in tied}
    for key, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] in tied):
        owner, _, leaf = key.rpartition(".")
        if (owner in layers and leaf != "bias") or tensor.data_ptr() in stored:
            continue
        stored.add(tensor.data_ptr())
        tensors[key] = on_disk(tensor)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    _dense_config(model).save_pretrained(out)
    describe_edits(model, out)


def load(
    folder: Path,
    device: str,
    part: str | None = None,
    build: Callable[[str, dict[str, Tensor]], nn.Module] | None = None,
    embedding: Callable[[Any], nn.Module] | None = None,
    aside: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model in evaluation mode. Dense weights of layers that are stored in parts are never allocated.

    Args:
        part: A part that every such layer has; None where all layers are whole.
        build: Makes a layer from its name and its parts, the bias included.
        embedding: Makes the input embedding from an output head that such a layer is, where both share a weight.
        aside: Prefix of tensors that belong to no layer.

    Raises:
        ValueError: Tensors are missing or left over.
    """
    from safetensors import safe_open

    model = skeleton(folder, trust_remote_code)
    with safe_open(folder / WEIGHTS, framework="pt", device=device) as file:
        keys = {key for key in file.keys() if aside is None or not key.startswith(aside)}  # noqa: SIM118 - no mapping
        names = sorted(key.removesuffix(f".{part}") for key in keys if part and key.endswith(f".{part}"))
        for name in names:
            parts = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == name}
            keys -= set(parts.values())
            assert build is not None
            layer = build(name, {leaf: file.get_tensor(key) for leaf, key in parts.items()})
            shapes = [(module.out_features, module.in_features) for module in (layer, model.get_submodule(name))]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{folder.name} does not fit its config: {name} is {list(shapes[0])} in place of {list(shapes[1])}")
            model.set_submodule(name, layer)
        head = model.get_output_embeddings()
        in_parts = any(model.get_submodule(name) is head for name in names)
        if in_parts and embedding is not None:
            _share_head(model, embedding, keys)
        _, unexpected = model.load_state_dict({key: file.get_tensor(key) for key in keys}, strict=False, assign=True)
    if not in_parts:
        model.tie_weights()
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(f"{folder.name} does not fit its config: missing {absent[:3]}, left over {unexpected[:3]}")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()  # weights keep requires_grad: without it torch's matmul copies the transposed head for the last token of a prompt


def skeleton(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model of a folder without data: as its config says, and with the edits that stand beside it."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    replay(model, folder)
    return model


def describe(out: Path, file: str, format_: str, schema: int, layouts: dict[str, dict[str, Any]], otherwise: dict[str, Any]) -> None:
    """Write the JSON description: the layout of most layers (`default`) and of the layers that differ from it (`layers`)."""
    default = next(iter(layouts.values()), otherwise)
    differing = {name: layout for name, layout in layouts.items() if layout != default}
    described = {"format": f"slimbench {format_}", "schema": schema, "default": default, "layers": differing}
    (out / file).write_text(json.dumps(described, indent=1) + "\n")


def described(folder: Path, file: str, schema: int) -> Callable[[str], dict[str, Any]]:
    """The layout of a layer by its name.

    Raises:
        ValueError: The schema is newer than this program.
    """
    found = json.loads((folder / file).read_text())
    if found["schema"] > schema:
        raise ValueError(f"{found['format'].rpartition(' ')[2]} schema {found['schema']} is newer than {schema}; update slimbench")
    return lambda name: found["layers"].get(name, found["default"])


def _share_head(model: Any, embedding: Callable[[Any], nn.Module], keys: set[str]) -> None:
    """Let the input embedding look up the rows of the head, unless it has a weight of its own in the file."""
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if f"{name}.weight" not in keys:
        model.set_submodule(name, embedding(model.get_output_embeddings()))


def _dense_config(model: PreTrainedModel) -> Any:
    """The model's config without what a quantization library may have put into it."""
    config = config_of(model, type(model.config).from_dict(model.config.to_dict()))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

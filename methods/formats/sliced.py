"""The artefact format `sliced`: a decoder from whose weights rows and columns were cut away.

The folder holds the `config.json` of the dense model, which only the sizes no longer fit, and `model.safetensors`, whose tensors have
the sizes that are left: a layer has as many inputs and outputs as its weight. Where the hidden states of neighbouring blocks stand in
different coordinates, each block has two layers more, through which what passes it by goes:

    X.attention_shortcut.weight, X.mlp_shortcut.weight      [hidden, hidden] of the block X
    h = attention(norm(x)) + attention_shortcut(x)          y = mlp(norm(h)) + mlp_shortcut(h)

`sliced.json` names the schema, and says whether there are shortcuts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.formats import storage
from slimbench.methods.formats.structure import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "sliced"
SCHEMA = 1
DESCRIPTION = "sliced.json"


class ShortcutBlock(nn.Module):
    """Mixed into the class of a Llama-like block: a matrix on each of its two residual connections."""

    attention_shortcut: nn.Linear
    mlp_shortcut: nn.Linear

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states [..., in] of the block's input coordinates; the result is [..., out] of its output coordinates."""
        block: Any = self
        between = self.attend(hidden_states, **kwargs)
        return self.mlp_shortcut(between) + block.mlp(block.post_attention_layernorm(between))

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The first half of the block: hidden states between attention and MLP."""
        block: Any = self
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        return self.attention_shortcut(hidden_states) + attended


def add_shortcuts(block: nn.Module, attention: Tensor, mlp: Tensor) -> None:
    """Give a block its shortcuts, weights [out, in], in place."""
    block.attention_shortcut, block.mlp_shortcut = _layer(attention), _layer(mlp)
    if not isinstance(block, ShortcutBlock):
        block.__class__ = type(f"Shortcut{type(block).__name__}", (ShortcutBlock, type(block)), {})


def put(module: Any, leaf: str, values: Tensor) -> None:
    """Give a module a parameter of another size, which takes no gradient."""
    setattr(module, leaf, nn.Parameter(values.contiguous(), requires_grad=False))
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = values.shape


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    put(layer, "weight", weight)
    return layer


def save(model: PreTrainedModel, out: Path, shortcuts: bool) -> None:
    """Write a model whose layers have sizes of their own; `shortcuts`: its blocks have them."""
    storage.save(model, (), {}, out)
    described = {"format": f"slimbench {FORMAT}", "schema": SCHEMA, "shortcuts": shortcuts}
    (out / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load a sliced artefact in evaluation mode.

    Raises:
        ValueError: The schema is newer than this program, or tensors are missing or left over.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"{FORMAT} schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    tensors = load_file(folder / storage.WEIGHTS, device=device)
    if described["shortcuts"]:
        for name, block in blocks_of(model).items():
            parts = [tensors.get(f"{name}.{part}.weight") for part in ("attention_shortcut", "mlp_shortcut")]
            if parts[0] is None or parts[1] is None:
                raise ValueError(f"{folder.name} has no shortcuts for {name}")
            add_shortcuts(block, parts[0], parts[1])
    _resize(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(f"{folder.name} does not fit its config: missing {absent[:3]}, left over {unexpected[:3]}")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _resize(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the modules of a model without data the sizes of their tensors, by full name of the tensor."""
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        held = getattr(module, leaf)
        if held.shape != shape:
            put(module, leaf, torch.empty(shape, dtype=held.dtype, device="meta"))

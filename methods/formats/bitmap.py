"""The bitmap artefact format: linear layers of which only the weights that are not zero are stored.

The folder holds an ordinary `config.json`, and `model.safetensors` in which each such `X.weight` is replaced, in one of two forms, by

    bitmap   X.bits     uint8 [out, in / 8], rounded up: input i is bit i % 8 of byte i / 8, 1 where the weight is stored
             X.starts   int32 [out + 1]: the weights of row o are starts[o] .. starts[o + 1] - 1
             X.values   model dtype [n]
    2:4      X.places   uint8 [out, in / 8], rounded up: four bits a run of four inputs, the lower ones first; the place of its first
                        weight, then of its second
             X.values   model dtype [out, in / 2]: zeros fill up a run that has less than two weights

Every other tensor stays as it was; edits of the base stand beside it (`methods.formats.edited`). `bitmap.json` names the schema, and for
the layers `inputs` and `form`. In memory both forms are a bitmap. `methods.kernels.bitmap_linear` says what computes with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimbench.methods.formats import storage
from slimbench.methods.kernels.bitmap_linear import BitmapLinear, BitmapWeight, TwoOfFourWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "bitmap"
SCHEMA = 1
DESCRIPTION = "bitmap.json"
PATTERN = "2:4"


def save(model: PreTrainedModel, weights: Iterable[tuple[str, BitmapWeight | TwoOfFourWeight]], out: Path) -> None:
    """Write a model with some of its linear layers without their zeros.

    Args:
        model: Gives the config and every tensor that is not replaced.
        weights: Names of `nn.Linear` layers with their weights; consumed one at a time.
        out: Folder to write into.
    """
    layouts: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights:
        form = FORMAT if isinstance(weight, BitmapWeight) else PATTERN
        layouts[name] = {"form": form, "inputs": model.get_submodule(name).in_features}
        tensors |= {f"{name}.{part}": storage.on_disk(tensor) for part, tensor in weight.parts().items()}
    storage.save(model, layouts, tensors, out)
    storage.describe(out, DESCRIPTION, FORMAT, SCHEMA, layouts, {"form": FORMAT, "inputs": 0})


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load an artefact in evaluation mode. Dense weights of the replaced layers are never allocated.

    Raises:
        ValueError: The schema is newer than this program, or tensors are missing, left over or do not fit each other.
    """
    layout = storage.described(folder, DESCRIPTION, SCHEMA)

    def build(name: str, parts: dict[str, Tensor]) -> BitmapLinear:
        described = layout(name)
        bias = parts.pop("bias", None)
        wanted = {"values"} | ({"bits", "starts"} if described["form"] == FORMAT else {"places"})
        if parts.keys() != wanted:
            raise ValueError(f"{folder.name}: {name} has {sorted(parts)} in place of {sorted(wanted)}")
        weight = BitmapWeight(**parts, inputs=described["inputs"]) if described["form"] == FORMAT else TwoOfFourWeight(**parts)
        try:
            weight.check()
        except ValueError as error:
            raise ValueError(f"{folder.name}: of {name}, {error}") from None
        return BitmapLinear(weight if isinstance(weight, BitmapWeight) else weight.bitmap(), bias)

    return storage.load(folder, device, "values", build, trust_remote_code=trust_remote_code)

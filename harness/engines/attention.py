"""Attention as a setting of an engine: by what a model computes its exact attention. What comes out is the same but for rounding.

`eager` is the library's own function: all scores of a head, [T, T], lie in memory. `sdpa` is torch's fused operator, which chooses among
its kernels. `flash` and `math` hold that operator to one of them: in tiles with a running softmax, or as plain products. On a card the
first is FlashAttention-2; on a CPU it is torch's own kernel of the same recurrence. `flash_attention_2` is the package of its authors, on
a card.

Sources: FlashAttention (Dao et al., arXiv 2205.14135), FlashAttention-2 (Dao, arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimbench.methods.base import Unsupported
from slimbench.util.compat.transformers import attends_through_interface, attention_implementation

DEFAULT = "default"
PACKAGE = "flash_attn"
_OF_THE_LIBRARY = ("eager", "sdpa", "flash_attention_2")
_HELD = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_NAMES = {"flash": "slimbench_tiles", "math": "slimbench_products"}  # transformers looks for a package behind names with `flash`
_REFUSALS = ("No available kernel", "No viable backend")


def use(model: Any, setting: str) -> None:
    """Let a loaded model attend as a setting says.

    Args:
        model: A causal language model of transformers.
        setting: As of `EngineConfig.attention`.

    Raises:
        Unsupported: A policy or an architecture attends in its own way, or what the setting needs is not here.
    """
    if setting == DEFAULT:
        return
    asked, kind = f"engine.attention={setting}", type(model).__name__
    if _is_replaced(model):
        raise Unsupported(f"{asked}: the policy of this artefact attends in its own way; leave the setting out")
    if not attends_through_interface(model):
        raise Unsupported(f"{asked}: {kind} has no attention that could be set; leave the setting out")
    if setting == "flash_attention_2" and (model.device.type != "cuda" or find_spec(PACKAGE) is None):
        raise Unsupported(f"{asked} needs a CUDA card and {PACKAGE}: pip install {PACKAGE}; flash is torch's own")
    name = _registered(setting) if setting in _HELD else setting
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise Unsupported(f"{asked}: {str(error).splitlines()[0]}") from error
    if attention_implementation(model) != name:
        raise Unsupported(f"{asked}: {kind} takes no other attention than its own")


def _is_replaced(model: Any) -> bool:
    """Whether something else than the library decides how a model attends: an operator in each layer, or another pass over its blocks."""
    base = model.base_model
    return (
        attention_implementation(model) not in (*_OF_THE_LIBRARY, *_NAMES.values()) or getattr(base.forward, "__self__", base) is not base
    )


def _registered(setting: str) -> str:
    """The name under which transformers finds torch's operator held to one kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAMES[setting], _held(setting))
    AttentionMaskInterface.register(_NAMES[setting], sdpa_mask)
    return _NAMES[setting]


def _held(setting: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> tuple[Tensor, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        try:
            with sdpa_kernel(_HELD[setting]):
                return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        except RuntimeError as error:
            if not any(text in str(error) for text in _REFUSALS):
                raise
            what = f"{query.dtype} queries {list(query.shape)}, keys {list(key.shape)}" + (", a mask" if attention_mask is not None else "")
            raise Unsupported(f"engine.attention={setting}: torch has no such kernel on {query.device.type} for {what}") from error

    return attend

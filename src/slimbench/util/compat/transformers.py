"""transformers: how a model attends, what stays where it is, and what its quantized cache keeps."""

from __future__ import annotations

from typing import Any


def attention_implementation(model: Any) -> str | None:
    """Name of the function by which a model attends, such as `sdpa`."""
    return getattr(model.config, "_attn_implementation", None)


def attends_through_interface(model: Any) -> bool:
    """Whether a model has attentions that another function can be put in the place of."""
    return bool(getattr(model, "_supports_sdpa", False))


def keys_left_in_place(model: Any) -> Any:
    """Names of the arguments of a model's layers that are not moved from device to device, such as its cache."""
    return getattr(model, "_skip_keys_device_placement", None)


def blocks_kept_whole(model: Any) -> set[str]:
    """Classes of the modules of a model that must lie on one device each."""
    return set(getattr(model, "_no_split_modules", None) or ())


def quantized_states(layer: Any) -> list[Any]:
    """The quantized keys and values of a layer of the library's `QuantizedCache`."""
    return [vars(layer).get(name) for name in ("_quantized_keys", "_quantized_values")]

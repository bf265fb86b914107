"""Methods that leave the weights alone and store the key-value cache in few bits while a model generates."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from slimbench.methods.base import Citation, DenseModel, Needs
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.kv.cache import CachePolicy, OwnCache, TransformersCache, bytes_per_token, facts
from slimbench.methods.formats.kv.scheme import Scheme


class _KVCache(PolicyMethod):
    """What all share: how the cache is stored, and the bytes that it takes."""

    slot = "cache"

    @abstractmethod
    def policy(self, seed: int = 0) -> CachePolicy:
        """How the cache is stored."""

    def claims(self, policy: Any, dense: DenseModel) -> dict[str, Any]:
        told = facts(policy, dense)
        return {"cache_bytes_per_token": bytes_per_token(told["cache_bytes"]), "details": told}


@dataclass(frozen=True)
class KVInt(_KVCache):
    """Each token by itself, rounded to nearest; without a residual as soon as it comes, so that attention reads only what is rounded.

    Attributes:
        bits: Bits of a number, before scales.
        group_size: Numbers of a token and head that share a scale, a divisor of the head dimension; None: all of them.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest number of the group.
        residual_length: Newest tokens that stay exact, as in KIVI: then only the axis of the keys differs from it; None: no token does.
    """

    name = "kv-int"
    citation = Citation("KV cache in integers (FlexGen)", year=2023, arxiv="2303.06865")

    bits: Literal[2, 4, 8] = 8
    group_size: Literal[32, 64, 128] | None = None
    symmetric: bool = True
    residual_length: int | None = None

    def __post_init__(self) -> None:
        if self.residual_length is not None and self.residual_length < 1:
            raise ValueError(f"residual_length must be positive, not {self.residual_length}; without one no token stays exact")

    def policy(self, seed: int = 0) -> CachePolicy:
        scheme = Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return OwnCache(scheme, scheme, self.residual_length or 0)


@dataclass(frozen=True)
class KIVI(_KVCache):
    """KIVI: keys by channel, since some of their channels are outliers in every token; values by token; the newest tokens exact.

    Both grids run from the smallest to the largest number of a group. Keys of a channel are rounded in groups of consecutive tokens,
    values in groups of channels of a token.

    Attributes:
        bits: Bits of a number, before scales.
        group_size: Numbers that share a scale; must divide the head dimension.
        residual_length: Newest tokens that stay exact; a multiple of the group size.
    """

    name = "kivi"
    citation = Citation("KIVI", year=2024, arxiv="2402.02750", covers=("quantization/kivi",))

    bits: Literal[2, 4] = 2
    group_size: Literal[32, 64, 128] = 32
    residual_length: int = 128

    def __post_init__(self) -> None:
        self.policy()

    def policy(self, seed: int = 0) -> CachePolicy:
        keys = Scheme(bits=self.bits, axis="channel", group_size=self.group_size)
        return OwnCache(keys, Scheme(bits=self.bits, group_size=self.group_size), self.residual_length)


@dataclass(frozen=True)
class KVFp8(_KVCache):
    """Each token by itself in floats of 8 bits (four of exponent, three of mantissa), as serving engines offer it.

    Attributes:
        scale: `token`: the largest number of a token and head becomes the largest float; `none`: cast as they are.
    """

    name = "kv-fp8"
    citation = Citation("KV cache in FP8", year=2022, arxiv="2209.05433", covers=("quantization/llm-qat-kv-quantization",))

    scale: Literal["token", "none"] = "token"

    def policy(self, seed: int = 0) -> CachePolicy:
        scheme = Scheme(number="e4m3", scaled=self.scale == "token")
        return OwnCache(scheme, scheme)


class _KVTransformers(_KVCache):
    """The quantized cache that transformers ships: a prompt is rounded as a whole, then all of it anew whenever the residual is full.

    Its axes are those that its documentation recommends for the backend; numbers of one token and head share a scale.
    """

    citation = Citation("Quantized cache of transformers", year=2024, covers=("quantization/hf-quantized-cache-kivi-like",))
    reference = "transformers:QuantizedCache"

    def __post_init__(self) -> None:
        self.policy()


@dataclass(frozen=True)
class KVQuanto(_KVTransformers):
    """With optimum-quanto, which compiles an extension for a minute or two at its first use.

    Attributes:
        nbits: Bits of a number, before scales.
        group_size: Numbers that share a scale; must divide the head dimension.
        residual_length: Tokens that stay exact until they are rounded together.
    """

    name = "kv-quanto"
    needs = Needs(weights=False, extra="quantization", modules=("optimum",))

    nbits: Literal[2, 4] = 4
    group_size: Literal[32, 64, 128] = 32
    residual_length: int = 128

    def policy(self, seed: int = 0) -> CachePolicy:
        return TransformersCache("quanto", self.nbits, 0, 0, self.group_size, self.residual_length)


@dataclass(frozen=True)
class KVHqq(_KVTransformers):
    """With HQQ, which optimises the zero point of each group.

    Attributes:
        nbits: Bits of a number, before scales.
        group_size: Numbers that share a scale; must divide the head dimension.
        residual_length: Tokens that stay exact until they are rounded together.
    """

    name = "kv-hqq"
    needs = Needs(weights=False, extra="quantization", modules=("hqq",))

    nbits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128] = 32
    residual_length: int = 128

    def policy(self, seed: int = 0) -> CachePolicy:
        return TransformersCache("hqq", self.nbits, 1, 1, self.group_size, self.residual_length)

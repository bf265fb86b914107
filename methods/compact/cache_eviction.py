"""Caches of a bounded number of tokens, of which those of the lowest score leave (`methods.formats.attention.eviction`).

Each paper is a rule of one policy. What is measured of them is a text after a prompt: nothing leaves before the cache is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.eviction import SCORE_BYTES, Eviction, Rule
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work

_IDS = ("quantization/h2o-streamingllm-snapkv-tova-knorm",)


@dataclass(frozen=True)
class _Bounded(PolicyMethod):
    """A budget and a rule.

    Attributes:
        budget: Tokens of which a head keeps keys and values.
    """

    slot = "cache"
    rule: ClassVar[Rule]

    budget: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Eviction(self.rule, self.budget)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"work": Work(cache_tokens=self.budget)}


class _Scored(_Bounded):
    """A score stays beside each token of each head."""

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        scores = SCORE_BYTES * dense.shape.num_kv_heads * dense.shape.num_layers
        return {"work": Work(cache_tokens=self.budget, score_bytes=scores)}


@dataclass(frozen=True)
class H2O(_Scored):
    """H2O: half of the cache for the newest tokens, half for those that got most attention so far, the heavy hitters."""

    name, rule = "h2o", "h2o"
    citation = Citation("H2O", year=2023, arxiv="2306.14048", covers=_IDS)


@dataclass(frozen=True)
class TOVA(_Bounded):
    """TOVA: whatever the newest token attends to least leaves, for all heads of a layer alike."""

    name, rule = "tova", "tova"
    citation = Citation("TOVA", year=2024, arxiv="2401.06104", covers=_IDS)


@dataclass(frozen=True)
class Knorm(_Bounded):
    """Keys of large norm leave: they get little attention.

    Attributes:
        skip_layers: First layers whose caches stay whole, where norms tell least; 0: none.
    """

    name, rule = "knorm", "knorm"
    citation = Citation("L2-norm cache compression", year=2024, arxiv="2406.11430", covers=_IDS)

    skip_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_layers < 0:
            raise ValueError(f"skip_layers must not be negative, not {self.skip_layers}")

    def policy(self, seed: int = 0) -> Policy:
        return Eviction(self.rule, self.budget, skip_layers=self.skip_layers)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        whole = self.skip_layers / dense.shape.num_layers if self.skip_layers else None
        return {"work": Work(cache_tokens=self.budget, whole_layers=whole)}


@dataclass(frozen=True)
class SnapKV(PolicyMethod):
    """SnapKV: what the end of a prompt attends to stays, once and for all; what is written after it is kept.

    Attributes:
        budget: Tokens of the prompt of which a head keeps keys and values, the 64 at its end included.
    """

    name = "snapkv"
    slot = "cache"
    citation = Citation("SnapKV", year=2024, arxiv="2404.14469", covers=_IDS)

    budget: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Eviction("snapkv", self.budget)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"work": Work(cache_tokens=self.budget, keeps_written=True)}


@dataclass(frozen=True)
class SpAtten(_Bounded):
    """SpAtten's token pruning with a fixed budget: the first tokens, the newest, and those that the last pass attended to most."""

    name, rule = "spatten", "spatten"
    citation = Citation("SpAtten", year=2020, arxiv="2012.09852")


@dataclass(frozen=True)
class RandomEviction(_Scored):
    """The control: tokens leave at random.

    Attributes:
        seed: Of the draw.
    """

    name, rule = "random-eviction", "random"
    citation = Citation("Random eviction (a control)", year=2023)
    draws = True

    seed: int = 0

    def policy(self, seed: int = 0) -> Policy:
        return Eviction("random", self.budget, self.seed + seed)

"""The policy `eviction` of the slot `cache`: each head keeps the keys and values of at most B tokens, those of the highest score.

Keys stay rotated by the position in the text. After each pass, if more than B tokens are held, those of the lowest score go. By `rule`:

    h2o      a token's score is the sum of the weights that all queries gave it; half of B are the newest tokens, whatever their score
    tova     the weight that the newest query gave it, mean over all heads, so that heads keep the same tokens; the newest stays
    knorm    minus the norm of its key: keys of small norm get much weight; the newest stays, which neither the authors' program nor
             kvpress sees to
    snapkv   once, after the first pass: the mean weight from the last 64 queries, smoothed over 5 tokens; these 64 stay. Later tokens
             are all kept
    spatten  the sum of the weights from the queries of the last pass, of each head and layer apart; the first 4 tokens stay, and of the
             rest of B the newest half
    random   drawn anew for each token that comes: the control of the others. The newest stays

Where several heads of queries share one of keys and values, their weights are averaged. `snapkv` leaves a text alone that is shorter than
its budget, and asks for a prompt: what follows it is scored under the evicted cache (`scoring` is `suffix`). The others decide after each
token (`step`). A prompt goes through whole, and is evicted after that, as in their authors' programs.

`spatten` is neither quite its paper nor its authors' program for decoders. The paper adds up weights over all heads, layers and passes, and
prunes by a share from layer to layer; the program keeps these tokens within a budget, but judges by products before mask and softmax.

With `h2o` and `random` each head keeps beside a token 4 bytes for its score. `skip_layers` first layers keep all
tokens, as the authors of `knorm` have it.

Sources: H2O (arXiv 2306.14048; FMInference/H2O, `utils_real_drop`), TOVA (arXiv 2401.06104), SnapKV (arXiv 2404.14469), L2 norms (arXiv
2406.11430), these three as in NVIDIA/kvpress, held to its release 0.5.5 token by token (`tests/parity/evictions.py`); SpAtten (arXiv
2012.09852; mit-han-lab/spatten, `spatten_llm`, which counts positions in the cache).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.attention.policy import ALL, FIRST, OBSERVED, OperatorPolicy
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


SCORE_BYTES = 4
"""Of a token and head, where scores are kept."""
Rule = Literal["h2o", "tova", "knorm", "snapkv", "spatten", "random"]


@dataclass(frozen=True)
class Eviction(OperatorPolicy):
    """At most so many tokens.

    Attributes:
        rule: By which tokens are judged.
        budget: B, of each head and layer.
        seed: Of `random`.
        skip_layers: First layers that keep everything.
    """

    slot = "cache"
    kind = "eviction"

    rule: Rule
    budget: int
    seed: int = 0
    skip_layers: int = 0

    def __post_init__(self) -> None:
        least = {"snapkv": OBSERVED + 1, "spatten": FIRST + 2}.get(self.rule, 2)
        if self.budget < least:
            raise ValueError(f"budget must be at least {least} for '{self.rule}', not {self.budget}")

    def check(self, shape: ModelShape) -> None:
        if self.skip_layers >= shape.num_layers:
            raise Unsupported(f"{self.skip_layers} skip_layers are all {shape.num_layers} layers of the model; no token would leave")

    @property
    def scoring(self) -> Scoring:
        return "suffix" if self.rule == "snapkv" else "step"

    @property
    def rolls_back(self) -> bool:
        """Behind a prompt `snapkv` keeps all; with the others one pass over several tokens is not what these are one by one."""
        return self.rule == "snapkv"

    @property
    def reads_queries(self) -> bool:
        return self.rule not in ("knorm", "random")

    def neutral(self) -> Eviction:
        return replace(self, budget=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that is still held when it comes, itself included, in a layer whose tokens leave.

        Those of a prompt see each other: what leaves does so behind it. With `snapkv` nothing else leaves.
        """
        together = min(tokens, max(prompt, self.budget + 1))
        later = tokens - together
        if self.rule == "snapkv" and prompt:
            together, later = min(tokens, prompt), max(0, tokens - prompt)
            return _pairs(together) + later * min(prompt, self.budget) + _pairs(later)
        return _pairs(together) + later * (self.budget + 1)

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.eviction import EvictionOperator

        return EvictionOperator(rotary, scaling, self.rule, self.budget if layer >= self.skip_layers else ALL, (self.seed, layer))


def _pairs(tokens: int) -> int:
    """Pairs of a token and one that is not after it."""
    return tokens * (tokens + 1) // 2

"""The policy `pages` of the slot `attention`: of a long cache, a new token reads the pages alone that can matter to it (Quest).

The cache holds all tokens, in pages of p. Of a page only the smallest and the largest key of each channel are looked at, m and M: no key
of it has a larger product with a query than u = Σ_d max(q_d m_d, q_d M_d). A head of queries attends to the B / p pages of the largest u,
at least three. Prompts, and the first `dense_layers` layers, attend to everything. The newest page is judged by the keys that it has.

Nothing is freed. Where several tokens come at once after a prompt, each chooses for itself.

Source: Tang et al., Quest, arXiv 2406.10774, §3.3; mit-han-lab/Quest, `evaluation/quest_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


_FEWEST = 3


@dataclass(frozen=True)
class Pages(OperatorPolicy):
    """Some pages for each new token.

    Attributes:
        budget: B, tokens that a token reads at most.
        page: p, tokens of a page.
        dense_layers: First layers that read everything.
    """

    slot = "attention"
    kind = "pages"

    budget: int
    page: int
    dense_layers: int

    def __post_init__(self) -> None:
        positive(page=self.page)
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers must not be negative, not {self.dense_layers}")
        if self.budget < _FEWEST * self.page:
            raise ValueError(f"budget must be at least {_FEWEST} pages, not {self.budget} tokens with pages of {self.page}")

    def check(self, shape: ModelShape) -> None:
        if self.dense_layers >= shape.num_layers:
            raise Unsupported(f"{self.dense_layers} dense_layers are all {shape.num_layers} layers of the model; none would choose pages")

    @property
    def scoring(self) -> Scoring:
        return "suffix"

    def neutral(self) -> Pages:
        return replace(self, budget=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it reads; those of a prompt read all before them, the others come one by one."""
        reach = min(tokens, max(prompt, self.budget))
        return reach * (reach + 1) // 2 + (tokens - reach) * self.budget

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.pages import PagesOperator

        return PagesOperator(rotary, scaling, self.budget // self.page if layer >= self.dense_layers else ALL, self.page)

"""Quest: the whole cache stays, and each new token reads only the pages that can matter to it (Tang et al., arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.pages import Pages
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work


@dataclass(frozen=True)
class Quest(PolicyMethod):
    """Fewer keys are read, none is freed (`methods.formats.attention.pages`).

    Attributes:
        budget: Tokens that a new token reads at most.
        page: Tokens of a page.
        dense_layers: First layers that read everything.
    """

    name = "quest"
    slot = "attention"
    citation = Citation("Quest", year=2024, arxiv="2406.10774")

    budget: int = 512
    page: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Pages(self.budget, self.page, self.dense_layers)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        whole = self.dense_layers / dense.shape.num_layers if self.dense_layers else None
        return {"work": Work(read_tokens=self.budget, whole_layers=whole)}

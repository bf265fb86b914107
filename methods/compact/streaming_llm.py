"""StreamingLLM: the first tokens of a text, on which every attention rests, stay beside the newest (Xiao et al., arXiv 2309.17453).

Without sinks it is the sliding window of Mistral (arXiv 2310.06825), put on a model that was trained without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work


@dataclass(frozen=True)
class StreamingLLM(PolicyMethod):
    """A cache of constant size (`methods.formats.attention.window`).

    Attributes:
        budget: Tokens of which keys and values are kept.
        sinks: First tokens among them; 0: a plain window.
    """

    name = "streaming-llm"
    slot = "cache"
    citation = Citation("StreamingLLM", year=2023, arxiv="2309.17453", covers=("compact/sliding-window-mistral-streamingllm-sinks",))

    budget: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, not {self.sinks}")
        if self.budget <= self.sinks:
            raise ValueError(f"budget must exceed the {self.sinks} sinks, not {self.budget}")

    def policy(self, seed: int = 0) -> Policy:
        return Window(self.sinks, self.budget - self.sinks)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        return {"work": Work(cache_tokens=self.budget)}

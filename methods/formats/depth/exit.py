"""The policy `exit` of the slot `depth`: a token leaves the model at the first exit that is sure of it.

An exit stands behind a block. There the hidden state h of a token is translated, T h = h + W h + b, and norm and head of the model predict
from it. A token leaves where its exit is sure, by `criterion`:

    maximum   the largest probability is at least λ                                       CALM's softmax response in its plain form
    margin    the difference of the two largest probabilities is at least λ               CALM (arXiv 2207.07061), §3.4
    entropy   the entropy, in nats, is at most 1 - λ of that of all tokens being alike    DeeBERT (arXiv 2004.12993), §3.2
    state     the cosine of h and the state behind the exit before (at the first, the embedding) is at least λ    CALM, §3.4
    patience  λ times in a row an exit predicts what the one before predicted             PABEE (arXiv 2006.04152), §3.2

CALM compares the states of two blocks in a row, and its program leaves out the first exit, which has none before it; here exits stand as
far apart as settings say, and the first one may let a token go. Its threshold falls along a text; here it is the same for all tokens.

`state` asks no head, the others ask it at every exit that a token comes to. The logits by which it leaves are those that it is given: the
head is not asked again for them (`methods.formats.depth.decided`). What a token that has left would have been in later blocks is its
state as it left: keys and values of those blocks are made from it (CALM, §3.3), so that later tokens see it there. All later tokens
attend much to the first one (StreamingLLM, arXiv 2309.17453), whose state becomes what they attend to only in the middle of the model:
where it leaves before, the whole text suffers. CALM's decoders have an encoder beside them that every token of a prompt runs through;
here `sinks` tell how many first tokens of a text run all blocks, and are asked at no exit. A policy that decides by attention weights
what it keeps has none of these, and is refused beside exits. The logits of a token are those of its exit, or of the model's end. At λ out
of reach, every token goes to the end, and the base is reproduced.

One text at a time. A text gives the same in any pieces, since a token's exit depends on earlier tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import Policy, Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

Criterion = Literal["maximum", "margin", "entropy", "state", "patience"]
NEVER = 1e9
"""A threshold that no token reaches."""


@dataclass(frozen=True)
class EarlyExit(Policy):
    """Exits behind some blocks.

    Attributes:
        criterion: By what an exit is sure.
        threshold: λ.
        exits: Blocks that have run at each, in ascending order.
        translators: `L.weight` [hidden, hidden] and `L.bias` of the exit behind L blocks; an exit without them translates nothing.
        sinks: First tokens of a text that run all blocks.
    """

    slot = "depth"
    kind = "exit"
    attends = True

    criterion: Criterion
    threshold: float
    exits: tuple[int, ...]
    translators: Mapping[str, Tensor] = tensors()
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", tuple(self.exits))
        if not self.exits or sorted(set(self.exits)) != list(self.exits) or self.exits[0] < 1:
            raise ValueError(f"exits must be numbers of blocks in ascending order, not {list(self.exits)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 or more, not {self.sinks}")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def max_batch(self) -> int:
        return 1

    def runs(self, blocks: int) -> tuple[int, int]:
        """The least and the most blocks, of so many, that a token runs whatever the text.

        Probabilities and shares of entropy lie between 0 and 1, cosines between -1 and 1; of λ exits that agree one is before the first.
        """
        if self.criterion == "patience":
            agreeing = max(0, math.ceil(self.threshold))
            least = self.exits[agreeing] if agreeing < len(self.exits) else blocks
            return least, blocks if agreeing or self.sinks else least
        if self.threshold > 1:
            return blocks, blocks
        always = self.threshold <= (-1 if self.criterion == "state" else 0)
        return self.exits[0], self.exits[0] if always and not self.sinks else blocks

    def neutral(self) -> EarlyExit:
        return replace(self, threshold=NEVER)

    def check(self, shape: ModelShape) -> None:
        if self.exits[-1] >= shape.num_layers:
            raise Unsupported(f"exits must lie before the last of {shape.num_layers} blocks, not behind block {self.exits[-1]}")

    def install(self, model: Any) -> None:
        """Raises `Unsupported` if the blocks of the model are not built like those of Llama."""
        from slimbench.methods.formats.depth.exits import Exits

        Exits(model, self.criterion, self.threshold, self.exits, self.translators, self.sinks).install("exits")

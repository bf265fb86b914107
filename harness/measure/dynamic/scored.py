"""What runs for the tokens of texts while they are scored.

How many blocks a token runs depends on the text, so a perplexity belongs to the work of the very passes that gave it, and not to that of
texts that the model wrote. Hooks stand at the module while windows go through it; they cost some hundred calls of Python a pass, beside
products of whole windows. They see rows, not tokens: how the sums are spread over tokens the policy says itself, and is believed where
its sums are those of the hooks. Each piece of the stage is kept with what ran in it, so that a stage that was cut off counts on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from slimbench.harness.measure.dynamic.hooks import Count, counted, matrices_of, watched
from slimbench.harness.measure.loaded import Loaded
from slimbench.harness.schema.work import ScoredWork
from slimbench.harness.store.partial import Part
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.depth.rows import Partial

_RAN = "ran"


@dataclass
class Ran:
    """What ran in some passes.

    Attributes:
        tokens: That went through.
        blocks: Rows that went through a block, over all blocks.
        products: Parameters of matrices times rows that went through them.
        told: How many tokens ran so many blocks, as the policy says.
    """

    tokens: int = 0
    blocks: int = 0
    products: int = 0
    told: dict[str, int] = field(default_factory=dict)


class CountingPart(Part):
    """A part of a stage whose pieces are scored texts, each of which is kept with what ran in it.

    Args:
        part: What keeps the pieces.
        module: The model that scores them, a causal language model with hooks.
    """

    def __init__(self, part: Part, module: Any) -> None:
        super().__init__(part.name, part.unit, part.journal)
        self._part, self._module, self._ran = part, module, list[Ran]()
        self._matrices = matrices_of(module)
        self._policy = next((found for found in module.modules() if isinstance(found, Partial)), None)

    def once(self, input_: Any, count: int, work: Callable[[], Any], accept: Callable[[Any], bool] = lambda result: True) -> Any:
        """As of `Part`, where `work` gives a mapping; a piece of an earlier attempt that does not say what ran is done again."""

        def counting() -> Any:
            found, before = Count(), self._told()
            with watched(self._module, found, self._matrices):
                result = work()
            told = self._told() - before
            ran = Ran(found.tokens, found.blocks, found.products, {str(blocks): tokens for blocks, tokens in sorted(told.items())})
            return result | {_RAN: asdict(ran)}

        kept = self._part.once(input_, count, counting, lambda earlier: _RAN in earlier and accept(earlier))
        self._ran.append(Ran(**kept[_RAN]))
        return kept

    def result(self) -> tuple[ScoredWork | None, list[str]]:
        """What ran in all pieces, None where nothing did, and a line where the policy says that less did."""
        tokens, blocks = sum(ran.tokens for ran in self._ran), sum(ran.blocks for ran in self._ran)
        if not tokens:
            return None, []
        told: Counter[int] = Counter()
        for ran in self._ran:
            told.update({int(count): amount for count, amount in ran.told.items()})
        found = ScoredWork(tokens=tokens, blocks=blocks / tokens, active_parameters=sum(ran.products for ran in self._ran) / tokens)
        said = sum(count * amount for count, amount in told.items())
        if told.total() == tokens and said == blocks:
            spread = np.repeat(list(told), list(told.values()))
            found.blocks_p5, found.blocks_p95 = (float(bound) for bound in np.percentile(spread, [5, 95]))
            found.by_blocks = {str(count): amount for count, amount in sorted(told.items())}
        return found, flags(said, told.total(), found)

    def _told(self) -> Counter[int]:
        return Counter(self._policy.tokens_by_blocks() if self._policy else {})


def flags(said: int, of: int, found: ScoredWork) -> list[str]:
    """One line where a policy says of its tokens that they ran fewer blocks than hooks saw.

    Args:
        said: Blocks that they ran, all of them together.
        of: Tokens; 0 where it says nothing.
    """
    own = said / of if of else found.blocks
    return [f"claims {own:.4g} blocks a token, ran {found.blocks:.4g} where texts were scored"] if own < found.blocks else []


def counting(model: Loaded, part: Part) -> CountingPart | None:
    """What keeps and counts the pieces of a part; None where how much runs does not depend on the text, or no hook can see it."""
    module = getattr(model, "module", None)
    if module is None or "depth" not in model.slots:
        return None
    try:
        with counted(module):
            return CountingPart(part, module)
    except Unsupported:
        return None

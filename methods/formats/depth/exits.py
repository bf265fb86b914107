"""The base of a model with exits (`methods.formats.depth.exit`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.formats.depth.decided import Decided
from slimbench.methods.formats.depth.rows import Partial, linear, run_block


class Exits(Partial):
    """The base of a model with exits.

    Attributes:
        left: Tokens that left after so many blocks, since it was made; the policy's own count.
    """

    def __init__(
        self, model: Any, criterion: str, threshold: float, exits: Sequence[int], translators: Mapping[str, Tensor], sinks: int = 0
    ) -> None:
        super().__init__(model)
        self.sinks = sinks
        self.criterion, self.threshold, self.places, self.left = criterion, threshold, set(exits), dict[int, int]()
        held = [place for place in exits if f"{place}.weight" in translators]
        maps = {str(place): linear(model, translators[f"{place}.weight"], translators[f"{place}.bias"]) for place in held}
        self.maps = nn.ModuleDict(maps)
        self.decided = Decided(self._base[0], self._head[0])

    def through(self, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int) -> Tensor:
        active = torch.arange(hidden.shape[1], device=hidden.device)
        found, before, agreed = hidden.new_zeros(hidden.shape), hidden, _Agreed(hidden.shape[1], hidden.device)
        sinks = active[: max(0, self.sinks - first)]
        self.decided.clear()
        for index, block in enumerate(self._base[0].layers[: self.blocks], start=1):
            hidden = run_block(block, hidden, active, rotations, cache, first)
            asked = active[len(sinks) :]
            if index not in self.places or not len(asked):
                continue
            states = hidden[:, asked]
            translated = self.translated(index, states)
            sure, logits = self.sure(translated, states, before[:, asked], agreed, asked)
            found[:, asked[sure]] = translated[:, sure]
            if logits is not None:
                self.decided.add(asked[sure], logits[sure])
            self._count(index, int(sure.sum()))
            active, before = torch.cat([sinks, asked[~sure]]), hidden
        found[:, active] = hidden[:, active]
        self._count(self.blocks, len(active))
        return found

    def tokens_by_blocks(self) -> dict[int, int]:
        return dict(self.left)

    def _count(self, blocks: int, tokens: int) -> None:
        if tokens:
            self.left[blocks] = self.left.get(blocks, 0) + tokens

    def translated(self, exit_: int, states: Tensor) -> Tensor:
        """States [1, n, d] as the exit hands them to norm and head."""
        return states + self.maps[str(exit_)](states) if str(exit_) in self.maps else states

    def sure(self, translated: Tensor, states: Tensor, before: Tensor, agreed: _Agreed, active: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which tokens leave here, bool [n], and the logits [n, V] by which that was decided; None where no head was asked.

        Args:
            translated: States for norm and head, [1, n, d].
            states: As the block left them.
            before: The same behind the exit before.
            agreed: What earlier exits predicted of all tokens.
            active: Which tokens these are.
        """
        criterion, threshold = self.criterion, self.threshold
        if criterion == "state":
            return functional.cosine_similarity(states.float(), before.float(), dim=-1)[0] >= threshold, None
        logits = self._head[0](self._base[0].norm(translated))[0]
        if criterion == "patience":
            return agreed.count(active, logits.float().argmax(-1)) >= threshold, logits
        return confidence(logits.float(), criterion) >= threshold, logits


class _Agreed:
    """How many exits in a row predicted the same of each token."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.last = torch.full((tokens,), -1, device=device)
        self.times = torch.zeros(tokens, dtype=torch.int64, device=device)

    def count(self, active: Tensor, predicted: Tensor) -> Tensor:
        """Take in what an exit predicts of some tokens; PABEE counts agreements, so a first prediction has none."""
        self.times[active] = torch.where(predicted == self.last[active], self.times[active] + 1, 0)
        self.last[active] = predicted
        return self.times[active]


def confidence(logits: Tensor, criterion: str) -> Tensor:
    """How sure logits [n, V] are, [n]: `maximum`, `margin`, or for `entropy` 1 - entropy / ln V."""
    if criterion == "entropy":
        logp = logits.log_softmax(-1)
        return 1 + (logp.exp() * logp).sum(-1) / torch.log(torch.tensor(float(logits.shape[-1])))
    largest = logits.softmax(-1).topk(2, -1).values
    return largest[:, 0] if criterion == "maximum" else largest[:, 0] - largest[:, 1]

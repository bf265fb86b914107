"""Drafts on engines that load no policies but guess by themselves: what an artefact asks of them, and a text whose guesses they check.

The settings that an engine follows stand in its YAML (`drafts`), where a plan reads them too. What an engine cannot follow is refused, and
never run otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from slimbench.harness.config.engines import beyond
from slimbench.harness.config.targets import locate
from slimbench.harness.engines.base import Engine
from slimbench.harness.measure.loaded import Loaded
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.store.artefact import read_manifest
from slimbench.methods.base import Unsupported
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.policy import Policy

Guess = Callable[[Sequence[int], int], list[int]]
"""Called with a text and a number of tokens; returns at most so many that may come next."""
Check = Callable[[int, list[int]], list[int]]
"""Called with a number of tokens of a text that the cache is to hold, and tokens behind them; returns what the model chooses behind each of
these, in one pass."""


class DraftingEngine(Engine):
    """Runs drafts on the formats that it loads.

    Args:
        drafts: Kind of draft → the least and the most of each setting; none without.
    """

    def __init__(self, loaders: dict[str, str], cards: int = 1, drafts: dict[str, dict[str, tuple[int, int | None]]] | None = None) -> None:
        super().__init__(loaders, cards)
        self.drafts = drafts or {}

    def load(self, artefact: Path, device: str, trust_remote_code: bool = False) -> Loaded:
        """Load an artefact from disk; a policy that is a draft is run on what its base is loaded as.

        Raises:
            methods.base.Unsupported: This engine does not load its format here, or does not run its policy.
        """
        format_ = read_manifest(artefact).claim.format
        if format_ != policies.FORMAT or format_ in self.loaders or not self.drafts:
            return super().load(artefact, device, trust_remote_code)
        asked, base = policies.read(artefact)
        for policy in asked:
            if policy.slot != "draft" or policy.kind not in self.drafts:
                raise Unsupported(f"it does not run the {policy.slot} {policy.kind}, only drafts by {' and '.join(self.drafts)}")
            if misfit := beyond(self.drafts[policy.kind], policy):
                raise Unsupported(f"it {misfit}")
        if base not in self.loaders:
            raise Unsupported(f"it does not load format '{base}', which the policy follows, only {', '.join(self.loaders)}")
        (draft,) = asked
        return self.open_drafting(artefact, locate(self.loaders[base]), draft, device, trust_remote_code)

    @abstractmethod
    def open_drafting(self, artefact: Path, loader: Any, draft: Policy, device: str, trust_remote_code: bool) -> Loaded:
        """Load an artefact with the loader of its base, and guess as a draft asks."""


def with_draft(model: Evidence, draft: Evidence) -> Evidence:
    """What was found of a model and of another one that guesses for it; the matrices of that have a role of their own."""
    layers = [layer.model_copy(update={"role": "draft"}) if layer.role == "linear" else layer for layer in draft.layers]
    both = {
        "weight_bytes": model.weight_bytes + draft.weight_bytes,
        "parameters": model.parameters + draft.parameters,
        "layers": [*model.layers, *layers],
        "operators": dict(Counter(model.operators) + Counter(draft.operators)),
    }
    return model.model_copy(update=both)


class DraftedText:
    """One text that goes on greedily: what comes next is guessed, and the model checks all guesses in one pass.

    Args:
        prompt: Token ids, which the cache holds.
        first: The model's choice behind them.
        room: Tokens that are wanted, `first` among them; no guess reaches beyond.

    Attributes:
        text: Token ids so far, those included that were not asked for yet.
        passes: Tokens of each pass since the prompt's: the last of the text and the guesses behind it.
        drafted: Tokens that were guessed and checked.
        accepted: Of these, taken.
    """

    def __init__(self, prompt: Sequence[int], first: int, room: int, guess: Guess, check: Check) -> None:
        self.text, self.passes = [*prompt, first], list[int]()
        self.drafted = self.accepted = 0
        self._room, self._guess, self._check = room - 1, guess, check
        self._waiting: deque[int] = deque()

    @property
    def held(self) -> int:
        """Tokens of the text that are in the cache for good: all but the last."""
        return len(self.text) - 1

    def next(self) -> torch.Tensor:
        """The next token, int64 [1, 1]."""
        if not self._waiting:
            self._pass()
        return torch.tensor([[self._waiting.popleft()]])

    def _pass(self) -> None:
        most = max(0, self._room - 1)
        guesses = self._guess(self.text, most)[:most] if most else []
        chosen = self._check(self.held, [self.text[-1], *guesses])
        agreed = next((place for place, guess in enumerate(guesses) if chosen[place] != guess), len(guesses))
        taken = [*guesses[:agreed], chosen[agreed]]
        self.passes.append(1 + len(guesses))
        self.drafted += len(guesses)
        self.accepted += agreed
        self.text += taken
        self._room -= len(taken)
        self._waiting.extend(taken)

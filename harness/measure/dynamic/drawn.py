"""Whether texts that were drawn are drawn from the model's own distribution, whatever guessed at them.

Behind the text before it, a token x that is drawn from p has a log-probability whose mean and variance p itself tells:
E[log p(x)] = Σ p log p and Var[log p(x)] = Σ p (log p)² - (Σ p log p)². What the log-probabilities of a text exceed their means by are the
steps of a martingale, so that their sum over its deviation is about normal: far from zero, some tokens came from elsewhere. Tokens that are
too likely (a greedy text) lie above, guesses that were taken without being asked for below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FAR = 4.0
"""Deviations beyond which chance goes once in 16,000 measurements."""


@dataclass
class Drawn:
    """Log-probabilities of drawn tokens against what was to be expected of them.

    Args:
        temperature: At which they were drawn.
    """

    temperature: float
    excess: float = 0.0
    variance: float = 0.0

    def add(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take in tokens [n] and the model's logits [n, V] before each of them."""
        logs = (logits.double() / self.temperature).log_softmax(-1)
        weights = logs.exp()
        # what cannot come has a logarithm of minus infinity, and no weight
        mean = torch.where(weights > 0, weights * logs, 0).sum(-1)
        square = torch.where(weights > 0, weights * logs**2, 0).sum(-1)
        own = logs.gather(-1, tokens.to(logs.device)[:, None])[:, 0]
        self.excess += float((own - mean).sum())
        self.variance += float((square - mean**2).sum())

    @property
    def deviations(self) -> float:
        """By how many standard deviations the tokens are more likely than drawn ones are in the mean."""
        return self.excess / math.sqrt(self.variance) if self.variance > 0 else 0.0

    @property
    def flag(self) -> str | None:
        """One line where they do not look drawn."""
        if not abs(self.deviations) > FAR:
            return None
        return f"texts are not drawn from the model: their log-probability lies {self.deviations:+.1f} deviations off its mean"

"""Tokens that are drawn, not chosen, and guesses at them that leave their distribution as it is.

With p what the model gives the next token at a temperature, and q what a guess was drawn from, a guess x stays with the probability
min(1, p(x) / q(x)). Otherwise the token is drawn from max(0, p - q), normalised, and all guesses behind it are lost. Either way it is
distributed as p. A guess that was not drawn but looked up has q(x) = 1.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1 and appendix A.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Sampling:
    """Draws of one text after the other, the same for the same prompt.

    Args:
        temperature: What logits are divided by; above 0.
        device: Where logits lie.
    """

    def __init__(self, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self._generator = torch.Generator(device)

    def begin(self, ids: Tensor) -> None:
        """Begin with prompts, int64 [B, T]: what is drawn behind them depends on them alone."""
        content = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).digest()
        self._generator.manual_seed(int.from_bytes(content[:7], "little"))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from: float32, of logits [..., V]."""
        return (logits.float() / self.temperature).softmax(-1)

    def drawn(self, logits: Tensor) -> Tensor:
        """A token for each of logits [n, V]: int64 [n]."""
        return self._of(self.probabilities(logits))

    def settled(self, guesses: Sequence[int], drafted: Tensor | None, logits: Tensor) -> list[int]:
        """The tokens that come where some were guessed: as many guesses as stay, and one more.

        Args:
            guesses: γ token ids.
            drafted: Logits [γ, V] that they were drawn by; None where they were looked up.
            logits: The model's, [γ + 1, V], behind the text and behind each guess.
        """
        p = self.probabilities(logits)
        q = None if drafted is None or not guesses else self.probabilities(drafted)
        for place, guess in enumerate(guesses):
            rest = p[place].clone() if q is None else (p[place] - q[place]).clamp(min=0)
            if q is None:
                rest[guess] = 0
            likely = 1.0 if q is None else float(q[place, guess])
            chance = float(torch.rand((), generator=self._generator, device=p.device))
            if chance * likely >= float(p[place, guess]) and rest.any():
                return [*guesses[:place], int(self._of(rest[None]))]
        return [*guesses, int(self._of(p[-1:]))]

    def _of(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]

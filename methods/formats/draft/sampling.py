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
        self.temperature, self.device = temperature, device
        self._generators: list[torch.Generator] = []

    def begin(self, ids: Tensor) -> None:
        """Begin with prompts, int64 [B, T]: what is drawn behind each depends on it alone."""
        self._generators = []
        for row in ids.cpu().numpy().astype("<i8"):
            seed = int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:7], "little")
            self._generators.append(torch.Generator(self.device).manual_seed(seed))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from: float32, of logits [..., V]."""
        return (logits.float() / self.temperature).softmax(-1)

    def drawn(self, logits: Tensor) -> Tensor:
        """A token for each of logits [n, V], of as many texts or all of one: int64 [n]."""
        return self._of(self.probabilities(logits))

    def settled(self, guesses: Sequence[int], drafted: Tensor | None, logits: Tensor) -> list[int]:
        """The tokens that come where some were guessed: as many guesses as stay, and one more.

        Args:
            guesses: γ token ids.
            drafted: Logits [γ, V] that they were drawn by; None where they were looked up.
            logits: The model's, [γ + 1, V], behind the text and behind each guess.
        """
        p = self.probabilities(logits)
        if not guesses:
            return self._of(p).tolist()
        places, ids = torch.arange(len(guesses), device=p.device), torch.tensor([*guesses], device=p.device)
        q = torch.nn.functional.one_hot(ids, p.shape[1]).to(p) if drafted is None else self.probabilities(drafted)
        chances = torch.rand(len(guesses), generator=self._generators[0], device=p.device)
        for place in (chances * q[places, ids] >= p[places, ids]).nonzero()[:, 0].tolist():
            if (rest := (p[place] - q[place]).clamp(min=0)).any():
                return [*guesses[:place], *self._of(rest[None]).tolist()]
        return [*guesses, *self._of(p[-1:]).tolist()]

    def _of(self, weights: Tensor) -> Tensor:
        if len(self._generators) == 1:
            return torch.multinomial(weights, 1, generator=self._generators[0])[:, 0]
        texts = zip(weights.split(1), self._generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator)[:, 0] for row, generator in texts])

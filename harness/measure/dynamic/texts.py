"""What is gone on with while speed is measured: random token ids, or texts where what runs depends on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimbench.harness.config.schema import PromptsConfig, SpeedPoint
from slimbench.harness.measure.loaded import Loaded, Scores
from slimbench.harness.measure.perplexity import public_name
from slimbench.harness.schema.speed import SpeedPointResult, TextPrompts
from slimbench.tasks.errors import DataError


@dataclass(frozen=True)
class Texts:
    """Prompts of one process.

    Attributes:
        ids: Token ids, int64 [batch, prompt], by the number of the prompt among those of all processes.
        repeats: Pairs of runs of each in a row.
        told: What a record says of all of them; None for random ids.
    """

    ids: dict[int, torch.Tensor]
    repeats: int
    told: TextPrompts | None = None

    def of(self, repeat: int) -> tuple[int, torch.Tensor]:
        """Number and ids of the prompt of a repeat; after the last comes the first again."""
        return list(self.ids.items())[repeat // self.repeats % len(self.ids)]


def drawn(tokens: np.ndarray, point: SpeedPoint, config: PromptsConfig, process: int = 0, processes: int = 1) -> Texts:
    """The prompts of one of several processes, from places of a text that are drawn without overlap, in the order of the draw.

    Args:
        tokens: The whole text, int32.

    Raises:
        DataError: It is shorter than the prompts.
    """
    each = point.batch * point.prompt
    places = len(tokens) // each
    if places < config.count:
        raise DataError(f"corpus {config.corpus} has {len(tokens)} tokens, fewer than {config.count} prompts of {each}")
    chosen = np.random.default_rng(config.seed).choice(places, config.count, replace=False)
    ids = [torch.from_numpy(tokens[place * each : (place + 1) * each].astype(np.int64)).view(point.batch, -1) for place in chosen]
    told = TextPrompts(corpus=public_name(config.corpus), count=config.count, sha256=sha256(torch.stack(ids)))
    return Texts({number: ids[number] for number in range(process, config.count, processes)}, config.repeats, told)


def untimed(points: Sequence[SpeedPointResult]) -> list[str]:
    """One line for each point whose time ended before every text was timed."""
    found = []
    for point in points:
        if point.prompts and (timed := len(set(point.prompts.pairs))) < point.prompts.count:
            place = f"({point.batch}×{point.prompt}+{point.new_tokens})"
            found.append(f"speed of {timed} of {point.prompts.count} texts: the time was over {place}")
    return found


def unexercised(points: Sequence[SpeedPointResult], model: Loaded) -> list[str]:
    """One line for each point whose texts are no longer than what a policy of attention or cache leaves as it is."""
    if not isinstance(model, Scores):
        return []
    ends = [(point, point.prompt + point.new_tokens - 1) for point in points]
    return [
        f"policy never exercised while timed: no text is longer than what stays exact ({point.batch}×{point.prompt}+{point.new_tokens})"
        for point, end in ends
        if model.exact_share([(point.prompt, end)], point.prompt) == 1
    ]


def prompts(model: Loaded, point: SpeedPoint) -> torch.Tensor:
    """Random token ids, int64 [batch, prompt], the same for every model of one vocabulary."""
    return torch.randint(0, model.vocab_size, (point.batch, point.prompt), generator=torch.Generator().manual_seed(0))


def sha256(tokens: torch.Tensor) -> str:
    """Hash of token ids [batch, new_tokens] as int64, little-endian, sequence by sequence."""
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()

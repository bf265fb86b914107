"""Times of passes of several tokens, and of the parts of a draft: by these and the calls that were counted, a board predicts a speed-up."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.loaded import Loaded, Scores
from slimbench.harness.measure.timer import Timer
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.schema.work import DRAFT, WHOLE

Times = dict[str, dict[str, list[float]]]
"""Milliseconds of calls, by part and number of tokens."""

_REFERENCE = "reference"


def time_passes(model: Loaded, reference: Loaded | None, point: SpeedPoint, rows: Sequence[int], clock: Timer, repeats: int = 8) -> Times:
    """Time passes of so many tokens behind a prompt, calls of the parts of a draft, and the reference's pass of one token.

    All take turns, since a machine is now faster and now slower: what is told of one in terms of another then holds. The first turn
    is not counted.

    Args:
        model: Timed where it adds tokens to a cache as it decodes; the parts of its draft where no other policy acts, by which they would
            depend on the text.
        reference: None where the model is the reference itself, or there is none.
        rows: Numbers of tokens.
    """
    taken: Times = defaultdict(lambda: defaultdict(list))
    ids = prompts(model, point)
    for repeat in range(repeats + 1):
        for part, count, call in _turn(model, reference, ids, rows, repeat):
            model.synchronize()
            start = clock.mark(model.synchronize)
            call()
            took = clock.milliseconds(start, clock.mark(model.synchronize))
            if repeat:
                taken[part][str(count)].append(took)
    return {part: dict(times) for part, times in taken.items()}


def _turn(
    model: Loaded, reference: Loaded | None, ids: torch.Tensor, rows: Sequence[int], repeat: int
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """The calls of one turn; each is to be made before the next is asked for."""
    if isinstance(reference, Scores) and reference.times_passes:
        yield _REFERENCE, 1, partial(reference.extend, _any(model, 1, len(ids), repeat), reference.extend(ids)[1])
    if isinstance(model, Scores) and model.times_passes:
        states = [model.extend(ids)[1]]

        def extend(tokens: torch.Tensor) -> None:
            states.append(model.extend(tokens, states.pop())[1])

        for count in rows:
            yield WHOLE, count, partial(extend, _any(model, count, len(ids), repeat))
    drafter = getattr(getattr(model, "module", None), "drafter", None)
    if drafter is not None and drafter.parts() and set(model.slots) == {DRAFT}:
        with torch.inference_mode():
            yield from drafter.rehearse(ids.to(model.device), rows)


def _any(model: Loaded, count: int, batch: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 [batch, count]."""
    return torch.randint(0, model.vocab_size, (batch, count), generator=torch.Generator().manual_seed(seed))


def tell(result: SpeedResult, processes: Iterable[Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
    """Complete a result by the medians over the turns of all processes; arguments as `time_passes` gave them."""
    joined: Times = defaultdict(lambda: defaultdict(list))
    for times in processes:
        for part, found in times.items():
            for count, taken in found.items():
                joined[part][count] += taken
    medians = {part: {count: statistics.median(taken) for count, taken in found.items()} for part, found in joined.items()}
    result.reference_row_ms = medians.pop(_REFERENCE, {}).get("1")
    result.rows_ms = medians.pop(WHOLE, {})
    result.parts_ms = medians

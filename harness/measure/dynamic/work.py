"""What runs for a token, counted while a text is gone on with, in passes that nobody times: by hooks, or by an engine that shows no module.

A policy says what it leaves out; what was left out is seen here, on the loaded module: how many rows each matrix multiplied, in which
blocks, and how many keys each call of torch's attention was given. Prompts are text, each goes through alone, and only
decode steps are counted: the prompt's own pass is work of another kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slimbench.harness.measure.dynamic.hooks import Count, Matrix, counted, matrices_of, parts_of
from slimbench.harness.measure.dynamic.unseen import uncalled, untold
from slimbench.harness.measure.dynamic.written import Written
from slimbench.harness.measure.loaded import CountsPasses, Generates
from slimbench.harness.schema.work import DRAFT, Spread, WorkResult
from slimbench.methods.base import Unsupported
from slimbench.methods.work import Work

NEW_TOKENS = 33
"""Tokens by which each text is gone on with, one of them the prompt's: of eight texts 256 are counted."""
_SLACK = 1.02


def measure(
    model: Generates, texts: torch.Tensor, claim: Work | None, on_progress: Callable[[int, int], None], new_tokens: int = NEW_TOKENS
) -> WorkResult:
    """Go on with texts, and count.

    Args:
        texts: Token ids of equally long prompts, int64 [N, T].
        claim: What the artefact's methods say.
        on_progress: Called with texts done and texts in all.
        new_tokens: By which each text is gone on with; the first of them is the prompt's and is not counted.

    Raises:
        methods.base.Unsupported: The engine shows no module whose parts could be watched, and does not count its passes;
            or the claim is of what passes do not tell.
    """
    module = getattr(model, "module", None)
    if module is None:
        return _by_passes(model, texts, claim, on_progress, new_tokens)
    steps: list[Count] = []
    stored: list[int] = []
    drafts: list[int] = []
    written = Written(model)
    shares: list[Share] = []
    given: Counter[int] = Counter()
    matrices = matrices_of(module)
    for done, text in enumerate(texts.split(1)):
        on_progress(done, len(texts))
        step = model.prefill(text, new_tokens)
        own, tokens = list[Count](), [step.token]
        for _ in range(new_tokens - 1):
            with counted(module, matrices) as count:
                step = model.decode_step(step)
            own.append(count)
            tokens.append(step.token)
        steps += own
        shares += shared(own)
        gave = tokens_of_passes(own)
        given.update(gave)
        stored.append(model.cache_bytes(step.state) or 0)
        drafts.append(step.state.drafter.stored_bytes() if hasattr(step.state, "drafter") else 0)
        written.add(text, torch.cat(tokens, 1), [rows for count in own for rows in count.passes], gave)
    passes = [rows for count in steps for rows in count.passes]
    named = {matrix.part for matrix in matrices} if parts_of(module) else set()
    apart = {part: [matrix for matrix in matrices if matrix.part == part] for part in sorted(named)}
    found = WorkResult(
        tokens=len(steps),
        prompts=len(texts),
        prompt_tokens=texts.shape[1],
        passes=len(passes),
        pass_rows={str(rows): count for rows, count in sorted(Counter(passes).items())},
        pass_tokens={str(tokens): count for tokens, count in sorted(given.items())},
        slots=list(model.slots),
        calls=_calls(steps, [matrix for matrix in matrices if matrix.part != DRAFT]),
        part_calls={part: calls for part, own in apart.items() if (calls := _calls(steps, own))},
        part_bytes=_by_part((matrix.part, matrix.bytes * matrix.copies) for matrix in matrices),
        read_bytes=_by_part(item for count in steps for item in count.read.items()),
        draft_passes=sum(len(count.drafts) for count in steps) or None,
        total_parameters=sum(matrix.parameters * matrix.copies for matrix in matrices),
        blocks=spread([share.blocks for share in shares]),
        experts=spread(sent) if (sent := [number for count in steps for number in count.experts]) else None,
        active_parameters=spread([share.products for share in shares]),
        cache_tokens=spread(reads) if (reads := [read for count in steps for read in count.reads]) else None,
        cache_read_bytes=_cache_read(model, steps),
        cache_bytes=max(stored),
        draft_cache_bytes=drafts[stored.index(max(stored))] or None,
    )
    del step
    found.flags += differences(found, claim, token_bytes(module))
    found.flags += filter(None, [without_pass(found), untold(model, texts[:1]), uncalled(model, texts[:1])])
    written.tell(found)
    return found


def _calls(steps: Sequence[Count], matrices: Sequence[Matrix]) -> dict[str, float]:
    """In how many calls of so many rows some matrices took part; 1 is all of them once."""
    plain = [matrix for matrix in matrices if matrix.experts is None]
    whole, parts = sum(matrix.parameters for matrix in plain), {matrix.part for matrix in plain}
    found: Counter[int] = Counter()
    for count in steps:
        for part in parts & count.calls.keys():
            found.update(count.calls[part])
    return {str(rows): parameters / whole for rows, parameters in sorted(found.items())}


def _by_part(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sums by part."""
    found: Counter[str] = Counter()
    for part, amount in items:
        found[part] += amount
    return dict(sorted(found.items()))


def _by_passes(
    model: Generates, texts: torch.Tensor, claim: Work | None, on_progress: Callable[[int, int], None], new_tokens: int
) -> WorkResult:
    """As `measure`, by what an engine counts itself: passes of the whole model, and nothing of what is in them."""
    if not isinstance(model, CountsPasses):
        raise Unsupported("the engine does not show what runs for a token")
    if claim is not None:
        raise Unsupported("the engine tells its passes alone, and the claim is of what runs in them")
    rows: Counter[int] = Counter()
    given: Counter[int] = Counter()
    stored: list[int] = []
    ran, written = 0, Written(model)
    for done, text in enumerate(texts.split(1)):
        on_progress(done, len(texts))
        step = model.prefill(text, new_tokens)
        own, tokens = list[Count](), [step.token]
        for _ in range(new_tokens - 1):
            before = len(model.passes(step.state))
            step = model.decode_step(step)
            tokens.append(step.token)
            own.append(Count(passes=list(model.passes(step.state)[before:])))
        gave = tokens_of_passes(own)
        given.update(gave)
        had = [size for count in own for size in count.passes]
        ran += len(had)
        rows.update(had if model.shows_guesses else [])
        stored.append(model.cache_bytes(step.state) or 0)
        written.add(text, torch.cat(tokens, 1), had if model.shows_guesses else None, gave)
    told = {str(count): passes for count, passes in sorted(rows.items())}
    found = WorkResult(
        tokens=len(texts) * (new_tokens - 1),
        prompts=len(texts),
        prompt_tokens=texts.shape[1],
        passes=ran,
        pass_rows=told,
        pass_tokens={str(tokens): count for tokens, count in sorted(given.items())},
        slots=list(model.slots),
        calls={size: float(passes) for size, passes in told.items()},
        cache_bytes=max(stored) or None,
    )
    found.flags += filter(None, [without_pass(found)])
    written.tell(found)
    return found


def tokens_of_passes(steps: Sequence[Count]) -> list[int]:
    """Tokens that each pass gave, in order: its own step's, and those of the steps behind it that had to run nothing."""
    given: list[int] = []
    for step in steps:
        if step.passes:
            given.append(1)
        elif given:
            given[-1] += 1
    return given


def without_pass(found: WorkResult) -> str | None:
    """A flag where tokens came for which no pass ran: all but guesses that a pass checked."""
    given = sum(int(tokens) * passes for tokens, passes in found.pass_tokens.items()) if DRAFT in found.slots else found.passes or 0
    return f"{found.tokens - given:,} of {found.tokens:,} tokens came without a pass of the model" if given < found.tokens else None


@dataclass(frozen=True)
class Share:
    """Of what ran, the part of one token: a pass is shared out among the tokens that it gave."""

    blocks: float
    products: float


def shared(steps: Sequence[Count]) -> list[Share]:
    """The share of each token of one text; arguments as of `tokens_of_passes`."""
    starts = [place for place, step in enumerate(steps) if step.passes or not place]
    parts = [steps[begin:end] for begin, end in zip(starts, [*starts[1:], len(steps)], strict=True)]
    return [
        Share(sum(step.blocks for step in part) / len(part), sum(step.products for step in part) / len(part))
        for part in parts
        for _ in part
    ]


def token_bytes(module: Any) -> float:
    """Bytes of the keys and values of one token in all layers."""
    return float(sum(_widths(module)) * module.dtype.itemsize)


def _widths(module: Any) -> list[int]:
    """Numbers of the keys and values of one token, layer by layer."""
    return [part.k_proj.out_features + part.v_proj.out_features for part in module.modules() if hasattr(part, "k_proj")]


def _cache_read(model: Any, steps: Sequence[Count]) -> int | None:
    """Mean bytes that the attentions of a token were given, where all layers keep as many numbers as they compute."""
    widths, reads = _widths(model.module), sum(sum(count.reads) for count in steps)
    if not reads or len(set(widths)) != 1 or "cache" in model.slots or hasattr(model.module, "drafter"):
        return None
    return round(reads * widths[0] * model.module.dtype.itemsize / len(steps))


def spread(values: Sequence[float]) -> Spread:
    """Mean and percentiles of what was counted token by token."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return Spread(mean=float(np.mean(values)), p5=float(low), p50=float(middle), p95=float(high))


def differences(found: WorkResult, claim: Work | None, token: float) -> list[str]:
    """One line for each point in which a claim says less than what ran, or more than what ran at least.

    Of a token that was guessed in vain the blocks that it ran count for itself, not for the token that came instead.

    Args:
        token: Bytes that one takes in a cache that keeps all.
    """
    claim, flags = claim or Work(), []
    rows = sum(int(size) * passes for size, passes in found.pass_rows.items())
    ran = found.blocks.mean * found.tokens / max(rows, found.tokens) if found.blocks else None
    if claim.blocks is not None and ran is not None and ran > _SLACK * claim.blocks:
        flags.append(f"claims {claim.blocks:.4g} blocks a token, ran {ran:.4g}")
    if claim.fewest_blocks is not None and found.blocks and found.blocks.p5 * _SLACK < claim.fewest_blocks:
        flags.append(f"claims at least {claim.fewest_blocks} blocks a token, ran {found.blocks.p5:.4g}")
    if claim.experts is not None and found.experts and found.experts.mean > _SLACK * claim.experts:
        flags.append(f"claims {claim.experts:.4g} experts a token, ran {found.experts.mean:.4g}")
    if claim.active_parameters is not None and found.active_parameters and found.active_parameters.mean > _SLACK * claim.active_parameters:
        flags.append(f"claims {claim.active_parameters:,.0f} active parameters, multiplied {found.active_parameters.mean:,.0f}")
    return [*flags, *_cache_flags(found, claim, token)]


def _cache_flags(found: WorkResult, claim: Work, token: float) -> Iterator[str]:
    written = found.tokens // found.prompts
    length = (found.prompt_tokens or 0) + written

    def of_layers(tokens: int, length: float) -> float:
        """The mean over layers of so many tokens, what was written and stays beside them, where a text has come to a length."""
        whole = claim.whole_layers or 0.0
        return whole * length + (1 - whole) * (tokens + (written if claim.keeps_written else 0))

    several = set(found.pass_rows) - {"1"}
    if found.cache_tokens is None or (claim.whole_layers and several):
        read = 0.0  # unseen, or calls that are of several tokens in one layer and of one in another
    else:
        read = found.cache_tokens.mean if claim.whole_layers else found.cache_tokens.p95
    if claim.read_tokens is not None and read > _SLACK * (most := of_layers(claim.read_tokens, length - (written - 1) / 2)):
        yield f"claims to read {most:,.0f} tokens, read {read:,.0f}"
    if claim.cache_tokens is None:
        return
    kept = of_layers(claim.cache_tokens, length)
    if read > _SLACK * (kept + 1):
        yield f"claims {kept:,.0f} tokens in the cache, read {read:,.0f}"
    if found.cache_bytes and found.cache_bytes > _SLACK * kept * (token + (claim.score_bytes or 0)):
        yield f"claims {kept:,.0f} tokens in the cache, holds the bytes of {found.cache_bytes / token:,.0f}"

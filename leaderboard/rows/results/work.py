"""What ran for a token of a row, and how long that should take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from pydantic import Field

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.schema.work import WHOLE, WorkResult
from slimbench.harness.stats.bootstrap import UNDEFINED, UNKNOWN, Estimate, attempt
from slimbench.harness.stats.shares import clustered_share
from slimbench.leaderboard.rows.groups import Group

_NUMBER = re.compile(r"[1-9][0-9]{0,5}")
_MOST = 100
"""Numbers of rows or tokens that are read of a record."""


class Work(Group):
    """What ran for a token, as it was counted; all of it None where nothing decides on that while the model runs."""

    slots: list[str] = Field(default=[], description="Parts of the run that a policy decides on: cache, attention, depth, draft and so on.")
    blocks_per_token: float | None = Field(default=None, description="Decoder blocks that ran for a token, mean.")
    blocks_p5: float | None = Field(default=None, description="Their 5th percentile over tokens.")
    blocks_p95: float | None = Field(default=None, description="Their 95th percentile over tokens.")
    active_share: float | None = Field(
        default=None,
        description="Parameters of matrices that took part in a token, each as often as it did, over those of all matrices, mean.",
    )
    scored_blocks: float | None = Field(
        default=None,
        description="Decoder blocks that ran for a token of the first corpus while it was scored, mean, where exits or routers decide.",
    )
    scored_blocks_p5: float | None = Field(default=None, description="Their 5th percentile over tokens.")
    scored_blocks_p95: float | None = Field(default=None, description="Their 95th percentile over tokens.")
    scored_active_share: float | None = Field(
        default=None, description="`active_share` of the tokens of the first corpus while it was scored: the work that its perplexity took."
    )
    cache_tokens: float | None = Field(default=None, description="Tokens whose keys and values an attention read for a token, mean.")
    held_cache_bytes: int | None = Field(
        default=None,
        description="Bytes of the largest cache at the end of a text; under `suffix` the mean over the tokens that were scored.",
    )
    held_cache_of: str | None = Field(
        default=None,
        description="The texts that `held_cache_bytes` are of: tokens of a prompt + tokens behind it, or `suffix`. Bytes of other texts "
        "are not compared.",
    )
    tokens_per_pass: float | None = Field(default=None, description="Tokens that a pass of the model gave, mean; above 1 with drafts.")
    pass_tokens: dict[str, int] = Field(default={}, description="How many passes gave so many tokens.")
    acceptance: float | None = Field(default=None, description="Share of the guessed tokens that were taken, over all texts.")
    acceptance_low: float | None = Field(default=None, description="Lower bound of that share, texts as clusters.")
    acceptance_high: float | None = Field(default=None, description="Upper bound of that share, texts as clusters.")
    repeated_4grams: float | None = Field(
        default=None, description="Share of the runs of four tokens in what was written that stood in the same text before."
    )
    work_prompt: int | None = Field(default=None, description="Tokens of each text behind which work was counted.")
    stepwise_gap: float | None = Field(
        default=None, description="Perplexity of some windows token by token over that of the record, less 1."
    )
    predicted_speedup: float | None = Field(
        default=None,
        description="Decode time of the reference / what the counted calls should take by the measured times of passes of so many tokens, "
        "and of the parts that guess; drawing tokens is not in it.",
    )


def work(quality: QualityResult | None, speed: SpeedResult | None) -> Work:
    """The work of a row: of the texts whose speed was measured, and of those of quality where speed was not."""
    timed, scored = speed.work if speed else None, quality.work if quality else None
    found = timed if timed and timed.tokens else scored
    if found is None or not found.tokens:
        return Work()
    ran, taken = scored.scored if scored else None, _acceptance(found)
    return Work(
        slots=found.slots,
        blocks_per_token=found.blocks.mean if found.blocks else None,
        blocks_p5=found.blocks.p5 if found.blocks else None,
        blocks_p95=found.blocks.p95 if found.blocks else None,
        active_share=found.active_parameters.mean / found.total_parameters if found.active_parameters and found.total_parameters else None,
        scored_blocks=ran.blocks if ran else None,
        scored_blocks_p5=ran.blocks_p5 if ran else None,
        scored_blocks_p95=ran.blocks_p95 if ran else None,
        scored_active_share=ran.active_parameters / scored.total_parameters if ran and scored and scored.total_parameters else None,
        cache_tokens=found.cache_tokens.mean if found.cache_tokens else None,
        held_cache_bytes=found.cache_bytes,
        held_cache_of=f"{found.prompt_tokens}+{found.tokens // found.prompts}" if found.cache_bytes and found.prompts else None,
        tokens_per_pass=found.tokens / found.passes if found.passes else None,
        pass_tokens={str(tokens): int(count) for tokens, count in sorted(by_number(found.pass_tokens).items())},
        acceptance=taken.value,
        acceptance_low=taken.low,
        acceptance_high=taken.high,
        repeated_4grams=found.repeated_4grams,
        work_prompt=found.prompt_tokens,
        stepwise_gap=scored.stepwise_gap if scored else None,
        predicted_speedup=_predicted(found, speed) if speed and found is timed else None,
    )


def _acceptance(found: WorkResult) -> Estimate:
    """Share of the guesses that were taken, with its interval over texts that had some."""
    texts = [(taken, all_) for taken, all_ in zip(found.text_accepted, found.text_drafted, strict=False) if all_ > 0]
    if not texts:
        return UNKNOWN
    taken, asked = zip(*texts, strict=True)
    return attempt(clustered_share, taken, asked, otherwise=Estimate(sum(taken) / sum(asked), *UNDEFINED))


def _predicted(found: WorkResult, speed: SpeedResult) -> float | None:
    """Time of the reference's step over the predicted one of the candidate's; None where either is not known.

    Of drafts alone: passes are timed with every other policy in force, which decides by the text.
    """
    own = token_ms(found, speed) if found.slots == ["draft"] else None
    return speed.reference_row_ms / own if own and speed.reference_row_ms else None


def token_ms(found: WorkResult, speed: SpeedResult) -> float | None:
    """Milliseconds that a token should take, each part by its own times where several were counted; None where one is not known."""
    if not found.part_calls:
        return predicted_ms(found.calls, speed.rows_ms, found.tokens)
    times = speed.parts_ms | {WHOLE: speed.rows_ms}
    parts = [predicted_ms(calls, times.get(part, {}), found.tokens) for part, calls in list(found.part_calls.items())[:_MOST]]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def predicted_ms(calls: Mapping[str, float], rows_ms: Mapping[str, float], tokens: int) -> float | None:
    """Milliseconds that a token should take: Σ_r calls(r) t(r) / tokens.

    Calls and times are of one part, the model or what guesses for it: a draft in few bits does not take the time of the model. A call of
    some of its matrices with r rows takes its share of t(r), the time of a call of r tokens through all of them; t is linear between the
    numbers of rows that were timed. With all matrices and drafts of γ tokens that cost nothing this is the model of Leviathan et al.
    (arXiv 2211.17192, theorem 3.8), with t(γ + 1) / t(1) in the place of their 1.

    Args:
        calls: Of each number of rows, how many times all of the part its calls make.
        rows_ms: Time of a call of all of it by its number of tokens.

    Returns:
        None where no calls were counted, or one has more rows than were timed.
    """
    counted, known = by_number(calls), sorted(by_number(rows_ms).items())
    if not counted or not known or max(counted) > known[-1][0]:
        return None
    rows, times = zip(*known, strict=True)
    return float(sum(share * np.interp(count, rows, times) for count, share in counted.items()) / tokens)


def by_number(counts: Mapping[str, float]) -> dict[int, float]:
    """What a record has by a number of rows or tokens; no key of another kind, and nothing that is not above zero."""
    return {int(key): count for key, count in list(counts.items())[:_MOST] if _NUMBER.fullmatch(key) and 0 < count < math.inf}

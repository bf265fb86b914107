"""What `recommend` answers, in lines for people."""

from __future__ import annotations

from collections.abc import Callable

from slimbench.harness.schema.identity import Stage
from slimbench.harness.stats import significance
from slimbench.leaderboard.flags.kinds import Figure, labelled
from slimbench.leaderboard.recommend import Candidate, Limit, Recommendation, memory_bytes, name
from slimbench.leaderboard.tables.format import decimal, p_text

_LISTED = 5


def describe(recommendation: Recommendation) -> list[str]:
    """The answer in lines for people."""
    found = recommendation
    answer = _of_choice(found, found.choice) if found.choice else _of_none(found)
    return [found.setting, *answer, *_of_left_out(found), *_of_others(found)]


def _of_none(found: Recommendation) -> list[str]:
    none = f"None of {found.considered} candidates keeps to the budget."
    lines = [f"{none} Nearest miss: {_words(found.nearest_miss)}" if found.nearest_miss else none]
    if found.unmeasured:
        instead = ", or limit --weights or --disk instead" if Figure.MEMORY.value in found.unmeasured else ""
        lines.append(f"No cell here has a figure of {', '.join(found.unmeasured)}: measure it with `stages=[{_stage(found)}]`{instead}.")
    return lines


def _stage(found: Recommendation) -> Stage:
    """The stage that measures what no candidate has."""
    return Stage.QUALITY if set(found.unmeasured) <= {"perplexity ratio", "weights", "disk"} else Stage.SPEED


def _of_choice(found: Recommendation, choice: Candidate) -> list[str]:
    lines = [f"Best by {found.objective}: {_words(choice)}", *_flags(choice)]
    if choice.limits:
        lines.append(f"It keeps to the budget: {'; '.join(map(_kept, choice.limits))}.")
    if found.runner_up:
        lines += [f"Runner-up: {_words(found.runner_up)}", *_flags(found.runner_up)]
    if found.ratio is not None and found.p is not None:
        change = f"perplexity of the choice {decimal(1, signed=True)(100 * (found.ratio - 1))} % against the runner-up"
        surely = "significant" if found.p < significance.LEVEL else "not significant"
        lines.append(f"{change[0].upper()}{change[1:]}: {surely}, {p_text(found.p)} (paired, Holm).")
    if found.tied:
        lines.append(f"Not significantly different in perplexity: {', '.join(found.tied)}.")
    return lines


def _of_left_out(found: Recommendation) -> list[str]:
    if not found.left_out:
        return []
    more = len(found.left_out) - _LISTED
    lines = ["Left out for an invalidating flag (`--include-flagged` takes them in):"]
    lines += [f"  {_words(left, missed=False)}: {'; '.join(left.flags)}" for left in found.left_out[:_LISTED]]
    return [*lines, f"  and {more} more"] if more > 0 else lines


def _of_others(found: Recommendation) -> list[str]:
    if not found.elsewhere:
        return []
    lines = ["Also fits in other sets of this model:"]
    for other in found.elsewhere[:_LISTED]:
        lines.append(f"  {_words(other.candidate)}; of {other.setting}{f' (`{other.option}`)' if other.option else ''}")
    more = len(found.elsewhere) - _LISTED
    return [*lines, f"  and {more} more"] if more > 0 else lines


def _flags(candidate: Candidate) -> list[str]:
    return [f"  Flag: {labelled(flag)}." for flag in candidate.row.flags]


def _words(candidate: Candidate, missed: bool = True) -> str:
    row = candidate.row
    memory = next((limit.value for limit in candidate.limits if limit.figure is Figure.MEMORY), memory_bytes(row))
    facts: list[tuple[float | None, Callable[[float], str]]] = [
        (row.perplexity, lambda v: f"perplexity {v:.2f}"),
        (row.perplexity_delta_percent, lambda v: f"{v:+.1f} %"),
        (memory, lambda v: f"{v / 1e6:.0f} MB"),
        (row.decode_tokens_per_s, lambda v: f"{v:.1f} tokens/s"),
        (row.speedup, lambda v: f"{v:.2f} ×"),
    ]
    misses = [_missed(limit) for limit in candidate.limits if limit.excess != 0] if missed else []
    text = f"{name(row)}: {', '.join(show(value) for value, show in facts if value is not None)}"
    return text + (f"; misses {', '.join(misses)}" if misses else "")


def _missed(limit: Limit) -> str:
    return f"{limit.name} (not measured)" if limit.excess is None else f"{limit.name} by {100 * limit.excess:.1f} %"


def _kept(limit: Limit) -> str:
    sure = "measured once, no interval" if limit.confidence is None else f"one-sided confidence {_percent(limit.confidence)}"
    return f"{limit.name} ({sure})"


def _percent(probability: float) -> str:
    return "> 99.9 %" if probability > 0.999 else "< 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"

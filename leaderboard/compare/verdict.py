"""A comparison in words and numbers: the verdict in one sentence, and the tables that bear it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slimbench.harness.schema.identity import Status
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.compare.compare import (
    AccuracyComparison,
    Comparison,
    Refusal,
    SpeedComparison,
)
from slimbench.leaderboard.compare.texts import Difference, ImitationComparison, MeanComparison, TextComparison
from slimbench.leaderboard.flags.kinds import Figure, kind
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.columns import COLUMNS
from slimbench.leaderboard.tables.format import EMPTY, decimal, p_text, p_value

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = ("kl_mean", "weight_bytes", "disk_bytes", "effective_bits")
_REFUSED = ("perplexity", "accuracy", "prefill_ms", "decode_tokens_per_s")
"""What is shown of each row where a ratio is refused."""
FINER = (3, 1)
"""Per cent of perplexity: how many windows would show these is said."""
_points = decimal(1, 100)
_signed_points = decimal(1, 100, signed=True)


def verdict(comparison: Comparison) -> str:
    """One sentence: quality, accuracy, speed, size. What does not differ significantly at 5 % is said to be so."""
    a, b = comparison.a, comparison.b
    refused = {refusal.figure: _refused(refusal) for refusal in comparison.refused}
    if why := refused.get(Figure.QUALITY):
        parts = [f"{a.label} against {b.label}: no ratio of perplexity and none of accuracy, {why}"]
    else:
        parts = [_quality(comparison.texts[0], a, b)] if comparison.texts else [f"{a.label} against {b.label}: no perplexity to compare"]
        parts += [_divergence(comparison.divergence)] if comparison.divergence else []
        parts += [_imitation(comparison.imitation)] if comparison.imitation else []
        why = refused.get(Figure.ACCURACY)
        missing = f"accuracy is not compared, {why}" if why else "no accuracy to compare"
        parts.append(_accuracy(comparison.accuracy) if comparison.accuracy else missing)
    decode = next((s for s in comparison.speed if s.phase == "decode"), None)
    why = refused.get(Figure.DECODE)
    parts.append(_speed(decode) if decode else f"no ratio of speed, {why}" if why else "no speed to compare")
    if ratio := comparison.weights_ratio:
        parts.append("weights of the same size" if abs(ratio - 1) < 0.005 else f"weights {decimal(2)(ratio)} times the size")
    return "; ".join(parts) + "."


def _refused(refusal: Refusal) -> str:
    return "since " + " and ".join(f"{label} has the flag “{flag}”" for label, flag in refusal.flags)


def power(text: TextComparison) -> str:
    """What so many items can show, and how many would show less; empty where their spread is not known.

    `16 windows can show a difference of 8.0 % (80 % power); 117 would show 3 %, 1,020 would show 1 %.`
    """
    if text.detectable_percent is None:
        return ""
    finer = [(percent, count) for percent in FINER if percent < text.detectable_percent and (count := text.needed(percent))]
    more = "".join(f"{',' if place else ';'} {count:,} would show {percent:g} %" for place, (percent, count) in enumerate(finer))
    return f"{text.items:,} windows can show a difference of {decimal(1)(text.detectable_percent)} % (80 % power){more}."


def _quality(text: TextComparison, a: Row, b: Row) -> str:
    """The first clause of the verdict: which of the two loses less in perplexity, if that is shown."""
    if text.p is None:
        return f"{a.label} against {b.label}: perplexity {change(text)}, too few windows for a test"
    if text.p >= LEVEL:
        return f"{a.label} and {b.label} do not differ significantly in perplexity: {change(text)}"
    better = text.ratio.value < 1
    if a.is_reference or b.is_reference:
        words = f"{a.label} is {'better' if better else 'worse'} than {b.label}"
    else:
        words = f"{a.label} loses {'less' if better else 'more'} than {b.label}"
    return f"{words}: perplexity {change(text)}"


def change(text: TextComparison) -> str:
    """The ratio of two perplexities, `1.6 % higher (95 % interval −3.5 to +8.0 %, p = 0.57)`."""
    return f"{_change(text.ratio.value)} ({_interval_of_ratio(text.ratio)}{'' if text.p is None else ', ' + p_text(text.p)})"


def _divergence(found: MeanComparison) -> str:
    delta, nats = found.delta, decimal(4, signed=True)
    facts = "no interval" if delta.low is None or delta.high is None else f"95 % interval {nats(delta.low)} to {nats(delta.high)}"
    words = f"{nats(delta.value)} nats ({facts}{'' if found.p is None else ', ' + p_text(found.p)})"
    if found.p is None or found.p >= LEVEL:
        return f"KL from the reference does not differ significantly, {words}"
    return f"KL from the reference is {'lower' if delta.value < 0 else 'higher'}, {words}"


def _imitation(found: ImitationComparison) -> str:
    """Which of two students finds their teacher's held-out answers likelier, if that is shown."""
    text = found.answers
    said = f"perplexity of the teacher's answers to {text.items:,} held-out prompts"
    if text.p is None:
        return f"{said} {change(text)}, too few of them for a test"
    return f"{said} {'' if text.p < LEVEL else 'does not differ significantly: '}{change(text)}"


def _change(ratio: float) -> str:
    """A ratio in words: `3.1 % lower`, `2.4 % higher`, from 2 on `4.5 times as high`."""
    if ratio >= 2:
        return f"{decimal(2)(ratio)} times as high"
    return f"{decimal(1)(100 * abs(ratio - 1))} % {'lower' if ratio < 1 else 'higher'}"


def _interval_of_ratio(ratio: Difference) -> str:
    """The interval in the unit of `_change`, with signs where it holds both directions."""
    if ratio.low is None or ratio.high is None:
        return "no interval"
    if ratio.value >= 2:
        return f"95 % interval {decimal(2)(ratio.low)} to {decimal(2)(ratio.high)}"
    low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
    if low <= 0 <= high:
        form = decimal(1, signed=True)
        return f"95 % interval {form(low)} to {form(high)} %"
    low, high = sorted((abs(low), abs(high)))
    return f"95 % interval {decimal(1)(low)} to {decimal(1)(high)} %"


def _accuracy(accuracy: AccuracyComparison) -> str:
    delta, form = accuracy.delta, _signed_points
    facts = "" if delta.low is None or delta.high is None else f"95 % interval {form(delta.low)} to {form(delta.high)}, "
    words = f"{form(delta.value)} points ({facts}{p_text(accuracy.p)})"
    text = f"accuracy {words}" if accuracy.p < LEVEL else f"accuracy does not differ significantly, {words}"
    tasks = [f"{t.task} {form(t.delta.value)}" for t in accuracy.tasks if t.significant]
    return text + (f", but does on {', '.join(tasks)}" if tasks and accuracy.p >= LEVEL else "")


def _speed(speed: SpeedComparison) -> str:
    ratio, form = speed.ratio, decimal(2)
    if ratio.low is None or ratio.high is None:
        return f"decoding {form(ratio.value)} times as fast, from too few runs for an interval"
    facts = f"{form(ratio.value)} times, 95 % interval {form(ratio.low)} to {form(ratio.high)}{', indirect' if speed.indirect else ''}"
    if not speed.significant:
        return f"speed does not differ significantly ({facts})"
    return f"decoding is {'faster' if ratio.value > 1 else 'slower'} ({facts})"


def to_terminal(comparison: Comparison) -> RenderableType:
    """The comparison as something rich can print."""
    from rich.console import Group
    from rich.text import Text

    a, b = comparison.a, comparison.b
    setting = [a.model, a.suite, *dict.fromkeys((a.engine_label, b.engine_label)), a.device, a.hardware]
    parts: list[RenderableType] = [Text(f"{a.label} against {b.label}", style="bold"), Text(" · ".join(setting), style="dim"), Text("")]
    parts += [Text(" ".join(filter(None, (verdict(comparison), *map(power, comparison.texts[:1]))))), Text("")]
    parts += [Text(f"{row.label}: {row.status}: {row.reason}", style="dim") for row in (a, b) if row.status != Status.OK]
    parts += [Text(f"{row.label}: {kind(flag)}: {flag}", style="dim") for row in (a, b) for flag in row.flags]
    if comparison.texts:
        parts.append(_text_table(comparison))
    if comparison.imitation:
        parts.append(_imitation_table(comparison, comparison.imitation))
    if comparison.accuracy:
        parts.append(_task_table(comparison, comparison.accuracy))
    parts += [_cell_table(comparison), *(Text(note, style="dim") for note in _notes(comparison))]
    return Group(*parts)


def _text_table(comparison: Comparison) -> Table:
    table = _table(comparison, "Perplexity", "ratio", "95 % interval", "p", "windows", "pairing gain")
    for text in comparison.texts:
        form = decimal(4)
        gain = EMPTY if text.pairing_gain is None else f"{decimal(1)(text.pairing_gain)} ×"
        values = (decimal(2)(text.a), decimal(2)(text.b), form(text.ratio.value), _bounds(text.ratio, form))
        _add(table, text.name, *values, EMPTY if text.p is None else p_value(text.p), str(text.items), gain)
    return table


def _imitation_table(comparison: Comparison, found: ImitationComparison) -> Table:
    table = _table(comparison, "Held-out examples", "ratio or difference", "95 % interval", "p", "examples")
    likely, form = found.answers, decimal(4)
    values = (decimal(2)(likely.a), decimal(2)(likely.b), form(likely.ratio.value), _bounds(likely.ratio, form))
    name, count = f"perplexity, {likely.name}", str(likely.items)
    _add(table, name, *values, EMPTY if likely.p is None else p_value(likely.p), count)
    form = decimal(3, signed=True)
    for name, sign in found.likeness.items():
        values = (decimal(3)(sign.a), decimal(3)(sign.b), form(sign.delta.value), _bounds(sign.delta, form))
        _add(table, name, *values, EMPTY if sign.p is None else p_value(sign.p), count)
    return table


def _task_table(comparison: Comparison, accuracy: AccuracyComparison) -> Table:
    table = _table(comparison, "Accuracy %", "points", "95 % interval", "A only", "B only", "p", "Holm", "")
    for task in accuracy.tasks:
        values = (_points(task.a), _points(task.b), _signed_points(task.delta.value), _bounds(task.delta, _signed_points))
        counts = (str(task.a_only), str(task.b_only), p_value(task.p), p_value(task.p_holm))
        _add(table, task.task, *values, *counts, "*" if task.significant else "")
    count = len(accuracy.tasks)
    means = [_points(sum(values) / count) for values in ([t.a for t in accuracy.tasks], [t.b for t in accuracy.tasks])]
    delta = (_signed_points(accuracy.delta.value), _bounds(accuracy.delta, _signed_points))
    mark = "*" if accuracy.p < LEVEL else ""
    _add(table, "mean", *means, *delta, str(accuracy.a_only), str(accuracy.b_only), p_value(accuracy.p), "", mark)
    return table


def _cell_table(comparison: Comparison) -> Table:
    a, b = comparison.a, comparison.b
    table = _table(comparison, "Distance, size and speed", "ratio", "95 % interval")
    ratios = {"weight_bytes": comparison.weights_ratio, "disk_bytes": comparison.disk_ratio}
    for column in COLUMNS:
        if column.key in _SHOWN or (column.key in _REFUSED and comparison.refused):
            header = "KL from the reference, nats" if column.key == "kl_mean" else column.header
            ratio = ratios.get(column.key)
            bounds, found = "", comparison.divergence
            if column.key == "kl_mean" and found:
                ratio, bounds = (found.a / found.b if found.b else None), f"{_bounds(found.delta, decimal(4, signed=True))} nats"
            _add(table, header, column.plus_minus(a), column.plus_minus(b), EMPTY if ratio is None else decimal(3)(ratio), bounds)
    for speed in comparison.speed:
        form = decimal(3)
        name = f"{speed.phase} speed, {speed.point}"
        _add(table, name, "", "", form(speed.ratio.value), _bounds(speed.ratio, form))
    return table


def _table(comparison: Comparison, title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(title), overflow="fold", min_width=18)
    for name in (f"A {comparison.a.label}", f"B {comparison.b.label}", *columns):
        table.add_column(Text(name), justify="right")
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _bounds(difference: Difference, form: Callable[[float], str]) -> str:
    return EMPTY if difference.low is None or difference.high is None else f"{form(difference.low)} to {form(difference.high)}"


def _notes(comparison: Comparison) -> list[str]:
    notes = ["Ratios are A / B on the same windows, items or machine. * significant at 5 %."]
    notes += [f"No ratio of {refusal.figure}, {_refused(refusal)}." for refusal in comparison.refused]
    if comparison.accuracy:
        notes.append("A only, B only: items that only one has right; a task's p is McNemar's. Holm: corrected over the tasks.")
    if any(text.pairing_gain for text in comparison.texts):
        head = comparison.texts[0]
        if head.unpaired_se and head.paired_se:
            errors = f"{head.unpaired_se:.4f} unpaired, {head.paired_se:.4f} paired"
            notes.append(f"Pairing gain: standard error of ΔNLL on {head.name}: {errors} (nats).")
    if any(speed.indirect for speed in comparison.speed):
        notes.append("Speed is indirect: both ran next to the reference, not next to each other; the ratio is that of their speed-ups.")
    return notes

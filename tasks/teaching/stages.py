"""What the stages of a recipe do: rows in, rows out, and a count of what was asked, what was looked at and why it did not stay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimbench.tasks.teaching import checks, passages, programs
from slimbench.tasks.teaching.parts import SEEN, Row, filled, side
from slimbench.tasks.teaching.recipe import Ask, Compare, Demonstrate, Evaluate, Gather, Grow, Retrieve, Select, Stage
from slimbench.util.hashing import digest
from slimbench.util.writing import answers
from slimbench.util.writing.teaching import Completion, Request

Asking = Callable[[Sequence[Request]], list[Completion]]


@dataclass
class Tally:
    """What a stage did.

    Attributes:
        requests: That the teacher was asked.
        candidates: Rows, or answers of which no row could be made: those that were kept and those that were rejected.
        rejected: By reason.
        tokens: Of all answers, as the teacher counts.
    """

    kind: str
    requests: int = 0
    candidates: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0

    def judge(self, reason: str | None) -> bool:
        """Count a candidate; whether it stays."""
        self.candidates += 1
        if reason is None:
            self.kept += 1
        else:
            self.rejected[reason] += 1
        return reason is None

    def answered(self, said: Sequence[Completion]) -> None:
        self.requests += len(said)
        self.prompt_tokens += sum(answer.prompt_tokens for answer in said)
        self.tokens += sum(answer.tokens for answer in said)

    def told(self) -> dict[str, Any]:
        """For a manifest."""
        return {**vars(self), "rejected": dict(sorted(self.rejected.items()))}


def applied(stage: Stage, rows: Sequence[Row], ask: Asking, count: int, seed: int, held_out: float) -> tuple[list[Row], Tally]:
    """Rows that have gone through a stage.

    Args:
        ask: Gives the answers to requests, in order.
        count: Rows that are wanted; a stage that grows stops there.
        seed: Of the draws of this stage.
        held_out: Share of new rows that no student will see.
    """
    tally = Tally(stage.kind)
    through = [row for row in rows if _meets(row, stage.when)]
    match stage:
        case Grow():
            return _grown(stage, rows, ask, count, seed, held_out, tally), tally
        case Ask():
            made = _asked(stage, through, ask, seed, tally)
        case Evaluate():
            made = _checked(stage, ((row, _evaluated(stage, row)) for row in through), tally)
        case Retrieve():
            made = _checked(stage, ((row, _with_passages(stage, row)) for row in through), tally)
        case Compare():
            said = {True: "yes", False: "no"}
            made = _checked(
                stage, ((row, row | {stage.into: said[checks.same(row[stage.one], row[stage.other])]}) for row in through), tally
            )
        case Demonstrate():
            made = _checked(stage, ((row, _beside(stage, row, rows, seed)) for row in through), tally)
        case Gather():
            made = _checked(stage, ((row, row) for row in _gathered(stage, through)), tally)
        case Select():
            made = _selected(stage, _checked(stage, ((row, row) for row in through), tally), tally)
    if not stage.when:
        return made, tally
    past = {id(row) for row in through}
    return [row for row in rows if id(row) not in past] + made, tally


def first_requests(stages: Sequence[Stage], rows: Sequence[Row], seeds: Sequence[int], count: int, held_out: float) -> list[Request]:
    """What the first stage that asks would ask first, for a look beforehand; `seeds` are those of the stages."""
    for stage, seed in zip(stages, seeds, strict=True):
        if isinstance(stage, Grow):
            return [_growing(stage, rows, [], digest(seed), turn) for turn in range(stage.requests)]
        if isinstance(stage, Ask):
            through = [row for row in rows if _meets(row, stage.when)]
            return [_request(stage, row, sample, seed) for row in through for sample in range(stage.samples)]
        rows, _ = applied(stage, rows, lambda requests: [], count, seed, held_out)
    return []


def _meets(row: Row, when: Mapping[str, str]) -> bool:
    return all(checks.same(row.get(name, ""), value) for name, value in when.items())


def _asked(stage: Ask, rows: Sequence[Row], ask: Asking, seed: int, tally: Tally) -> list[Row]:
    places = [(row, sample) for row in rows for sample in range(stage.samples)]
    said = ask([_request(stage, row, sample, seed) for row, sample in places])
    tally.answered(said)
    rules, made = checks.Checks(stage.keep), list[Row]()
    for (row, _), answer in zip(places, said, strict=True):
        reason = answers.unfit(answer, stage.draw.sampling())
        found = [] if reason else _parsed(stage, answer.text)
        if not found:
            tally.judge(reason or "not of the form")
        made += [row | fields for fields in found if tally.judge(rules.refused(row | fields, answer))]
    return made


def _request(stage: Ask, row: Row, sample: int, seed: int) -> Request:
    system = (("system", filled(stage.system, row)),) if stage.system else ()
    return Request(
        chat=(*system, ("user", filled(stage.prompt, row))),
        sampling=stage.draw.sampling(),
        seed=int(digest([seed, row["item"], sample])[:7], 16),
        against=None if stage.against is None else filled(stage.against, row),
        weight=0.0 if stage.against is None else stage.weight,
    )


def _parsed(stage: Ask, text: str) -> list[Row]:
    """The fields of an answer, of each place that is looked for; none where it is not of the form."""
    if stage.pattern is None:
        return [{stage.into: text.strip()}]
    if stage.every:
        return [_groups(match) for match in stage.pattern.finditer(text)]
    return [_groups(match)] if (match := stage.pattern.search(text)) else []


def _groups(found: Any) -> Row:
    return {name: (value or "").strip() for name, value in found.groupdict().items()}


def _grown(stage: Grow, rows: Sequence[Row], ask: Asking, count: int, seed: int, held_out: float, tally: Tally) -> list[Row]:
    """New rows, without those that there were."""
    rules, made, turn = checks.Checks(stage.keep), list[Row](), 0
    for row in rows:
        rules.know(row)
    while len(made) < count and tally.requests < stage.attempts * count:
        requests = [_growing(stage, rows, made, digest(seed), turn + index) for index in range(stage.requests)]
        said = ask(requests)
        tally.answered(said)
        turn += stage.requests
        for answer in said:
            for row, reason in _born(stage, answer):
                if tally.judge(reason or rules.refused(row, answer)):
                    made.append({"item": f"grown {len(made)}", "side": side(row, held_out)} | row)
    if more := max(0, len(made) - count):
        tally.kept -= more
        tally.rejected["more than were wanted"] += more
    return made[:count]


def _growing(stage: Grow, rows: Sequence[Row], made: Sequence[Row], seed: str, turn: int) -> Request:
    """A request that shows rows drawn anew."""
    drawn = sorted(range(len(made)), key=lambda index: digest([seed, turn, "grown", index]))[: stage.grown]
    own = sorted(range(len(rows)), key=lambda index: digest([seed, turn, "own", index]))[: stage.own + stage.grown - len(drawn)]
    examples = [made[index] for index in drawn] + [rows[index] for index in own]
    examples.sort(key=lambda row: digest([seed, turn, row["item"]]))
    full = ({name: value or stage.empty for name, value in row.items()} for row in examples)
    shown = "\n".join(filled(stage.shown, row | {"number": str(number)}) for number, row in enumerate(full, 1))
    text = filled(stage.prompt, {"shown": shown, "next": str(len(examples) + 1)})
    system = (("system", stage.system),) if stage.system else ()
    return Request((*system, ("user", text)), stage.draw.sampling(), int(digest([seed, turn])[:7], 16))


def _born(stage: Grow, answer: Completion) -> Iterator[tuple[Row, str | None]]:
    """The rows in an answer, or why there are none; of one that was cut at its limit the last is not whole."""
    if reason := answers.unfit(answer, stage.draw.sampling()):
        yield {}, reason
        return
    assert stage.pattern is not None
    found = [_groups(match) for match in stage.pattern.finditer(answer.text)]
    if not found:
        yield {}, "not of the form"
    for place, row in enumerate(found, 1):
        yield row, "cut at its limit" if answer.finish == "length" and place == len(found) else None


def _checked(stage: Stage, pairs: Iterable[tuple[Row, Row | str]], tally: Tally) -> list[Row]:
    """The rows that a stage made, or says why not, and that pass its checks."""
    rules, made = checks.Checks(stage.keep), []
    for _, row in pairs:
        reason = row if isinstance(row, str) else rules.refused(row)
        if tally.judge(reason) and isinstance(row, dict):
            made.append(row)
    return made


def _evaluated(stage: Evaluate, row: Row) -> Row | str:
    try:
        return row | {stage.into: programs.result(row[stage.program])}
    except programs.NoProgram as error:
        return f"{stage.program}: {error}"


def _with_passages(stage: Retrieve, row: Row) -> Row:
    return row | {stage.into: "\n".join(passages.found(stage.corpus, filled(stage.query, row), stage.count))}


def _beside(stage: Demonstrate, row: Row, rows: Sequence[Row], seed: int) -> Row | str:
    """A row with others of other items."""
    others = {other["item"]: other for other in rows if other["item"] != row["item"] and other["side"] == SEEN}
    if stage.alike:
        others = {item: other for item, other in others.items() if checks.same(other.get(stage.alike, ""), row.get(stage.alike, ""))}
    if stage.unlike:
        others = {item: other for item, other in others.items() if not checks.same(other.get(stage.unlike, ""), row.get(stage.unlike, ""))}
    if len(others) < stage.count:
        return "too few other rows"
    drawn = sorted(others, key=lambda item: digest([seed, row["item"], item]))[: stage.count]
    return row | {stage.into: stage.between.join(filled(stage.item, others[item]) for item in drawn)}


def _gathered(stage: Gather, rows: Sequence[Row]) -> list[Row]:
    """The first row of each item and kind, with what all of them have."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["item"], {}).setdefault(row[stage.by].casefold(), []).append(row)
    made = []
    for kinds in found.values():
        lines = "\n".join(of[0][stage.by] for of in kinds.values())
        made += [
            of[0] | {stage.into: json.dumps(list(dict.fromkeys(r[stage.field] for r in of))), stage.kinds: lines} for of in kinds.values()
        ]
    return made


def _selected(stage: Select, rows: Sequence[Row], tally: Tally) -> list[Row]:
    """So many of each item at least and at most."""
    items: dict[str, list[Row]] = {}
    for row in rows:
        items.setdefault(row["item"], []).append(row)
    if stage.apart:
        items = {item: [row for place, row in enumerate(of) if not _like_a_later(of, place, stage.apart)] for item, of in items.items()}
    made = [row for of in items.values() if len(of) >= stage.at_least for row in of[: stage.each]]
    if dropped := len(rows) - len(made):
        tally.kept -= dropped
        tally.rejected["alike, too few or too many of an item" if stage.apart else "too few or too many of an item"] += dropped
    return made


def _like_a_later(rows: Sequence[Row], place: int, apart: Mapping[str, float]) -> bool:
    own, later = rows[place], rows[place + 1 :]
    return any(all(_in_common(own.get(name, ""), row.get(name, "")) >= limit for name, limit in apart.items()) for row in later)


def _in_common(one: str, other: str) -> float:
    """Jaccard similarity of the words of two texts; 1 of two that are empty."""
    first, second = set(one.split()), set(other.split())
    return len(first & second) / len(first | second) if first or second else 1.0

"""The page of one cell: all its measurements, what the method claims and what was found, provenance, and how to run it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.work import ScoredWork, WorkResult
from slimbench.harness.store.store import Store
from slimbench.leaderboard.flags.kinds import noise, noisy
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import courses, ledgers, names, taught
from slimbench.leaderboard.site.board import Board, plural
from slimbench.leaderboard.site.continuations import HEADER, worst
from slimbench.leaderboard.site.facts import details
from slimbench.leaderboard.site.lines import Line
from slimbench.leaderboard.site.method import steps
from slimbench.leaderboard.site.pages import LONGEST_REMARK, page
from slimbench.leaderboard.site.standing import standing
from slimbench.leaderboard.tables.columns import COLUMNS
from slimbench.leaderboard.tables.format import EMPTY, decimal, p_text, p_value, shorten
from slimbench.leaderboard.tables.verdict import verdict

EVIDENCE_TITLE = "Found by the stage"
_LONGEST_TEXT = 20_000
_SHOWN_APART = {"Status", "Flags", "Command", "Provenance", "Perplexity", "Accuracy % (against the reference)", "Speed over the grid"}
_BYTES = decimal(1, 1e-6)
_WORK = {
    "blocks": "Decoder blocks that ran",
    "active_parameters": "Parameters of matrices that took part, 10⁶",
    "cache_tokens": "Tokens that an attention read",
}


@dataclass(frozen=True)
class Grid:
    """A small table. `kind` is `n` for numbers behind the first column, `words` for texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: Sequence[tuple[str, str]] = ()
    kind: str = "n"


def render(board: Board, row: Row, line: Line) -> str:
    records = board.records(row)
    table = board.tables[board.table_of[row.place]]
    unsteady = [shorten(text, LONGEST_REMARK) for text in noise(row.flags)]
    setting = board.settings[board.table_of[row.place]]
    return page(
        "cell.html.j2",
        names.cell(row),
        f"{row.label} · {row.model}",
        row=row,
        line=line,
        set_id=setting["id"],
        setting=setting["name"],
        model_href=names.model(row.model),
        methods=[(name, names.method(name)) for name in steps(board, row)],
        verdict=verdict(row, _reference(table.rows, row)),
        measured=shorten(row.provenance.get("measured", "")[:10], LONGEST_REMARK),
        files=[_cut(clean(_file(record))) for record in records.values()],
        standing=standing(board, row),
        remarks=[text for text in line.remarks if text != noisy(len(unsteady))],
        unsteady=unsteady,
        noisy=noisy(len(unsteady)),
        tiles=[
            {"header": column.header, "help": column.help, "value": value, "interval": column.interval(row)}
            for column in COLUMNS
            if (value := column.value(row)) != EMPTY
        ],
        command=shorten(row.command, _LONGEST_TEXT),
        export=shorten(_export(row, records), _LONGEST_TEXT),
        details=[
            (name, f"{text} (of {plural(_ranked(table.rows), 'cell')} in this set)" if name == "Rank" else text)
            for name, text in details(row)
            if name not in _SHOWN_APART
        ],
        grids=[grid for grid in (_perplexities(row), _tasks(row), _astray(board, row), _speeds(row)) if grid.rows],
        ledgers=ledgers.parts(row, records.get(Stage.SPEED), board.index),
        evidence=list(_evidence(records)),
        frame=courses,
        charts=courses.charts(records.get(Stage.COMPRESS)),
        provenance=list(_provenance(records)),
    )


def _export(row: Row, records: Mapping[Stage, Record]) -> str:
    """The command that writes the artefact of a row for other programs; empty where there is none to ship."""
    made, named = records.get(Stage.COMPRESS), row.command.removeprefix("slimbench run ")
    if made is None or made.status is not Status.OK or made.simulated or row.is_reference or row.foreign or named == row.command:
        return ""
    return f"slimbench artefact export {named} --to FOLDER"


def _reference(rows: Sequence[Row], row: Row) -> Row | None:
    """The reference of a row's table on the same engine."""
    return next((other for other in rows if other.is_reference and other.engine_label == row.engine_label), None)


def _ranked(rows: Sequence[Row]) -> int:
    return sum(row.rank is not None or row.accuracy_rank is not None for row in rows)


def _perplexities(row: Row) -> Grid:
    form = decimal(2)
    return Grid(
        "Perplexity by corpus and protocol",
        ("Protocol", "Perplexity"),
        [(_cut(k), _text(form, v)) for k, v in row.perplexity_by_protocol.items()],
    )


def _tasks(row: Row) -> Grid:
    form, signed = decimal(1, 100), decimal(1, 100, signed=True)
    rows = [
        (_cut(task), _text(form, value), _text(signed, row.task_delta.get(task)), _text(p_value, row.task_p.get(task)))
        for task, value in row.task_accuracy.items()
    ]
    return Grid("Zero-shot tasks", ("Task", "Accuracy %", "Points above the reference", "p (Holm)"), rows)


def _astray(board: Board, row: Row) -> Grid:
    record = board.index.of_row(row, Stage.QUALITY)
    reference = board.index.reference(record) if record and not row.is_reference else None
    texts = worst(record.quality, reference.quality) if record and record.quality and reference else []
    return Grid("Where it departs most from the reference", HEADER, texts, kind="words")


def _speeds(row: Row) -> Grid:
    forms = {
        "prefill_ms": ("Prefill ms", decimal(0)),
        "decode_tokens_per_s": ("Tokens/s", decimal(1)),
        "throughput_tokens_per_s": ("Tokens/s in all", decimal(1)),
        "speedup": ("Speed-up", decimal(2)),
        "roofline_fraction": ("Roof %", decimal(0, 100)),
    }
    rows = [
        (
            f"{point['batch']} × {point['prompt']} + {point['new_tokens']}",
            *(_number(form, point.get(key)) for key, (_, form) in forms.items()),
        )
        for point in row.speed_points
    ]
    return Grid("Speed: batch × prompt + new tokens", ("Point", *(header for header, _ in forms.values())), rows)


def _work(records: Mapping[Stage, Record]) -> Grid:
    """What ran for a token, of the texts of each stage that counted it."""
    results = {stage: records[stage].quality or records[stage].speed for stage in (Stage.QUALITY, Stage.SPEED) if stage in records}
    counts = {stage: work for stage, result in results.items() if result and (work := result.work) and work.tokens}
    rows = []
    for name, form in zip(_WORK, (decimal(1), decimal(1, 1e-6), decimal(0)), strict=True):
        for stage, counted in counts.items():
            if (found := getattr(counted, name)) is not None:
                rows.append(
                    (f"{_WORK[name]} ({stage})", *(_number(form, clean(getattr(found, part))) for part in ("mean", "p5", "p50", "p95")))
                )
    rows += [row for counted in counts.values() if counted.scored for row in _scored(counted.scored)]
    facts = [
        (
            f"Counted by {stage}",
            f"{counted.tokens:,} tokens behind {plural(counted.prompts, 'text')} of {counted.prompt_tokens or 0:,}, {_passes(counted)}",
        )
        for stage, counted in counts.items()
    ]
    header = ("Count", "Mean", "5 %", "Median", "95 %") if rows else ()
    return Grid("Work of a token, as counted", header, rows, facts)


def _scored(counted: ScoredWork) -> Iterator[tuple[str, ...]]:
    """What ran while the first corpus was scored."""
    for name, form, values in (
        ("blocks", decimal(1), (counted.blocks, counted.blocks_p5, None, counted.blocks_p95)),
        ("active_parameters", decimal(1, 1e-6), (counted.active_parameters, None, None, None)),
    ):
        yield f"{_WORK[name]} (scored texts, {counted.tokens:,} tokens)", *(_number(form, clean(value)) for value in values)


def _passes(counted: WorkResult) -> str:
    """`1,536 passes, 1.31 tokens a pass, 99.2 % of the tokens as without guesses, 1 text parts from it by rounding`."""
    told = f"{counted.passes or 0:,} passes, {decimal(2)(counted.tokens / max(1, counted.passes or 0))} tokens a pass"
    if counted.temperature is not None:
        held = "" if counted.drawn_p is None else f", from the model's own distribution by {p_text(counted.drawn_p)}"
        return f"{told}, drawn at temperature {counted.temperature:g}{held}"
    if counted.equal is None:
        return told
    told = f"{told}, {_number(decimal(1, 100), clean(counted.equal))} % of the tokens as without guesses"
    return f"{told}, {plural(parted, 'text')} apart by rounding" if (parted := counted.parted_by_rounding) else told


def _number(form: Any, value: Any) -> str:
    return form(value) if isinstance(value, int | float) else EMPTY


def _evidence(records: Mapping[Stage, Record]) -> Iterator[Grid]:
    compress = records.get(Stage.COMPRESS)
    if compress and compress.compress:
        claim = {k: v for k, v in clean(compress.compress.claim.to_dict()).items() if v not in (None, 0, {}, [])}
        yield Grid("Claim", (), (), [(_cut(name), _cut(_plain(value))) for name, value in claim.items()])
    if told := taught.facts(compress):
        yield Grid("Taught", taught.HEADER, taught.rows(records.get(Stage.QUALITY)), told)
    for stage in (Stage.QUALITY, Stage.SPEED):
        result = (records[stage].quality or records[stage].speed) if stage in records else None
        if result and result.evidence:
            yield _found(f"{EVIDENCE_TITLE} {stage}", result.evidence)
            break
    if (counted := _work(records)).facts:
        yield counted
    if compress and compress.compress:
        files = [(_cut(clean(f.name)), f"{f.bytes:,}", (f.sha256 or EMPTY)[:64]) for f in compress.compress.files[:100]]
        yield Grid("Files of the artefact", ("File", "Bytes", "SHA-256"), files)


def _found(title: str, evidence: Evidence) -> Grid:
    bits, zeros = decimal(2), decimal(1, 100)
    rows = [
        (
            _cut(clean(f"{layer.layer} ({layer.role})")),
            f"{layer.count:,}",
            f"{layer.parameters:,}",
            f"{layer.bytes:,}",
            _number(bits, clean(layer.bits_per_weight)),
            _number(zeros, clean(layer.zeros)) + (f" ({_cut(clean(layer.pattern))})" if layer.pattern and layer.zeros else ""),
            _cut(", ".join(clean(list(layer.dtypes)))),
            _cut(", ".join(clean(list(layer.operators)))) or EMPTY,
        )
        for layer in evidence.layers[:100]
    ]
    facts = {
        "Weights in memory": f"{evidence.weight_bytes:,} bytes",
        "Weights offloaded": f"{evidence.offloaded_bytes:,} bytes" if evidence.offloaded_bytes else None,
        "Operators of one decode step": ", ".join(f"{name} × {count}" for name, count in evidence.operators.items()),
        "Dense weights expanded in a step": None if evidence.materialised_bytes is None else f"{_BYTES(evidence.materialised_bytes)} MB",
        "Faster kernels that are missing": "; ".join(evidence.missing_kernels),
    }
    header = ("Layers", "Number", "Weights", "Bytes", "Bits a weight", "Zeros %", "Stored as", "Multiplied by")
    return Grid(title, header, rows, [(name, _cut(clean(text))) for name, text in facts.items() if text])


def _provenance(records: Mapping[Stage, Record]) -> Iterator[dict[str, Any]]:
    """What all stages have in common, then each stage with the rest."""
    facts = {stage: _facts(record) for stage, record in records.items()}
    texts = {stage: _texts(record) for stage, record in records.items()}
    if len(records) > 1:
        common = _shared(facts), _shared(texts)
        if any(common):
            yield _section("All stages", *common)
    for stage, record in records.items():
        yield _section(f"Stage {stage}: {record.status}", facts[stage], texts[stage])


def _shared(found: Mapping[Stage, dict[str, Any]]) -> dict[str, Any]:
    """Take out what is the same everywhere."""
    first, *others = found.values()
    same = [name for name, value in first.items() if all(other.get(name) == value for other in others)]
    for other in others:
        for name in same:
            del other[name]
    return {name: first.pop(name) for name in same}


def _section(title: str, facts: Mapping[str, Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    written = {name: text if isinstance(text, str) else to_json(text, indent=1, fallback=str).decode() for name, text in texts.items()}
    return {
        "title": title,
        "facts": [(name, _cut(clean(str(value)))) for name, value in facts.items()],
        "texts": [(name, "\n".join(map(clean, shorten(text, _LONGEST_TEXT).splitlines()))) for name, text in written.items()],
    }


def _facts(record: Record) -> dict[str, Any]:
    facts = record.provenance
    git = value if isinstance(value := facts.get("git"), dict) else {}
    hardware = value if isinstance(value := facts.get("hardware"), dict) else {}
    known = {
        "Key": record.key,
        "File": _file(record),
        "Started": record.started,
        "Took": None if record.wall_seconds is None else f"{record.wall_seconds:,.1f} s",
        "Peak memory": None if record.peak_memory_bytes is None else f"{_BYTES(record.peak_memory_bytes)} MB",
        "Record": f"schema {record.schema_version}",
        "Imported": f"{imported.label}, {imported.file}, SHA-256 {imported.sha256}" if (imported := record.imported) else None,
        "slimbench": facts.get("slimbench"),
        "Commit": f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else None,
        "Python": facts.get("python"),
        "System": facts.get("os"),
        "Processor": hardware.get("cpu"),
        "Threads": facts.get("threads"),
    }
    return {name: value for name, value in known.items() if value not in (None, "")}


def _file(record: Record) -> str:
    """Where a record lies in the results folder."""
    return Store(Path()).path(record.cell, record.stage, record.hardware).as_posix()


def _texts(record: Record) -> dict[str, Any]:
    """Long texts; the configuration as it is, to be written out where it is shown."""
    packages, failure = record.provenance.get("packages"), record.failure
    known = {
        "Packages": "\n".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else "",
        "Configuration": record.config,
        "Traceback": failure.traceback if failure else "",
        "End of stderr": failure.stderr_tail if failure else "",
    }
    return {name: value for name, value in known.items() if value}


def _plain(value: Any) -> str:
    """A value in one line; of named ones those that are known."""
    if isinstance(value, dict) and not any(isinstance(part, dict | list) for part in value.values()):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items() if part is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return shorten(text, LONGEST_REMARK)


def _text(form: Any, value: float | None) -> str:
    return EMPTY if value is None else form(value)

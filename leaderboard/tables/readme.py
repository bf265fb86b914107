"""`python -P -m slimbench.leaderboard.tables.readme RESULTS FILE…`: the tables of README and docs, written from the records of reference.

No foreign row stands in them. A table stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. A test holds the files against the
records.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path

from slimbench.harness.store.store import Store
from slimbench.leaderboard import coverage
from slimbench.leaderboard.compare import students
from slimbench.leaderboard.compare.crossover import fields
from slimbench.leaderboard.compare.grids import Study, studies
from slimbench.leaderboard.compare.students import Group
from slimbench.leaderboard.flags.kinds import Figure, spoiling
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables import crossover, grids
from slimbench.leaderboard.tables.beside import dense_by_engine, told
from slimbench.leaderboard.tables.columns import COLUMNS, Column
from slimbench.leaderboard.tables.format import EMPTY, escape
from slimbench.leaderboard.tables.resolution import anchors, resolution
from slimbench.util.files import write_atomically

_MODEL = "smollm2-135m"
_PLACE = "4d93c621"
"""Fingerprint of the one machine that the tables are of."""
_METHODS = (
    *("dense", "rtn-8bit", "gptq-8bit", "kv-int8", "signround", "awq-clip", "gptq", "rtn-4bit"),
    *("signround-3bit", "gptq-3bit", "wanda", "sparsegpt+sparse-bitmap", "shortgpt", "shortgpt+lora(steps=160)"),
    *("shortgpt(fraction=0.5)+kd(learning_rate=0.0002)", "shortgpt(fraction=0.5)+kd(learning_rate=0.0002)+gptq", "lolcats"),
)
_ON_TEXTS = ("prompt-lookup", "rtn-8bit+prompt-lookup")
"""Policies whose speed depends on the text: theirs is that of prompts that are texts."""
_ENGINES = (
    *(("transformers", "dense"), ("transformers", "rtn-4bit-head8")),
    *(("compiled", "dense"), ("compiled", "rtn-4bit-head8")),
    *(("llamacpp", "dense"), ("llamacpp", "rtn-4bit-head8")),
)
_CROSSOVER = "crossover"
"""The protocol of speed whose rows stand in the tables of crossovers."""
_SHOWN = (
    *("perplexity_delta_percent", "perplexity_verdict", "kl_mean", "accuracy_delta"),
    *("speedup", "weight_bytes", "effective_bits"),
)
_FIGURES = {"accuracy_delta": Figure.ACCURACY, "decode_tokens_per_s": Figure.DECODE, "speedup": Figure.DECODE}
_HOW = (
    "\nΔ % is perplexity above dense, paired over windows; ± is half of the 95 % interval, which itself stands in brackets where it is "
    "skewed. (texts): speed on prompts that are texts.\n"
)
_OF_ENGINES = ("perplexity_delta_percent", "perplexity_verdict", "decode_tokens_per_s", "speedup", "weight_bytes")


def methods(board: Sequence[Row]) -> str:
    """The front table: what methods cost and give under one suite on one engine, the smallest loss first."""
    dense, *others = (*_fronts(board, _METHODS, "front"), *_fronts(board, _ON_TEXTS, "policy"))
    ranked = sorted(others, key=lambda row: row.perplexity or inf)
    lines = [([escape(row.pipeline) + " (texts)" * (row.pipeline in _ON_TEXTS), row.family], row) for row in (dense, *ranked)]
    beside = told(dense_by_engine(board, dense), dense.engine)
    return _table(["Pipeline", "Family"], lines, _SHOWN) + _HOW + _reading(board, [dense]) + (f"\n{beside}\n" if beside else "")


def engines(board: Sequence[Row]) -> str:
    """The same weights on several engines."""
    chosen = {(row.engine, row.pipeline): row for row in _lowest_seeds_last(board) if _is_shown(row, "engines", "quick")}
    lines = [([engine, escape(name)], chosen[engine, name]) for engine, name in _ENGINES]
    return _table(["Engine", "Pipeline"], lines, _OF_ENGINES) + _reading(board, [row for _, row in lines])


def coverage_totals(board: Sequence[Row]) -> str:
    """How many systems of the survey are covered, by branch."""
    answered = coverage.table()
    totals = [*coverage.totals(answered, "branch"), coverage.total("all", answered)]
    names = [field.name for field in dataclasses.fields(coverage.Total)]
    cells = [names, ["---", *("--:" for _ in names[1:])], *([str(getattr(total, name)) for name in names] for total in totals)]
    return _lines(cells)


def crossovers(board: Sequence[Row]) -> str:
    """The fastest method by batch and context, and where one stops being faster than another, of each model and machine."""
    said = []
    for field in fields(board):
        if field.row.speed == _CROSSOVER:
            said.append(f"\n{escape(crossover.title(field))}\n\n{_of_dicts(crossover.best(field.best()))}")
            crossed = crossover.crossings(field.crossings())
            said += [f"\n{_of_dicts(crossed)}"] if crossed else []
    return "".join([*said, f"\n{crossover.READING}\n"]) if said else ""


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "methods": methods,
    "engines": engines,
    "coverage": coverage_totals,
    "crossover": crossovers,
}
GRIDS, STUDENTS = "grids", "students"


def filled(text: str, board: Sequence[Row], studies: Sequence[Study] = (), taught: Sequence[Group] = ()) -> str:
    """The text with every table that it asks for written anew.

    Args:
        studies: Methods on common grids, for the tables of those.
        taught: Students of one teacher, for theirs.
    """

    def write(found: re.Match[str]) -> str:
        other = {GRIDS: lambda: grids.markdown(studies), STUDENTS: lambda: students.markdown(taught)}
        table = other[found[1]]() if found[1] in other else TABLES[found[1]](board)
        return f"<!-- {found[1]}: begin -->\n{table}<!-- {found[1]}: end -->"

    return re.sub(rf"<!-- ({'|'.join([*TABLES, GRIDS, STUDENTS])}): begin -->.*?<!-- \1: end -->", write, text, flags=re.DOTALL)


def _fronts(board: Sequence[Row], names: Sequence[str], speed: str) -> list[Row]:
    """The rows of some pipelines under the suite of the front table."""
    chosen = {row.pipeline: row for row in _lowest_seeds_last(board) if _is_shown(row, "front", speed) and row.engine == "transformers"}
    return [chosen[name] for name in names]


def _lowest_seeds_last(board: Sequence[Row]) -> list[Row]:
    """The rows so that the one that answers to the bare name of its pipeline comes after its further seeds."""
    return sorted(board, key=lambda row: (row.seed, row.calibration_seed or 0), reverse=True)


def _is_shown(row: Row, suite: str, speed: str) -> bool:
    place = (_MODEL, suite, speed, _PLACE)
    return not row.foreign and row.temperature is None and (row.model, row.suite, row.speed, row.fingerprint) == place


def _table(heads: Sequence[str], lines: Sequence[tuple[list[str], Row]], shown: Sequence[str]) -> str:
    columns = [column for column in COLUMNS if column.key in shown]
    cells = [[*heads, *(column.header for column in columns)], [*("---" for _ in heads), *(_side(column) for column in columns)]]
    cells += [[*names, *(_cell(column, row) for column in columns)] for names, row in lines]
    return _lines(cells)


def _cell(column: Column, row: Row) -> str:
    """The value; none where a flag takes the figure away."""
    figure = _FIGURES.get(column.key)
    return EMPTY if figure and spoiling(row.flags, figure) else column.plus_minus(row)


def _side(column: Column) -> str:
    return "---" if column.format is str else "--:"


def _reading(board: Sequence[Row], shown: Sequence[Row]) -> str:
    """Where a table was measured, and what the whole one from which its rows are taken can resolve."""
    whole = [row for row in board if row.table_key == shown[0].table_key and not row.foreign]
    said = " ".join([f"{shown[0].hardware}.", *anchors(shown), f"All {len(whole)} rows of this setting:", *resolution(whole)])
    return f"\n{said}\n"


def _of_dicts(lines: Sequence[Mapping[str, str]]) -> str:
    heads = list(lines[0])
    return _lines([heads, ["---" for _ in heads], *([escape(line[head]) for head in heads] for line in lines)])


def _lines(cells: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def main(results: Path, files: Sequence[Path]) -> None:
    """Write the tables of the files anew."""
    records = Store(results).scan()[0]
    board, found, taught = rows(records), studies(records), students.groups(records)
    for file in files:
        write_atomically(file, filled(file.read_text(encoding="utf-8"), board, found, taught).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

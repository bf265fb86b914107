"""The tables for a paper: LaTeX with booktabs, significance marked. A pure function of the rows.

Needs the packages booktabs and graphicx, and T1 or OT1 fonts; every character that is not plain ASCII is written as a command. A table
that is wider than a line is scaled down to it, and one of more rows than a page holds comes in parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from slimbench.harness.schema.identity import Status
from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import INCOMPLETE
from slimbench.leaderboard.tables.columns import COLUMNS, Column
from slimbench.leaderboard.tables.format import shorten
from slimbench.leaderboard.tables.resolution import resolution
from slimbench.leaderboard.tables.tables import Table, tables

NEEDED = r"% \usepackage{booktabs,graphicx}"
PAGE_LINES = 42
"""Rows and lines of notes of one float, below a caption of up to ten lines."""
_NOTE_LINES = 2
_LONGEST = 60
_LONGEST_NOTE = 160
_LONGEST_LINE = 400
_ASCII = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "'": r"{'}",
    "`": r"{`}",
    "*": "{*}",
    "?": "{?}",
    "!": "{!}",
    "[": "{[}",
    "]": "{]}",
}
_OTHERS = {
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "−": r"\ensuremath{-}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "·": r"\ensuremath{\cdot}",
    "…": r"\ldots{}",
    "→": r"\ensuremath{\rightarrow}",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
    "Δ": r"\ensuremath{\Delta}",
    "°": r"\ensuremath{^\circ}",
    "µ": r"\ensuremath{\mu}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{NON-BREAKING HYPHEN}": "-",
}
_DAGGER, _STAR = r"\rlap{\textsuperscript{\ensuremath{\dagger}}}", r"\rlap{\textsuperscript{*}}"
_BOTH = r"\rlap{\textsuperscript{\ensuremath{\dagger}*}}"
_SKEWED = r"{\scriptsize~["
_TESTED = frozenset({"perplexity", "accuracy"})
_MARKED = r"r@{\hskip 14pt}"
"""A column whose marks hang into the space behind it."""
_Places = tuple[int | None, int | None]
_UNRANKED = frozenset(
    {"grid", "effective_bits", "roofline_fraction", "perplexity_delta_percent", "perplexity_verdict", "accuracy_delta", "accuracy_verdict"}
)
"""Columns without a best: texts, what is spent, and what another column says already."""


def to_latex(board: Sequence[Row]) -> str:
    """A floating table for each group of comparable rows, the reference above the others; the packages in a comment.

    Bold is the best of a column among the rows that ended well, the reference apart. In perplexity and accuracy, a dagger marks rows
    whose range of ranks holds a place of the best one's, and a star rows that are significantly worse than the reference (Holm's
    correction over the rows of the table). A row that ended badly stands there with its reason.
    """
    floats = [made for table in tables(board) for made in _floats(table)]
    return "\n".join([NEEDED, *floats]) if floats else ""


def escape(text: str, longest: int = _LONGEST) -> str:
    r"""Text that LaTeX prints as it is and never runs; a character that no font may have becomes its code point, such as `U+6F22`."""
    plain = "".join(_character(c) for c in shorten(" ".join(text.split()), longest))
    return re.sub("-(?=-)", "-{}", plain)


def _character(c: str) -> str:
    if c in _ASCII or c in _OTHERS:
        return (_ASCII | _OTHERS)[c]
    if c.isascii():
        return c if c.isprintable() else " "
    base = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(_ASCII.get(b, b) for b in base) if base.strip() else f"U+{ord(c):04X}"


def _floats(table: Table) -> Iterator[str]:
    """The floats of a table: one, or several that a page can hold."""
    columns = [c for c in COLUMNS if any(getattr(row, c.key) is not None for row in table.rows)]
    marks = _marks(table, columns)
    parts = _parts(sorted(table.rows, key=lambda row: not row.is_reference))
    for number, rows in enumerate(parts, start=1):
        yield _float(table, rows, columns, marks, f", part {number} of {len(parts)}" if len(parts) > 1 else "")


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows as a page can hold them with their reasons."""
    parts: list[list[Row]] = []
    left, told = 0, set[str]()
    for row in rows:
        reason = "" if row.status in (Status.OK, INCOMPLETE) else row.reason or row.status
        if left < 1 + (_NOTE_LINES if reason and reason not in told else 0):
            parts.append([])
            left, told = PAGE_LINES, set()
        left -= 1 + (_NOTE_LINES if reason and reason not in told else 0)
        told |= {reason}
        parts[-1].append(row)
    return parts


def _float(table: Table, rows: Sequence[Row], columns: Sequence[Column], marks: dict[tuple[int, str], list[str]], part: str) -> str:
    notes: dict[str, int] = {}
    head = " & ".join(["Pipeline", *(escape(c.header) for c in columns)])
    references = [_line(row, table, columns, marks, notes) for row in rows if row.is_reference]
    others = [_line(row, table, columns, marks, notes) for row in rows if not row.is_reference]
    body = [*references, *([r"\midrule"] if references and others else []), *others]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_caption(table, body, part)}}}",
            r"\smallskip",
            r"\sbox0{\footnotesize\setlength{\tabcolsep}{4.5pt}%",
            rf"\begin{{tabular}}{{l{''.join(_MARKED if c.key in _TESTED else 'r' for c in columns)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            *([rf"\par\smallskip\raggedright\footnotesize {' '.join(_note(text, n) for text, n in notes.items())}"] if notes else []),
            r"\end{table}",
            "",
        ]
    )


def _caption(table: Table, body: Sequence[str], part: str) -> str:
    """What the table is of, the meaning of the marks and columns that stand in it, and what it can resolve."""
    failed = sum(row.status not in (Status.OK, INCOMPLETE) for row in table.rows)
    lines = "\n".join(body)
    meanings = {
        r"\pm": r"after \ensuremath{\pm} half of the 95\,\% interval",
        _SKEWED: "in square brackets the whole of a skewed one",
        r"\textbf": "bold: best of the compressed rows",
        r"\dagger": r"\textsuperscript{\ensuremath{\dagger}}: may hold a place of the best",
        "*}}": rf"\textsuperscript{{*}}: significantly worse than the reference ({100 * LEVEL:.0f}\,\%, Holm)",
    }
    units = {
        "perplexity_verdict": "verdicts: against the reference, in brackets the windows or items that would resolve the row",
        "perplexity_delta_percent": rf"{escape('Δ')}: perplexity above the reference",
        "accuracy_delta": rf"{escape('Δ points')}: accuracy above the reference",
        "kl_mean": "KL: in nats per token",
        "speedup": "speed-up: over the reference on the same engine",
    }
    shown = [text for key, text in units.items() if any(getattr(row, key) is not None for row in table.rows)]
    told = "; ".join([*(meaning for mark, meaning in meanings.items() if mark in lines), *shown])
    ended = f"{failed} of {len(table.rows)} rows ended badly, with the reason below." if failed else ""
    title = f"{escape(table.title)}{part}. {escape(table.setting, 200)}."
    resolved = [escape(line, _LONGEST_LINE) for line in resolution(table.rows)]
    return " ".join(filter(None, [title, f"{told[0].upper()}{told[1:]}." if told else "", *resolved, ended]))


def _line(row: Row, table: Table, columns: Sequence[Column], marks: dict[tuple[int, str], list[str]], notes: dict[str, int]) -> str:
    """One row; the reason of one that ended badly becomes a numbered note, and stands in place of numbers where it has none."""
    name = escape(f"{row.label} · {row.engine}" if table.engines_differ else row.label)
    ended = ""
    if row.status not in (Status.OK, INCOMPLETE):
        number = notes.setdefault(row.reason or row.status, len(notes) + 1)
        ended = rf"\emph{{{escape(row.status)}}}~({number})"
    if all(each is None for each in (row.perplexity, row.accuracy, row.divergent_share, row.decode_tokens_per_s)):
        return rf"{name} & \multicolumn{{{len(columns)}}}{{l}}{{{ended or escape(row.status)}}} \\"
    values = [_cell(c.plus_minus(row), marks.get((id(row), c.key), [])) for c in columns]
    return " & ".join([f"{name} {ended}".rstrip(), *values]) + r" \\"


def _note(text: str, number: int) -> str:
    return f"({number})~{escape(text, _LONGEST_NOTE)}."


def _cell(text: str, marks: Sequence[str]) -> str:
    value, plus, spread = text.partition(" ± ")
    value, skewed, ends = value.partition(" [")
    shown = escape(value)
    shown = rf"\textbf{{{shown}}}" if "best" in marks else shown
    shown += rf"{{\scriptsize~{escape('±')}~{escape(spread)}}}" if plus else ""
    shown += rf"{_SKEWED}{escape(ends)}}}" if skewed else ""
    if "level" in marks and "worse" in marks:
        return shown + _BOTH
    return shown + (_DAGGER if "level" in marks else _STAR if "worse" in marks else "")


def _marks(table: Table, columns: Sequence[Column]) -> dict[tuple[int, str], list[str]]:
    """`best`, `level` and `worse` by row and column."""
    found: dict[tuple[int, str], list[str]] = {}
    rivals = [row for row in table.rows if not row.is_reference and row.status in (Status.OK, INCOMPLETE)]
    for column in columns:
        known = [row for row in rivals if getattr(row, column.key) is not None]
        if column.key in _UNRANKED or len(known) < 2:
            continue
        best = (max if column.rising else min)(getattr(row, column.key) for row in known)
        for row in known:
            if getattr(row, column.key) == best:
                found.setdefault((id(row), column.key), []).append("best")
    tests: tuple[tuple[str, Callable[[Row], _Places], Callable[[Row], float | None], Callable[[Row], bool]], ...] = (
        (
            "perplexity",
            lambda row: (row.rank, row.rank_last),
            lambda row: row.perplexity_p,
            lambda row: (row.perplexity_delta_percent or 0) > 0,
        ),
        (
            "accuracy",
            lambda row: (row.accuracy_rank, row.accuracy_rank_last),
            lambda row: row.accuracy_p,
            lambda row: (row.accuracy_delta or 0) < 0,
        ),
    )
    for key, places, p_value, worse in tests:
        leaders = [row for row in rivals if "best" in found.get((id(row), key), [])]
        for row in _sharing(rivals, leaders, places):
            found.setdefault((id(row), key), []).append("level")
        tested = [(row, p) for row in table.rows if not row.is_reference and (p := p_value(row)) is not None]
        for (row, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
            if p < LEVEL and worse(row):
                found.setdefault((id(row), key), []).append("worse")
    return found


def _sharing(rivals: Sequence[Row], leaders: Sequence[Row], places: Callable[[Row], _Places]) -> Iterator[Row]:
    """The rows, the leaders apart, that may hold a place of the best one."""
    last = max((end for row in leaders if (end := places(row)[1]) is not None), default=0)
    for row in rivals:
        first = places(row)[0]
        if first is not None and first <= last and not any(row is leader for leader in leaders):
            yield row

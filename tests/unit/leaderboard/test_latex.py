"""LaTeX tables: the numbers and marks are those of the rows, and no text of a record is run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.columns import COLUMNS
from slimbench.leaderboard.tables.latex import escape, to_latex
from tests.support.board_records import Spec, board, failure, records

DAGGER, STAR = r"\textsuperscript{\ensuremath{\dagger}", r"\textsuperscript{*}"
HOSTILE = [
    r"\input{/etc/passwd}",
    r"\immediate\write18{id}",
    "$x_1^2$ & 50 % #1 ~ {a} }{",
    "a -- b --- c ?` !` `` ''",
    "*[2cm] starts like an option",
    '"quoted" <b> |x|',
    "漢字 🙂 é ß Δ ± × → …",
    "line\nbreak\x00\x1b[31m",
    "^^5cinput",
    "x" * 10_000,
]
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
%s
\end{document}
"""


@cache
def realistic() -> list[Row]:
    return rows(board())


def lines(text: str) -> list[list[str]]:
    """The cells of each row of the table, header included."""
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in text.splitlines() if line.endswith(r" \\")]


def body(text: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for cells in lines(text)[1:]}


def test_every_row_stands_in_the_table_with_its_numbers() -> None:
    text = to_latex(realistic())
    header, found = lines(text)[0], body(text)
    columns = [c for c in COLUMNS if any(getattr(row, c.key) is not None for row in realistic())]
    assert header[1:] == [escape(c.header) for c in columns]
    for row in realistic():
        name = next(name for name in found if name == escape(row.label) or name.startswith(escape(row.label) + r" \emph"))
        if row.perplexity is None and row.accuracy is None and row.decode_tokens_per_s is None:
            assert found[name][0].startswith(rf"\multicolumn{{{len(columns)}}}{{l}}") and row.status in found[name][0]
            continue
        for column, cell in zip(columns, found[name], strict=True):
            assert escape(column.value(row)) in cell, (row.label, column.key)
            assert (r"\pm" in cell) is ("±" in column.plus_minus(row))


def test_the_table_has_the_rules_of_booktabs_and_the_reference_apart() -> None:
    text = to_latex(realistic())
    rules = re.findall(r"\\(toprule|midrule|bottomrule)", text)
    assert rules == ["toprule", "midrule", "midrule", "bottomrule"] and r"\hline" not in text
    assert re.search(r"\\midrule\ndense & .*\n\\midrule\n", text)
    assert len({len(cells) for cells in lines(text) if "multicolumn" not in cells[1]}) == 1


def test_reasons_of_bad_ends_stand_below_once() -> None:
    many = [*board(), *[r for name in ("a", "b") for r in records(same_end(name))]]
    text = to_latex(rows(many))
    assert text.count("the same reason") == 1 and text.count(r"\emph{failed}~") == 3
    for row in realistic():
        if row.reason and row.status != "incomplete":
            assert escape(row.reason, 160) in text
    assert "8 of 19 rows ended badly" not in text and f"{sum(r.status != 'ok' for r in rows(many))} of 19 rows ended badly" in text


def same_end(name: str) -> Spec:
    return Spec(name, "quantization", ends={Stage.COMPRESS: (Status.FAILED, failure("the same reason"))})


@pytest.mark.parametrize(
    ("key", "rank", "delta", "p"),
    [
        ("perplexity", "rank", "perplexity_delta_percent", "perplexity_p"),
        ("accuracy", "accuracy_rank", "accuracy_delta", "accuracy_p"),
    ],
)
def test_marks_are_those_of_the_tests(key: str, rank: str, delta: str, p: str) -> None:
    found = body(to_latex(realistic()))
    columns = [c.key for c in COLUMNS if any(getattr(row, c.key) is not None for row in realistic())]
    rivals = [row for row in realistic() if not row.is_reference and row.status in ("ok", "incomplete")]
    value = (lambda row: -getattr(row, key)) if key == "accuracy" else (lambda row: getattr(row, key))
    best = min((row for row in rivals if getattr(row, key) is not None), key=value)
    tested = [row for row in realistic() if not row.is_reference and getattr(row, p) is not None]
    adjusted = dict(zip((row.label for row in tested), holm([getattr(row, p) for row in tested]), strict=True))
    worse = level = 0
    for row in rivals:
        cell = found[escape(row.label)][columns.index(key)]
        assert (r"\textbf" in cell) is (value(row) == value(best)), row.label
        shares = getattr(row, rank) <= getattr(best, f"{rank}_last") and value(row) != value(best)
        loses = bool(adjusted[row.label] < LEVEL) and (getattr(row, delta) > 0) is (key == "perplexity")
        assert (r"\dagger" in cell) is shares, row.label
        assert ("*" in cell) is loses, row.label
        worse, level = worse + loses, level + shares
    assert worse and (level or key == "perplexity")
    assert not re.search(r"\\textbf|dagger|\*", found["dense"][columns.index(key)])


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_printed_and_never_run(text: str) -> None:
    plain = escape(text)
    harmless = r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textendash|textemdash|ldots|char34)\{\}"
    rest = re.sub(rf"{harmless}|\\[{{}}$&#%_]|\\ensuremath{{(\^\\circ|-|\\[a-zA-Z]+)}}|{{['`?!*\[\]]}}|-{{}}", "", plain)
    assert not re.search(r"[\\{}$&#%_~^<>|\"`\[\]]", rest), rest
    assert plain.isascii() and plain.isprintable() and len(plain) < 1500


def test_a_table_of_hostile_text_has_as_many_cells_and_braces_as_another() -> None:
    for text in HOSTILE:
        spec = Spec(text, text, model=text, engine=text, suite=text, corpora=(text,))
        bad = replace(spec, pipeline=f"bad {text}", ends={Stage.COMPRESS: (Status.FAILED, failure(text, text))})
        made = to_latex(rows([r for one in (spec, replace(spec, pipeline="plain", loss=1.2), bad) for r in records(one)]))
        stripped = re.sub(r"\\[{}]", "", made)
        assert stripped.count("{") == stripped.count("}") and made.isascii()
        assert len({len(cells) for cells in lines(made) if "multicolumn" not in "".join(cells)}) == 1
        assert made.count(r"\begin{") == made.count(r"\end{") and r"\input" not in made and r"\write" not in made


def test_no_rows_give_no_table_and_a_single_row_no_best() -> None:
    assert to_latex([]) == ""
    alone = to_latex(rows(records(Spec()) + records(Spec("rtn", "quantization", loss=1.3))))
    assert r"\textbf" not in alone and r"\dagger*" not in alone


def test_the_caption_explains_the_marks_of_its_table_and_no_others() -> None:
    full, bare = to_latex(realistic()), to_latex(rows(records(Spec())[:1]))
    assert all(
        words in full for words in ("half of the 95", "bold: best", r"\dagger}}: may hold a place of the best", "{*}: significantly worse")
    )
    assert not re.search(r"half of|bold|significantly", bare, re.IGNORECASE)
    assert full.startswith("% \\usepackage{booktabs,graphicx}\n")
    columns = (r"\ensuremath{\Delta}: perplexity above the reference", "KL: in nats", "speed-up: over the reference")
    assert all(words in full and words not in bare for words in columns)


def many() -> list[Row]:
    """More rows than a page holds, a third of them with a reason of their own."""
    good = [r for i in range(50) for r in records(Spec(f"rtn-{i}", "quantization", loss=1.1 + 0.01 * i, bits=4.0))]
    bad = [failed for i in range(25) for failed in records(replace(same_end(f"bad-{i}"), ends={Stage.COMPRESS: (Status.OOM, REASONS[i])}))]
    return rows([*board(), *good, *bad])


REASONS = [failure(f"reason {i}: " + "the artefact needs more memory than there is, " * 4) for i in range(25)]


def test_a_long_table_comes_in_parts_with_every_row_once() -> None:
    made = many()
    text = to_latex(made)
    parts = int(re.findall(r"part 1 of (\d+)", text)[0])
    assert parts > 1 and [f"part {n} of {parts}." in text for n in range(1, parts + 2)] == [*[True] * parts, False]
    names = [name.partition(r" \emph")[0] for name, *_ in lines(text) if name != "Pipeline"]
    assert sorted(names) == sorted(escape(row.label) for row in made)
    assert text.count("the artefact needs more memory") >= 25 and names[0] == "dense"


def compiled(text: str, folder: Path) -> str:
    """What pdflatex says of a document with these tables."""
    (folder / "t.tex").write_text(DOCUMENT % text)
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")


@needs_latex
def test_the_tables_compile(tmp_path: Path) -> None:
    hostile = [r for i, text in enumerate(HOSTILE) for r in records(Spec(text, "quantization", loss=1.1 + 0.1 * i))]
    compiled(to_latex(rows([*board(), *hostile])), tmp_path)


@needs_latex
@pytest.mark.parametrize("made", [realistic, many, lambda: rows(records(Spec()))], ids=["realistic", "many", "single"])
def test_no_table_is_wider_or_higher_than_a_page(made: Callable[[], list[Row]], tmp_path: Path) -> None:
    said = compiled(to_latex(made()), tmp_path)
    assert "Output written" in said and not re.search(r"Overfull|too large|Warning", said), said

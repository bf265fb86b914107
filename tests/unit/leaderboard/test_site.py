"""The site: its pages are there, lead to each other and nowhere else, say what the rows say, and show hostile text harmlessly."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, Unreadable, read
from slimbench.leaderboard.figures import catalogue, plots
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.plots import MOST_FIGURES, MOST_PLOTTED, Gallery, gallery
from slimbench.leaderboard.flags.kinds import folded, labelled
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import build as builder
from slimbench.leaderboard.site import method, names, ranking
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.cell import EVIDENCE_TITLE
from slimbench.leaderboard.site.lines import line
from slimbench.leaderboard.site.pages import quoted
from slimbench.leaderboard.site.serve import server, url
from slimbench.leaderboard.site.site import last
from slimbench.leaderboard.tables.columns import COLUMNS, VerdictColumn
from tests.support.board_records import Spec, board, failure, records, site_files, specs
from tests.support.paths import RECORDS, ROOT

GPTQ = Spec("gptq", "quantization", loss=1.3, decode_ms=23.0, bits=4.25, size=0.426)
CPU = "Example CPU 9000 · 2 threads · 8 GB"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "');alert(1);//\\",
    "</script><svg onload=alert(1)>",
    "../../../etc/passwd",
    "{{ 7 * 7 }}{% raw %}",
    "a|b\n\x1b[31mred\x00\u202e\u2028",
    "x" * 10_000,
    "漢字 🙂",
    "javascript:alert(1)",
]
PAGES = {"index.html", "models.html", "methods.html", "figures.html", "apart.html", "coverage.html", "guide.html", "data/rows.js"}


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def links(self) -> list[str]:
        return [value or "" for _, attributes in self.found for key, value in attributes.items() if key in ("href", "src")]

    @property
    def ids(self) -> list[str]:
        return [value or "" for _, attributes in self.found for key, value in attributes.items() if key == "id"]


def site(made: Sequence[Record], unreadable: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """The text of each file, without the plots and without DataTables."""
    found = site_files(Board.of(made, [Unreadable(*fault) for fault in unreadable]), {"table.csv": b""}, Gallery())
    return {name: content.decode() for name, content in found.items() if name != "assets/datatables.js"} | {"table.csv": ""}


def data(made: dict[str, str]) -> dict[str, Any]:
    """What the script of the rows brings."""
    (quoted,) = re.fullmatch(r"window\.BOARD=JSON\.parse\('(.*)'\);\n", made["data/rows.js"]).groups()  # type: ignore[union-attr]
    assert not re.search(r"[^\x20-\x7e]", quoted)
    content: dict[str, Any] = json.loads(re.sub(r"\\(['\\])", r"\1", quoted), parse_constant=lambda name: pytest.fail(name))
    return content


def row_of(made: Sequence[Record], pipeline: str) -> Row:
    return next(row for row in rows(made) if row.pipeline == pipeline)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    several = [r for model in ("tiny-135m", "tiny-1b") for spec in specs() for r in records(replace(spec, model=model))]
    return site(several, [("a/b/quality-1.json", "not a record: broken")])


def pages(made: dict[str, str]) -> dict[str, Elements]:
    return {name: Elements(text) for name, text in made.items() if name.endswith(".html")}


def test_there_is_a_page_of_each_kind(made: dict[str, str]) -> None:
    board_rows = rows([r for model in ("tiny-135m", "tiny-1b") for spec in specs() for r in records(replace(spec, model=model))])
    assert set(made) >= PAGES
    assert {names.cell(row) for row in board_rows} <= set(made) and len(board_rows) == 2 * len(specs())
    assert {names.model(row.model) for row in board_rows} <= set(made)
    assert {names.method(about.name) for about in method.registry()[0]} | {names.method("rtn")} <= set(made)
    assert len(method.registry()[0]) >= 15 and not method.registry()[1]


def test_every_link_leads_to_a_file_of_the_board_and_to_a_place_in_it(made: dict[str, str]) -> None:
    parsed = pages(made)
    for name, page in parsed.items():
        assert len(page.ids) == len(set(page.ids)), name
        for link in page.links:
            path, _, fragment = link.partition("#")
            if path.startswith("data:"):
                assert path == "data:,"
                continue
            assert not re.match(r"[a-z+]+:|/", path), f"{name} leads outside: {link}"
            parts: list[str] = list(PurePosixPath(name).parent.parts) if path else list(PurePosixPath(name).parts)
            for part in PurePosixPath(path).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            target = "/".join(parts)
            assert target in made or target == "assets/datatables.js", f"{name}: {link}"
            if fragment and not fragment.startswith("set="):
                assert fragment in parsed[target].ids, f"{name}: {link}"


def test_nothing_is_loaded_from_elsewhere(made: dict[str, str]) -> None:
    for name, page in pages(made).items():
        policy = next(a["content"] or "" for tag, a in page.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'") and "script-src 'self' file:;" in policy, name
        assert not [a for tag, a in page.found if tag == "script" and "src" not in a], f"{name} has a script of its own"
    ours = [text for name, text in made.items() if name.startswith("assets/")]
    assert ours and not any(re.search(r"@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)|innerHTML|eval\(", text) for text in ours)


def test_the_numbers_of_the_ranking_are_those_of_the_rows() -> None:
    records_ = board()
    content, board_rows = data(site(records_)), rows(records_)
    by_id = {row[0]: row for row in content["rows"]}
    assert len(by_id) == len(board_rows)
    for row in board_rows:
        raw = by_id[names.cell_id(row)]
        assert content["texts"][raw[3]] == row.label and content["texts"][raw[9]] == row.status
        assert (raw[12], raw[18]) == (row.rank, row.rank_last)
        assert [content["texts"][flag] for flag in raw[11]] == [labelled(flag) for flag in folded(row.flags)]
        assert raw[10] is None if row.reason is None else content["texts"][raw[10]] == row.reason
        assert raw[17] is None if row.grid is None else content["texts"][raw[17]] == row.grid
        for column, cell in zip(ranking.CELLS, raw[20:], strict=True):
            value = cell[0] if isinstance(cell, list) else cell
            assert (value is None) is (getattr(row, column.key) is None)
            if isinstance(column, VerdictColumn):
                assert value is None or value == column.value(row)
                assert (cell[1] if isinstance(cell, list) else "") == column.interval(row)
                continue
            assert value is None or value == ranking.shown(column.value(row)), (row.label, column.key)
            if isinstance(cell, list):
                assert column.bounds and cell[1:] == [ranking.shown(column.format(getattr(row, bound))) for bound in column.bounds]


def test_pages_of_cell_model_and_method_say_what_the_row_says() -> None:
    records_ = records(Spec()) + records(GPTQ)
    pages_ = pages(site(records_))
    row = row_of(records_, "gptq")
    for name in (names.cell(row), names.model(row.model), names.method("gptq")):
        for column in COLUMNS if name.startswith("cell/") else line(Board.of(records_), row).columns:
            assert column.value(row) in pages_[name].text and column.interval(row) in pages_[name].text, (name, column.key)
    cell = pages_[names.cell(row)].text
    assert row.command in cell and row.keys.quality in cell and "0123456789abcdef" in cell and EVIDENCE_TITLE in cell
    assert f"slimbench artefact export {row.command.removeprefix('slimbench run ')} --to FOLDER" in cell
    assert "artefact export" not in pages_[names.cell(row_of(records_, "dense"))].text
    for task in row.task_accuracy:
        assert task in cell
    heads = [text for text in pages_[names.model(row.model)].text.split("\n") if text.strip()]
    assert not {"Perplexity", "Accuracy %"} & {text.strip() for text in heads}, "absolute quality is a detail beside a reference"
    facts = pages_[names.method("gptq")].text
    assert "arXiv:2210.17323" in facts and "group_size" in facts and "llmcompressor" in facts


def test_the_words_of_counts_files_and_fronts_claim_no_more_than_is_so() -> None:
    quality = records(replace(GPTQ, pipeline="quality-only"))[:2]
    for record in quality:
        record.config = record.config | {"stages": ["quality"]}
    made = board() + quality
    beside = {"table.md": b"", "table.csv": b"", "table.json": b"", "pareto.svg": b"", "figures/own.svg": b""}
    parsed = {
        name: Elements(text.decode()) for name, text in site_files(Board.of(made), beside, Gallery()).items() if name.endswith(".html")
    }
    ended = sum(row.status == Status.OK for row in rows(made))
    for name in ("index.html", names.model("tiny-135m")):
        assert f"{ended} ended well" in parsed[name].text, name
    words = "All numbers, unrounded: table.csv, table.json. Rounded, for people: table.md. Plots for print: pareto.svg."
    assert words in parsed["index.html"].text
    assert "Perplexity rise at most" in parsed["index.html"].text
    assert all("front: size" in parsed[name].text for name in ("guide.html", names.model("tiny-135m")))
    assert not any("measured in full" in page.text or "best size" in page.text for page in parsed.values())


def test_fronts_ranks_and_labels_are_marked() -> None:
    records_ = board()
    content = data(site(records_))
    marks = {content["texts"][row[3]]: row[13] for row in content["rows"]}
    table = Board(rows(records_))
    for row in table.rows:
        fronts = table.fronts.get(row.place, [])
        assert (bool(marks[row.label] & 4), bool(marks[row.label] & 8)) == ("size" in fronts, "speed" in fronts)
    assert marks["dense"] & 1 and marks["fake-int6"] & 2 and not marks["gptq"] & 3
    assert "simulated" in pages(site(records_))[names.cell(row_of(records_, "fake-int6"))].text
    coarse = records(replace(GPTQ, source_precision="q4_1"))
    parsed = pages(site(coarse))
    assert "source q4_1" in parsed[names.cell(row_of(coarse, "gptq"))].text
    assert all("made from q4_1 weights" in parsed[name].text for name in (names.model("tiny-135m"), names.method("gptq")))


def test_sets_of_one_model_and_suite_are_told_apart_by_machine_and_speed_wherever_they_are_named() -> None:
    there = [replace(GPTQ, pipeline=name, cpu="Another CPU 9000") for name in ("rtn", "awq")]
    made = [r for spec in (Spec(), GPTQ, *there, replace(GPTQ, speed="long"), replace(GPTQ, model="other")) for r in records(spec)]
    site_ = site(made)
    here, long, moved = (f"tiny-135m · wiki · {text}" for text in (f"{CPU} · speed short", f"{CPU} · speed long", f"Another{CPU[7:]}"))
    assert {found["name"] for found in data(site_)["sets"]} == {here, long, moved, "other · wiki"}
    for name, page in pages(site_).items():
        regions = [a["aria-label"] for _, a in page.found if a.get("role") == "region"]
        assert len(regions) == len(set(regions)), name
    model = pages(site_)[names.model("tiny-135m")].text
    assert all(name in model for name in (here, long, moved))
    assert moved in pages(site_)[names.cell(row_of(made, "rtn"))].text


def test_formulas_of_a_method_keep_their_lines_and_code_its_type_and_values_are_those_of_the_command_line() -> None:
    made = site(records(Spec()))
    assert "w ≈ Σ_k α_k b_k + z        b_k ∈ {-1, 1}^g" in made[names.method("bcq-4bit")]
    slicegpt = made[names.method("slicegpt")]
    assert re.search(r"<pre[^>]*>reading [^<]*W -&gt; W Q₀ D\nwriting", slicegpt)
    for name, text in made.items():
        if name.startswith("method/"):
            assert "`" not in text and not re.search(r"<td class=\"words\">(None|True|False)<", text), name
    gptq = made[names.method("gptq")]
    assert "<code>n:m</code> puts" in made[names.method("sparsegpt")] and '<td class="words">null<' in gptq


def test_code_in_a_text_is_marked_after_everything_in_it_was_escaped() -> None:
    assert quoted('a `<b>&` ` "c') == "a <code>&lt;b&gt;&amp;</code> ` &#34;c"


def test_what_all_stages_have_in_common_is_told_once() -> None:
    made = records(GPTQ)
    made[2].provenance = made[2].provenance | {"python": "3.12.1"}
    text = pages(site(made))[names.cell(row_of(made, "gptq"))].text
    provenance = text[text.index("All stages") :]
    assert [provenance.count(word) for word in ("Processor", "transformers 5.17.0", '"seqlen": 512')] == [1, 1, 1]
    assert provenance.count("Python") == 3 and "3.12.1" in provenance
    assert all(f"Stage {record.stage}: ok" in provenance and record.key in provenance for record in made)


def test_failures_and_files_that_could_not_be_read_are_shown(made: dict[str, str]) -> None:
    parsed = pages(made)
    for row in rows(board()):
        page = parsed[names.cell(row)].text
        assert row.reason is None or (row.reason in page and row.status in page)
        assert all(flag in page for flag in row.flags)
        assert all(flag in parsed[names.model(row.model)].text for flag in folded(row.flags))
    assert "a/b/quality-1.json" in parsed["index.html"].text and "not a record: broken" in parsed["index.html"].text
    assert "Traceback" in parsed[names.cell(row_of(board(), "quip"))].text
    assert "could not be read" not in Elements(site(records(Spec()))["index.html"]).text


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    """Every file of a board with figures."""
    return dict(builder.contents(records(Spec()) + records(GPTQ)))


def test_the_page_of_figures_shows_and_describes_what_was_drawn(drawn: dict[str, bytes]) -> None:
    found = gallery(Board.of(records(Spec()) + records(GPTQ)), figures=True)
    page = Elements(drawn["figures.html"].decode())
    images = {a["src"]: a for tag, a in page.found if tag == "img"}
    assert images.keys() == {f"{path}.svg" for path in found.plots} and len(images) > 8
    for path, plot in found.plots.items():
        image = images[f"{path}.svg"]
        words = image["alt"] or ""
        assert words.startswith(f"{plot.title}, {plot.group.title}") and plot.reading in words and plot.reading in page.text
        assert {f"{path}.{kind}" for kind in ("png", "svg", "pdf")} <= set(page.links) & set(drawn)
        box = [float(length) for length in ElementTree.fromstring(drawn[f"{path}.svg"]).attrib["viewBox"].split()]
        assert box == pytest.approx([0, 0, int(image["width"] or 0), int(image["height"] or 0)], abs=0.51)
    readings = {plot.kind: plot.reading for plot in found.plots.values()}
    assert readings["perplexity-bytes"] == "Of 2 rows, none beats dense, gptq in both."
    assert readings["memory"].startswith("gptq takes least, ") and "the dense model takes" in readings["memory"]
    assert all(kind.name in page.text for kind in catalogue.KINDS)
    assert {gone.kind for gone in found.absent} == {kind.name for kind in catalogue.KINDS} - readings.keys()
    assert all(gone.reason in page.text for gone in found.absent)
    assert not found.without and "slimbench board figures" not in page.text


def test_figures_come_out_the_same_from_records_in_any_order(drawn: dict[str, bytes]) -> None:
    board_ = Board.of((records(Spec()) + records(GPTQ))[::-1])
    found = gallery(board_, figures=True)
    beside = {f"{path}.svg": plot.draw("svg") for path, plot in found.plots.items()}
    assert beside == {name: content for name, content in drawn.items() if name.endswith(".svg")}
    assert dict(last(board_, beside, found))["figures.html"] == drawn["figures.html"]


def test_a_board_of_many_tables_draws_the_figures_of_most_evidence_and_says_how_to_draw_all() -> None:
    several = [r for number in range(17) for spec in (Spec(), GPTQ) for r in records(replace(spec, model=f"tiny-{number}"))]
    several += [r for name in "abc" for r in records(replace(GPTQ, pipeline=name, model="tiny-9"))]
    board_ = Board.of(several)
    many, none = gallery(board_, figures=True), gallery(board_, figures=False)
    drawn = [plot for path, plot in many.plots.items() if path.startswith("figures/")]
    assert len(drawn) == MOST_FIGURES and set(none.plots) == set(many.plots) - {f"figures/{plot.name}" for plot in drawn}
    assert len(none.plots) == MOST_PLOTTED + 1 and none.plots["pareto"].group.title.startswith("tiny-9")
    allowed = [plot for plot in catalogue.figures(board_.rows) if isinstance(plot, Plot)]
    assert f"allow {len(allowed)} figures" in many.without and len(allowed) > 2 * MOST_FIGURES
    kept, all_ = Counter(plot.kind for plot in drawn), Counter(plot.kind for plot in allowed)
    shares = [kept[kind] for kind in all_ if kept[kind] < all_[kind]]
    assert kept.keys() == all_.keys() and max(shares) - min(shares) <= 1
    of_richest = [[plot.kind for plot in plots if "tiny-9" in plot.group.title] for plots in (drawn, allowed)]
    assert of_richest[0] == of_richest[1] and len(of_richest[0]) > 8
    for found in (many, none):
        beside = {f"{path}.svg": plot.draw("svg") for path, plot in found.plots.items()}
        page = Elements(dict(last(board_, beside, found))["figures.html"].decode())
        assert found.without in page.text and "slimbench board figures" in page.text
        assert len([tag for tag, _ in page.found if tag == "img"]) == len(found.plots)


def test_where_few_figures_are_drawn_those_over_batch_and_context_are_of_the_rows_with_most_points(
    committed_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crossovers are timed at twenty points, and on fewer windows than the front table."""
    made = [plot for plot in catalogue.figures(committed_rows, ["speedup", "prompt-speedup"]) if isinstance(plot, Plot)]
    monkeypatch.setattr(plots, "MOST_FIGURES", 2)
    kept = plots._first(made)
    assert len(made) > 2 and [plot.kind for plot in kept] == ["speedup", "prompt-speedup"]
    assert all(row.speed == "crossover" for plot in kept for row in plot.group.rows)


@pytest.fixture(scope="module")
def harmless() -> set[str]:
    """The elements of pages that show everything a page can show."""
    made = [record for spec in (*specs(), Spec(model="other")) for record in records(replace(spec, source_precision="q4"))]
    return {tag for page in pages(site(made, [("a", "b")])).values() for tag, _ in page.found}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_never_run(text: str, harmless: set[str]) -> None:
    spec = Spec(text, text, model=text, engine=text, suite=text, speed=text, corpora=(text,), flags=(text,), source_precision=text)
    other = Spec("plain", "pruning", model=text, engine=text, suite=text, speed=text, corpora=(text,), loss=1.2, size=0.5)
    bad = replace(other, pipeline="bad", ends={Stage.COMPRESS: (Status.FAILED, failure(text, text))})
    records_ = [record for one in (spec, other, bad) for record in records(one)]
    for record in records_:
        record.provenance = {"slimbench": text, "packages": {text: text}, "hardware": text, "git": text}
        record.config = record.config | {text: text}
    made = site(records_, [(text, text)])
    for name, content in made.items():
        assert re.fullmatch(r"([a-z]+/)?[a-z0-9.-]+", name), name
        assert len(content) < 400_000, name
        if name.endswith(".html"):
            page = Elements(content)
            assert {tag for tag, _ in page.found} <= harmless, name
            assert not any(key.startswith("on") for _, attributes in page.found for key in attributes)
            assert not any(link.lower().startswith("javascript") for link in page.links)
            assert not re.search(r"[\x00-\x08\x1b\u202e\u2028]", content), name
    seen = data(made)
    assert all(len(known) <= 240 for known in seen["texts"])


def test_a_record_with_little_in_it_and_one_of_an_older_schema_have_their_page() -> None:
    old = read(RECORDS / "speed-schema-1.json")
    assert isinstance(old, Record)
    bare = records(GPTQ)
    for record in bare:
        record.config, record.provenance, record.command, record.cell.steps, record.cell.parameters = {}, {}, "", [{}], None
    bare[1].quality.perplexity[0].window_nll[0] = math.nan  # type: ignore[union-attr]
    bare[1].quality.evidence.layers[0].bits_per_weight = math.inf  # type: ignore[union-attr]
    made = site([old, *bare])
    for row in rows([old, *bare]):
        page = Elements(made[names.cell(row)]).text
        assert row.label in page and not re.search(r"\b(nan|inf|None)\b", page)
    assert len(data(made)["rows"]) == 2


def test_pages_and_plots_that_are_gone_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "board"
    builder.write(records(Spec()) + records(GPTQ), [Unreadable("a", "b")], out, figures=False)
    gone = [out / names.cell(row_of(records(GPTQ), "gptq")), *(out / f"pareto.{kind}" for kind in ("svg", "png", "pdf"))]
    assert all(path.exists() for path in gone)
    older = [out / name for name in ("figures/memory-older.svg", "pareto-tiny-135m-wiki-short-cpu-2.pdf", "sizes.png")]
    others = ("notes.txt", "figures/mine.svg", "pareto-mine.svg", "pareto.txt", "sizes-of-mine.png", "cell/notes.txt", "data/pareto.svg")
    kept = [out / name for name in others]
    (out / "figures").mkdir()
    for path in (*older, *kept):
        path.write_text("")
    builder.write(records(Spec()), [], out, figures=False)
    assert not any(path.exists() for path in (*gone, *older)) and all(path.exists() for path in kept)
    assert (out / names.cell(row_of(records(Spec()), "dense"))).exists()


def test_broken_files_are_listed_by_the_board_of_a_folder(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for record in records(Spec()):
        Store(results).put(record)
    broken = {
        "m/p/quality-1.json": "{",
        "m/p/speed-2.json": "[]",
        "m/p/speed-3.json": '{"schema_version": 99}',
        "m/p/speed-4.json": '{"stage": 1}',
    }
    for name, content in broken.items():
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(content)
    (results / "m/p/speed-5.json").write_bytes(b"\xff\xfe\x00")
    builder.build(results, tmp_path / "board", figures=False)
    text = Elements((tmp_path / "board" / "index.html").read_text()).text
    assert all(name in text for name in (*broken, "m/p/speed-5.json")) and "5 files could not be read" in text


def test_the_site_imports_no_model_library() -> None:
    heavy = {"torch", "transformers", "datasets", "lm_eval", "llmcompressor", "bitsandbytes", "pandas", "matplotlib.pyplot"}
    code = f"""
import sys
from slimbench.leaderboard.site.build import contents
from tests.support.board_records import Spec, records
dict(contents(records(Spec())))
print(sorted({heavy} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_board_is_served_on_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("board")
    with server(tmp_path, 0) as serving:
        Thread(target=serving.serve_forever, daemon=True).start()
        assert url(serving).startswith("http://127.0.0.1:") and urlopen(url(serving)).read() == b"board"
        with pytest.raises(builder.BoardError, match="cannot listen"):
            server(tmp_path, serving.server_address[1])
        serving.shutdown()
    with pytest.raises(ConfigError, match="there is no board"):
        server(tmp_path / "absent", 0)

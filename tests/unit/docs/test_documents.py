"""README and docs say what is true: tables from the records, links that lead somewhere, commands that exist."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer

from slimbench.harness.cli.exit_codes import ExitCode
from slimbench.harness.cli.main import app
from slimbench.harness.config import compose
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.grids import Study, studies
from slimbench.leaderboard.compare.students import Group, groups
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.readme import TABLES, filled
from tests.support.documents import FILES, MARKS, Block, blocks
from tests.support.paths import ROOT

SHELL = {"source", "export", "pip", "pytest", "chromium", "cd"}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return Store(ROOT / "results").scan()[0]


@pytest.fixture(scope="module")
def board(records: list[Record]) -> list[Row]:
    return rows(records)


@pytest.fixture(scope="module")
def grids(records: list[Record]) -> list[Study]:
    return studies(records)


@pytest.fixture(scope="module")
def taught(records: list[Record]) -> list[Group]:
    return groups(records)


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices of a reader who has followed CONTRIBUTING."""
    (yaml,) = re.findall(r"```yaml\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "toy.yaml").write_text(yaml)
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path))


def test_the_readme_is_read_in_two_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_tables_are_those_of_the_records(file: Path, board: list[Row], grids: list[Study], taught: list[Group]) -> None:
    text = file.read_text(encoding="utf-8")
    assert filled(text, board, grids, taught) == text, "run `make readme`"
    assert file.name != "README.md" or text.count(": begin -->") == 2


def test_a_foreign_row_stands_in_no_table(board: list[Row]) -> None:
    text = "".join(f"<!-- {name}: begin --><!-- {name}: end -->" for name in TABLES)
    wonders = [row.model_copy(update={"foreign": True, "perplexity": 1.0, "decode_tokens_per_second": 1e6}) for row in board]
    assert filled(text, board + wonders) == filled(text, wonders + board) == filled(text, board)


def test_what_the_readme_says_it_found_is_found(board: list[Row]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- methods: begin -->\n")[2].partition("<!-- methods: end -->")[0]
    heads, _, *cells = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines() if line.startswith("|")]

    def number(cell: str) -> float:
        return float(cell.split(" ")[0].replace("−", "-"))

    found = {header: {line[0].replace("\\", ""): line[place] for line in cells} for place, header in enumerate(heads)}
    delta = {name: 0.0 if cell == "–" else number(cell) for name, cell in found["Δ\N{NO-BREAK SPACE}%"].items()}
    speed_up, weights = ({name: number(cell) for name, cell in found[header].items()} for header in ("Speed‑up", "Weights MB"))
    assert 17 <= len(cells) <= 24
    assert all(delta[name] < 1 and 1.85 <= speed_up[name] < 1.95 for name in ("rtn-8bit", "gptq-8bit")), "1.9 times as fast"
    guesses = {base: delta[f"{base}prompt-lookup (texts)"] for base in ("", "rtn-8bit+")}
    assert guesses == {"": 0.0, "rtn-8bit+": delta["rtn-8bit"]}, "guesses cost no quality"
    eight = [row for row in board if row.label in ("rtn-8bit", "gptq-8bit") and row.suite == "front"]
    assert {row.label for row in eight} == {"rtn-8bit", "gptq-8bit"}
    assert {(row.perplexity_verdict, row.accuracy_verdict) for row in eight} == {("equivalent", "equivalent")}
    assert all(delta[name] < 0.34 * delta["rtn-4bit"] for name in ("signround", "awq-clip")), "a third of what plain rounding loses"
    assert all(
        delta[name] > 4 * delta["signround"] and weights[name] > 0.85 * weights["signround"] for name in ("signround-3bit", "gptq-3bit")
    )
    assert speed_up["kv-int8"] < 1 and weights["kv-int8"] == weights["dense"]
    half, bitmap = "wanda", "sparsegpt+sparse-bitmap"
    assert min(delta[half], delta[bitmap]) > delta["gptq-3bit"] and speed_up[half] < 1.1 < 1.5 < speed_up[bitmap]
    assert delta["shortgpt+lora(steps=160)"] < 0.55 * delta["shortgpt"], "they halve the loss"
    student = "shortgpt(fraction=0.5)+kd(learning_rate=0.0002)+gptq"
    assert max(speed_up, key=lambda name: speed_up[name]) == student and delta[student] > 500
    assert found["Δ\N{NO-BREAK SPACE}points"]["lolcats"] == "–", "no item is longer than its window"
    families = {part for cell in found["Family"].values() for part in cell.split("+")}
    assert families >= {"quantization", "pruning", "peft", "distillation", "compact", "dynamic"}, "all stand in it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"]\(([^)#\s]+)", file.read_text(encoding="utf-8")):
        assert target.startswith("http") or (file.parent / target).exists(), target


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_paths_in_the_text_exist(file: Path) -> None:
    named = re.findall(r"`((?:harness|methods|tasks|leaderboard|conf|tests|results|docs)/[\w./-]+)`", file.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_block_is_marked_and_at_most_a_third_is_only_parsed() -> None:
    every = blocks()
    assert [block.name for block in every if block.mark not in MARKS] == []
    counts = Counter(block.mark for block in every)
    assert counts["parse"] <= len(every) / 3 and counts["run"] >= 5


def test_exit_codes_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| (\d+) \| ([^|]+) \|$", text, re.MULTILINE)) == {str(int(code)): code.meaning for code in ExitCode}


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.name)
def test_commands_and_options_exist(block: Block, newcomer: None) -> None:
    """Each command of each block is parsed by the command line itself; nothing is invoked."""
    for words in block.commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] == "slimbench":
            _parse(typer.main.get_command(app), words[1:])
        else:
            assert words[0] in SHELL or "=" in words[0], words


def _parse(command: Any, words: list[str]) -> None:
    context = command.make_context("slimbench", list(words), resilient_parsing=False)
    if hasattr(command, "resolve_command"):
        left = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else list(context.args)
        _, inner, rest = command.resolve_command(context, left)
        assert inner is not None, words
        _parse(inner, rest)


@pytest.mark.parametrize("words", [["compare", "--no-such-option", "a"], ["bord", "build"], ["board", "table", "--format"]])
def test_a_command_that_does_not_exist_is_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|requires an argument"):
        _parse(typer.main.get_command(app), words)


@pytest.mark.parametrize("block", blocks("plan"), ids=lambda block: block.name)
def test_overrides_of_plans_compose(block: Block) -> None:
    for words in block.commands():
        if words[:2] in (["slimbench", "run"], ["slimbench", "sweep"]):
            assert compose.jobs([word for word in words[2:] if not word.startswith("--")])


def test_the_writer_changes_nothing_in_what_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "slimbench.leaderboard.tables.readme", str(ROOT / "results"), str(copy)]
    assert subprocess.run(command, check=False).returncode == 0
    assert copy.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Dockerfile", "slimbench.def"])
def test_containers_install_what_there_is(name: str) -> None:
    text = (ROOT / "docs" / "containers" / name).read_text(encoding="utf-8")
    (extras,) = re.findall(r"'/opt/slimbench\[([\w,]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert "-c /opt/slimbench/constraints.txt" in text and (ROOT / "constraints.txt").is_file()
    assert text.splitlines()[0].removeprefix("# ") in (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_what_attention_takes_is_what_its_table_has() -> None:
    with next((ROOT / "results" / "kernels").glob("attention-AMD-*.csv")).open() as file:
        rows = {(row["dtype"], int(row["length"]), row["implementation"]): row for row in csv.DictReader(file)}
    words = " ".join((ROOT / "docs" / "engines.md").read_text().split())
    naive, math, flash = ([rows["float32", length, name] for length in (512, 2048)] for name in ("naive", "math", "flash"))
    held = [[int(row["peak_bytes"]) / 1e6 for row in found] for found in (naive, math, flash)]
    assert (
        f"512 tokens in float32 take {held[0][0]:.0f} MB as the formula is written, {held[1][0]:.0f} MB by `math` and {held[2][0]:.1f} MB"
        in words
    )
    times = [float(found[1]["milliseconds"]) for found in (naive, math, flash)]
    longer = f"{held[0][1]:.0f}, {held[1][1]:.0f} and {held[2][1]:.1f} MB, and {times[0]:.0f}, {times[1]:.0f} and {times[2]:.0f} ms"
    assert f"2,048 tokens {longer}" in words
    errors = {f"{float(row['relative_error']):.0e}" for found in (naive, math, flash) for row in found}
    assert errors == {"3e-07"} and "The errors, 3 · 10⁻⁷ of the answer" in words

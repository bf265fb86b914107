"""The board: how records join into rows, and that every rendering is complete, safe and reproducible."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from slimbench.harness.schema.hardware import Gpu, Hardware, identify
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, Unreadable
from slimbench.leaderboard.figures import caption, draw, plottable, scaling
from slimbench.leaderboard.figures.groups import by_speed
from slimbench.leaderboard.figures.palette import Palette
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import build as builder
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.build import BoardError, build, contents
from slimbench.leaderboard.tables.columns import COLUMNS, comparable, rank_of
from slimbench.leaderboard.tables.format import EMPTY, decimal
from slimbench.leaderboard.tables.resolution import anchors
from slimbench.leaderboard.tables.tables import ENOUGH, Row, evidence, pareto, tables
from slimbench.leaderboard.tables.writers import to_csv, to_json, to_markdown, to_terminal
from tests.support.board_records import Spec, board, failure, records

GPTQ = Spec("gptq", "quantization", loss=1.3, decode_ms=23.0, bits=4.25, size=0.426)


def row_of(made: list[Record], pipeline: str) -> Row:
    return next(row for row in rows(made) if row.pipeline == pipeline)


def printed(made: list[Record], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(rows(made)))
    return console.export_text()


def test_a_cell_joins_its_stages_and_its_reference() -> None:
    dense, gptq = records(Spec()), records(GPTQ)
    gptq[2].speed.points[0].processes = []  # type: ignore[union-attr]
    row = row_of(dense + gptq, "gptq")
    ours, theirs = (r[1].quality.perplexity[0] for r in (gptq, dense))  # type: ignore[union-attr]
    assert row.status == "ok" and row.reason is None and not row.is_reference
    assert row.perplexity == pytest.approx(ours.perplexity)
    assert row.perplexity_delta_percent == pytest.approx(100 * (ours.perplexity / theirs.perplexity - 1))
    assert row.perplexity_ratio_low < ours.perplexity / theirs.perplexity < row.perplexity_ratio_high  # type: ignore[operator]
    assert row.accuracy == pytest.approx(sum(row.task_accuracy.values()) / 3)  # type: ignore[arg-type]
    assert row.accuracy_delta == pytest.approx(sum(row.task_delta.values()) / 3)  # type: ignore[arg-type]
    assert row.decode_low <= row.decode_tokens_per_s <= row.decode_high  # type: ignore[operator]
    assert 1.8 < row.speedup_low <= row.speedup <= row.speedup_high < 2.2  # type: ignore[operator]
    assert row.compression_ratio == pytest.approx(1 / 0.426, rel=1e-3)
    assert (row.effective_bits, row.kernel, row.corpus) == (4.25, "aten::mm", "wikipedia")
    assert row.hardware == "Example CPU 9000 · 2 threads · 8 GB"


def test_the_reference_is_measured_against_itself_and_has_no_difference_in_quality() -> None:
    row = row_of(records(Spec()) + records(GPTQ), "dense")
    assert row.is_reference and row.speedup_low < row.speedup < row.speedup_high  # type: ignore[operator]
    assert row.speedup == pytest.approx(1.0, abs=0.05)
    assert (row.perplexity_delta_percent, row.accuracy_delta, row.task_delta) == (None, None, {})


def test_a_reference_that_was_not_measured_against_itself_has_no_speedup() -> None:
    dense = records(Spec())
    dense[2].speed.points[0].reference = None  # type: ignore[union-attr]
    assert row_of(dense, "dense").speedup is None


def test_every_point_of_the_speed_grid_is_on_the_row() -> None:
    made = records(GPTQ)
    head = made[2].speed.points[0]  # type: ignore[union-attr]
    made[2].speed.points.append(head.model_copy(update={"batch": 4, "roofline": None}))  # type: ignore[union-attr]
    row = row_of(made, "gptq")
    first, second = row.speed_points
    assert (first["batch"], second["batch"], first["prompt"]) == (1, 4, 128)
    assert first["decode_tokens_per_s"] == row.decode_tokens_per_s == row.throughput_tokens_per_s
    assert second["throughput_tokens_per_s"] == pytest.approx(4 * row.throughput_tokens_per_s)  # type: ignore[operator]
    assert (row.roofline_fraction, second["roofline_fraction"]) == (head.roofline.fraction, None)
    assert (row.largest_batch, row.kv_cache_bytes, row.energy_j_per_token) == (64, 3_686_400, None)


def test_speed_of_drawn_tokens_says_so_and_stands_in_a_table_of_its_own() -> None:
    drawn = records(replace(GPTQ, pipeline="rtn"))
    for record in drawn:
        record.config["speed"] = record.config["speed"] | {"temperature": 0.7}
        record.cell.keys = record.cell.keys.model_copy(update={"speed": "0123456789abcdef"})
        if record.speed:
            record.key, record.speed.temperature = record.cell.keys.speed, 0.7
    made = rows(records(Spec()) + records(GPTQ) + drawn)
    row = next(row for row in made if row.pipeline == "rtn")
    assert row.temperature == 0.7 and (row.speed_point or "").endswith(", drawn at temperature 0.7")
    others = [table for table in tables(made) if row not in table.rows]
    (own,) = (table for table in tables(made) if row in table.rows)
    assert own.rows == [row] and "drawn at temperature 0.7" in own.setting and "temperature" not in " ".join(t.setting for t in others)
    titles = [group.title for group in by_speed(made, Palette.of(made))]
    assert sum("at temperature 0.7" in title for title in titles) == 1 < len(titles)


@pytest.mark.parametrize("gbs", [11.0, 20.0, 5.0])
def test_the_copy_bandwidth_is_a_figure_and_no_flag(gbs: float) -> None:
    """It wanders on a steady machine and does not predict decode times; older records say that it changed."""
    made = records(GPTQ)
    for probe in made[2].speed.points[0].probes:  # type: ignore[union-attr]
        probe.copy_gbs = gbs
    made[2].speed.flags.append("the machine's copy bandwidth changed by 58% (1×128+17)")  # type: ignore[union-attr]
    row = row_of(records(Spec()) + made, "gptq")
    assert row.copy_bandwidth_gbs == gbs and row.flags == []


def test_too_few_samples_have_no_interval() -> None:
    made = records(GPTQ)
    point = made[2].speed.points[0]  # type: ignore[union-attr]
    for samples in (point.candidate, point.reference):
        del samples.prefill_ms[5:], samples.decode_ms[5:]
    point.processes = [5]
    row = row_of(made, "gptq")
    assert row.speedup is not None and row.decode_tokens_per_s is not None
    assert row.prefill_low is row.decode_low is row.speedup_low is row.speedup_high is None


def test_without_its_reference_a_row_has_no_difference() -> None:
    row = row_of(records(GPTQ), "gptq")
    assert row.perplexity is not None and row.perplexity_delta_percent is None and row.accuracy_delta is None


def test_one_artefact_serves_every_engine_and_suite() -> None:
    first, second = records(GPTQ), records(replace(GPTQ, engine="packed"))
    made = rows([*first, *second[1:]])
    assert len(made) == 2 and {row.status for row in made} == {"ok"}
    assert made[0].disk_bytes == made[1].disk_bytes is not None


def test_the_newest_of_equal_keys_counts() -> None:
    old, new = records(GPTQ), records(GPTQ)
    old[1] = old[1].model_copy(
        update={"status": Status.FAILED, "quality": None, "failure": failure("old"), "started": "2025-01-01T00:00:00+00:00"}
    )
    assert [row.status for row in rows([*new, *old])] == ["ok"]


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ({Stage.QUALITY: Status.UNSUPPORTED, Stage.SPEED: Status.DIVERGED}, "diverged"),
        ({Stage.QUALITY: Status.DIVERGED, Stage.SPEED: Status.TIMEOUT}, "timeout"),
        ({Stage.QUALITY: Status.OOM, Stage.SPEED: Status.TIMEOUT}, "oom"),
        ({Stage.QUALITY: Status.OOM, Stage.SPEED: Status.FAILED}, "failed"),
        ({Stage.COMPRESS: Status.UNSUPPORTED}, "unsupported"),
    ],
)
def test_the_status_is_that_of_the_worst_stage(ends: dict[Stage, Status], status: str) -> None:
    spec = replace(GPTQ, ends={stage: (end, failure(f"because of {end}\nmore")) for stage, end in ends.items()})
    row = row_of(records(spec), "gptq")
    assert row.status == status
    assert row.reason and row.reason.endswith(f"because of {status}" + (" (peak memory 1.2 GB)" if status == "oom" else ""))


def test_a_missing_stage_makes_a_row_incomplete() -> None:
    row = row_of(records(GPTQ)[:2], "gptq")
    assert (row.status, row.reason) == ("incomplete", "no record of speed")
    assert row.perplexity is not None and row.speedup is None
    only_speed = row_of(records(GPTQ)[2:], "gptq")
    assert only_speed.reason == "no record of compress and quality" and only_speed.weight_bytes is not None


def test_random_weights_are_complete_without_quality() -> None:
    made = [r for r in records(GPTQ) if r.stage is not Stage.QUALITY]
    for record in made:
        record.config["model"] = {"source": "random"}
    assert row_of(made, "gptq").status == "ok"


def test_of_several_tables_the_one_on_most_text_stands_first_if_it_has_rows_to_choose_from() -> None:
    (row,) = rows(records(Spec()))

    def made(count: int, windows: int, items: int | None) -> list[Row]:
        return [row.model_copy(update={"perplexity_windows": windows, "accuracy_items": items})] * count

    quick, screen, front = made(80, 16, 160), made(60, 64, None), made(ENOUGH, 64, 1162)
    few, failed = made(ENOUGH - 1, 128, 4000), [row.model_copy(update={"status": Status.FAILED, "perplexity": None})] * 90
    assert sorted([few, failed, quick, front, screen], key=evidence, reverse=True) == [front, screen, quick, few, failed]
    assert evidence([*front, *failed]) == evidence(front) < evidence(made(ENOUGH + 1, 64, 1162)), "only what was measured counts"
    board_ = Board.of(
        [record for suite, n in (("a", 3), ("b", ENOUGH)) for i in range(n) for record in records(Spec(f"m{i}", suite=suite))]
    )
    assert [board_.tables[number].rows[0].suite for number in board_.sequence] == ["b", "a"]


def test_different_texts_are_never_paired() -> None:
    dense = records(Spec())
    dense[1].quality.perplexity[0].corpus_sha256 = "other"  # type: ignore[union-attr]
    assert row_of(dense + records(GPTQ), "gptq").perplexity_delta_percent is None


def test_different_items_are_never_paired() -> None:
    dense = records(Spec())
    dense[1].quality.zeroshot[0].items.hashes[0] = "other"  # type: ignore[union-attr]
    row = row_of(dense + records(GPTQ), "gptq")
    assert row.accuracy_delta is None and len(row.task_delta) == 2


@pytest.mark.parametrize(
    ("source", "bits", "group", "loss", "flagged"),
    [
        ("q4_1", 4, 32, 1.001, True),
        ("q4_1", 4, 64, 1.001, False),
        ("q4_1", 8, 32, 1.001, False),
        ("q4_1", 4, 32, 1.2, False),
        ("q8_0", 8, 32, 1.001, True),
        (None, 4, 32, 1.001, False),
        ("bf16", 4, 32, 1.001, False),
    ],
)
def test_a_grid_that_the_source_had_already_is_flagged(source: str | None, bits: int, group: int, loss: float, flagged: bool) -> None:
    spec = replace(GPTQ, source_precision=source, loss=loss)
    made = records(spec.reference()) + records(spec)
    for record in made:
        if record.compress and record.cell.pipeline == "gptq":
            record.compress.claim = replace(record.compress.claim, bits=bits, group_size=group)
    assert any("a grid that is met again" in flag for flag in row_of(made, "gptq").flags) is flagged


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(-0.04, 0.3, "0.0 to +0.3"), (0.04, 0.3, "0.0 to +0.3"), (-0.3, 0.04, "−0.3 to 0.0"), (-0.04, 0.04, "0.0–0.0"), (None, 0.3, "")],
)
def test_a_number_that_rounds_to_zero_has_no_sign(low: float | None, high: float, shown: str) -> None:
    ratios = {"perplexity_ratio_low": None if low is None else 1 + low / 100, "perplexity_ratio_high": 1 + high / 100}
    row = row_of(board(), "gptq").model_copy(update=ratios)
    (column,) = (column for column in COLUMNS if column.key == "perplexity_delta_percent")
    assert column.interval(row) == shown
    assert [decimal(1, signed=True)(value) for value in (-0.04, -0.06, 0.06)] == ["0.0", "−0.1", "+0.1"]


@pytest.mark.parametrize(
    "partial", ["on_existing=all 'stages=[speed]'", "stages=quality +on_existing=failed", "'++stages=[quality, speed]'"]
)
def test_the_command_of_a_row_makes_all_its_stages(partial: str) -> None:
    made = records(GPTQ)
    for record in made:
        record.command = f"slimbench run method=gptq {partial} suite=quick 'note=a stages=b'"
    assert row_of(made, "gptq").command == "slimbench run method=gptq suite=quick 'note=a stages=b'"


def test_two_suites_protocols_or_machines_never_share_a_table() -> None:
    suites = [GPTQ, replace(GPTQ, suite="papers"), replace(GPTQ, seqlen=2048), replace(GPTQ, model="other"), replace(GPTQ, speed="long")]
    made = [record for spec in suites for record in records(spec)]
    moved = records(replace(GPTQ, device="cuda"))
    for record in moved:
        card = {"name": "Example GPU", "memory_bytes": 1, "driver": "1", "compute_capability": "9.0"}
        record.hardware = identify(record.provenance["hardware"] | {"gpus": [card]}, "cuda")
    split = tables(rows(made + moved))
    assert len(split) == len(suites) + 1
    titles = [table.title for table in split if "wiki" in table.title and "tiny" in table.title]
    assert all("(protocol " in title for title in titles), "one name for two protocols has to be told apart"
    assert {table.rows[0].hardware for table in split} == {"Example CPU 9000 · 2 threads · 8 GB", "Example GPU"}


def test_flags_of_all_evidence_are_shown_once() -> None:
    assert row_of(board(), "rtn").flags == ["fell back to dequantize + dense matmul: 269 MB of dense weights written for each token"]
    assert row_of(board(), "nf4").flags == ["load average 3.1 on 2 cores while measuring"]


@pytest.mark.parametrize("later", ["rtn", "rtn-8bit(bits=4)"])
def test_a_cell_keeps_the_shipped_name_whoever_ran_it_last(later: str) -> None:
    made = records(GPTQ.reference()) + records(GPTQ) + records(GPTQ)
    for place, record in enumerate(r for r in made if r.cell.pipeline == "gptq"):
        record.cell.pipeline = ("gptq", later)[place >= 3]
        record.started = f"2026-01-0{1 + (place >= 3)}T00:00:00+00:00"
    assert [row.pipeline for row in rows(made) if not row.is_reference] == ["gptq" if "(" in later else later]


def test_a_compression_that_shared_the_machine_is_flagged() -> None:
    made, shared = board(), "other load: 1.1 cores busy beside the measurement (compression)"
    for record in made:
        if record.compress and record.cell.pipeline == "gptq":
            record.compress.flags.append(shared)
    assert shared in row_of(made, "gptq").flags


@pytest.mark.parametrize(("device", "threads"), [("cuda", None), ("cpu", 1)])
def test_a_compression_on_another_card_or_with_other_threads_than_the_row_is_of_is_flagged(device: str, threads: int | None) -> None:
    made = board()
    assert not [flag for row in rows(made) for flag in row.flags if flag.startswith("compressed on")]
    machine = Hardware("Example CPU 9000", ["avx2", "fma"], 2, 8 * 2**30, [Gpu("Example GPU", 24 * 2**30, "550.1", "9.0")])
    for record in made:
        if record.compress and record.cell.pipeline == "gptq":
            record.config["device"] = {"compress": device}
            record.hardware = there = machine.identity(device, threads=threads)
    flagged = [(row.pipeline, flag) for row in rows(made) for flag in row.flags if flag.startswith("compressed on")]
    assert flagged == [("gptq", f"compressed on {there.label}: the times of compression are of that")]


def test_a_simulated_artefact_has_no_speed_figure() -> None:
    row = row_of(board(), "fake-int6")
    assert row.speedup is row.decode_tokens_per_s is row.prefill_ms is None
    assert any(flag.startswith("simulated") for flag in row.flags)


def test_the_reference_comes_first_and_empty_rows_last() -> None:
    made = rows(board())
    assert made[0].is_reference
    assert {row.pipeline for row in made[-3:]} == {"quip", "flap(sparsity=0.3)", "gptq(group_size=128)"}
    known = [row.perplexity for row in made if row.perplexity is not None]
    assert known[1:] == sorted(known[1:])


def test_the_front_holds_exactly_the_rows_that_none_beats() -> None:
    made = rows(board())
    front = pareto(made, "weight_bytes")
    points = [row for row in made if row.status == "ok" and row.perplexity and row.weight_bytes]
    beaten = [
        row
        for row in points
        if any(o.perplexity < row.perplexity and o.weight_bytes <= row.weight_bytes for o in points)  # type: ignore[operator]
    ]
    assert {r.pipeline for r in front} == {r.pipeline for r in points} - {r.pipeline for r in beaten}
    assert pareto(made, "decode_tokens_per_s")[0].pipeline in {"dense", "int8"}


def test_a_row_stands_on_no_front_of_a_figure_that_a_flag_takes_away() -> None:
    made = [row for row in rows(board()) if row.status == "ok" and row.perplexity and row.weight_bytes and row.speedup]
    best = pareto(made, "decode_tokens_per_s")[0]
    others = [row for row in made if row is not best]

    def stands(flag: str, axis: Literal["weight_bytes", "decode_tokens_per_s"]) -> bool:
        flagged = best.model_copy(update={"flags": [*best.flags, flag]})
        return flagged in pareto([*others, flagged], axis)

    assert best in pareto(made, "weight_bytes")
    assert stands("speed measured on another machine", "weight_bytes")
    assert not stands("speed measured on another machine", "decode_tokens_per_s")
    assert not stands("not causal: activations have one scale", "weight_bytes")
    assert not stands("claims 4 bits, stores 16", "decode_tokens_per_s")
    assert stands("other load: 1.2 cores", "decode_tokens_per_s")


def test_order_of_records_is_without_effect() -> None:
    made = board()
    shuffled = random.Random(5).sample(made, len(made))
    faults = [Unreadable("b", "x"), Unreadable("a", "y")]
    assert dict(contents(made, faults, figures=False)) == dict(contents(shuffled, faults[::-1], figures=False))


def test_json_has_every_key_and_never_nan() -> None:
    made = board()
    made[1].quality.perplexity[0].window_nll[0] = math.nan  # type: ignore[union-attr]
    made[1].quality.zeroshot[0].accuracy = math.inf  # type: ignore[union-attr]
    objects = json.loads(to_json(rows(made)), parse_constant=lambda name: pytest.fail(name))
    assert all(field.description for field in Row.model_fields.values())
    assert all(set(row) == set(Row.model_fields) for row in objects)
    assert [row["perplexity"] for row in objects if row["is_reference"]] == [None]
    assert [Row(**row) for row in objects] == rows(made)


def test_csv_reads_back() -> None:
    made = rows(board())
    back = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert [float(line["perplexity"]) if line["perplexity"] else None for line in back] == [row.perplexity for row in made]
    assert [json.loads(line["flags"]) for line in back] == [row.flags for row in made]
    assert [json.loads(line["keys"]) for line in back] == [row.keys.model_dump() for row in made]


def test_markdown_reads_back() -> None:
    made = rows(board())
    lines = [line for line in to_markdown(made).splitlines() if line.startswith("| ")]
    header, body = lines[0], lines[2:]
    cells = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]
    columns = comparable(made)
    assert [text.strip() for text in header.split("|")[4:-2]] == [column.header for column in columns]
    assert [cell[0] for cell in cells] == [rank_of(row) for row in made]
    assert [cell[1] for cell in cells] == [row.pipeline for row in made]
    assert [cell[3] for cell in cells] == [columns[0].plus_minus(row) for row in made]
    assert all(row.reason in cell[-1] for row, cell in zip(made, cells, strict=True) if row.reason)


def test_a_table_has_no_column_that_nobody_fills() -> None:
    made = rows(board())
    assert "kl_mean" in {column.key for column in comparable(made)}
    made = [row.model_copy(update={"kl_mean": None}) for row in made]
    assert {column.key for column in comparable(rows(board()))} - {column.key for column in comparable(made)} == {"kl_mean"}
    one = [made[0].model_copy(update={"kl_mean": 0.1}), *made[1:]]
    assert "kl_mean" in {column.key for column in comparable(one)}


def test_absolute_quality_stands_in_a_table_only_where_nothing_is_paired() -> None:
    paired, alone = rows(board()), rows(records(Spec("gptq", "quantization", loss=1.3)))
    assert not {"perplexity", "accuracy"} & {column.key for column in comparable(paired)}
    assert {"perplexity", "accuracy"} <= {column.key for column in comparable(alone)}
    dense = row_of(board(), "dense")
    said = f"Dense has perplexity {COLUMNS[0].plus_minus(dense)} and accuracy "
    assert anchors(paired)[0].startswith(said) and said in to_markdown(paired).replace("\\", "") and anchors(alone) == []
    assert [row.pipeline for row in pareto(alone, "weight_bytes")] == ["gptq"], "without a pair the perplexity itself decides"


def test_markdown_says_how_to_read_its_columns() -> None:
    said = to_markdown(rows(records(Spec()))).replace("\\", "")
    assert all(
        words in said
        for words in ("# are the places that a row may hold", "± is half of the 95 % interval", "KL is in nats", "MB are 10⁶ bytes")
    )


def test_weights_that_are_kept_elsewhere_are_told_beside_those_in_memory() -> None:
    row = rows(records(Spec()))[0].model_copy(update={"weight_bytes": 0, "offloaded_bytes": 269_030_016})
    assert "269 MB of its weights are kept elsewhere until their layer computes" in to_markdown([row])
    assert "| 0.0 + 269 |" in to_markdown([row])


def test_weights_that_are_kept_elsewhere_are_no_fewer() -> None:
    small, *_ = rows(records(GPTQ))
    offloaded = small.model_copy(update={"weight_bytes": 0, "offloaded_bytes": 269_030_016, "perplexity": small.perplexity + 1})  # type: ignore[operator]
    assert pareto([small, offloaded], "weight_bytes") == [small]
    assert pareto([offloaded], "weight_bytes") == [offloaded]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_table_fits_and_names_every_reason(width: int) -> None:
    text = printed(board(), width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    assert all(row.reason in flat for row in rows(board()) if row.reason)
    assert COLUMNS[0].plus_minus(rows(board())[0]) in text


def test_a_value_without_interval_stands_alone() -> None:
    row = row_of(board(), "quip")
    assert {column.plus_minus(row) for column in COLUMNS} == {EMPTY}


def test_a_text_that_looks_like_a_formula_is_defused_in_csv() -> None:
    assert csv.DictReader(io.StringIO(to_csv(rows(records(Spec("=1+1")))))).__next__()["pipeline"] == "'=1+1"


def test_the_plot_leaves_out_and_names_rows_off_the_scale() -> None:
    (table,) = tables(rows(board()))
    svg = draw(table, "svg").decode()
    assert "above 20 × the reference: hqq(bits=2) (4" in caption(table)
    assert ">hqq(bits=2)<" not in svg and ">int8<" in svg
    assert "<dc:date>" not in svg and draw(table, "png").startswith(b"\x89PNG")


def test_nothing_is_plotted_from_a_single_point() -> None:
    (table,) = tables(rows(records(Spec())))
    assert not plottable(table)
    assert "pareto.png" not in dict(contents(records(Spec()), figures=False))


def test_build_writes_the_board_of_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    for record in board() + records(replace(GPTQ, suite="papers")) + records(replace(Spec(), suite="papers")):
        store.put(record)
    (tmp_path / "results" / "m" / "p").mkdir(parents=True)
    (tmp_path / "results" / "m" / "p" / "quality-x.json").write_text("{")
    written = build(tmp_path / "results", tmp_path / "board", figures=False)
    names = {path.relative_to(tmp_path / "board").as_posix() for path in written}
    assert {"index.html", "table.md", "table.csv", "table.json", "pareto.png", "pareto.svg", "pareto.pdf"} <= names
    assert len([name for name in names if name.startswith("pareto-")]) == 3
    there = {path.relative_to(tmp_path / "board").as_posix() for path in (tmp_path / "board").rglob("*") if path.is_file()}
    assert names == there, "no temporary file may stay"
    assert "m/p/quality-x.json" in (tmp_path / "board" / "index.html").read_text()


def test_a_failed_write_leaves_the_old_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder.write(records(Spec()), [], tmp_path, figures=False)
    before = (tmp_path / "index.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BoardError, match="No space left"):
        builder.write(board(), [], tmp_path, figures=False)
    assert (tmp_path / "index.html").read_bytes() == before and not list(tmp_path.rglob(".*.tmp"))


def test_no_records_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match="no results folder") as absent:
        build(tmp_path / "absent", tmp_path / "board")
    (tmp_path / "m" / "p").mkdir(parents=True)
    (tmp_path / "m" / "p" / "speed-1.json").write_text("[]")
    with pytest.raises(BoardError, match=r"1 files? could not be read") as unreadable:
        build(tmp_path, tmp_path / "board")
    assert "\n" not in f"{absent.value}{unreadable.value}"


def test_the_board_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "lm_eval", "matplotlib.pyplot"}
    code = f"import sys, slimbench.leaderboard.site.build; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_decode_time_over_model_sizes_is_drawn_with_its_bound() -> None:
    specs = [Spec(model=model, size=size, decode_ms=ms) for model, size, ms in (("a", 1, 40), ("b", 3, 110), ("c", 9, 350))]
    board = rows([r for spec in specs for r in records(spec)])
    (drawn,) = scaling.series(board)
    assert [point[0] for point in drawn.points] == ["a", "b", "c"]
    assert drawn.points[2][2] == pytest.approx(350, rel=0.1) and (drawn.gbs, drawn.bandwidth) == (12.3, "read")
    slower = replace(drawn, name="slower", points=tuple((model, size, 1.5 * ms) for model, size, ms in drawn.points))
    picture = scaling.draw([slower, drawn], "svg")
    assert b"bound at 12 GB/s, the read bandwidth" in picture and [picture.count(b">%c</text>" % model) for model in b"abc"] == [1, 1, 1]
    older = replace(drawn, name="older", gbs=9.0, bandwidth="copy")
    assert b"bound at 9 GB/s, the copy bandwidth" in scaling.draw([drawn, older], "svg"), "what reads could do there is not known"
    assert scaling.series(rows(records(Spec()))) == []


def test_a_speed_up_names_its_engine_and_kernel() -> None:
    board = rows(records(Spec()) + records(GPTQ))
    row = next(r for r in board if r.pipeline == "gptq")
    assert row.kernel and row.path_label == f"transformers · bfloat16 · {row.kernel}"
    assert row.path_label.split(" · ")[2] in to_markdown([row])

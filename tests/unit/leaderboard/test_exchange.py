"""Import and export: what is read again is what was written, foreign numbers are those of their files, and nothing is made up.

The files of lm-eval in `foreign/` were written by its command, on a random two-layer model and on a copy rounded to seven levels a row;
documents and environment were cut out of them. Those of optimum-benchmark were written for these tests in its format.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

from slimbench.harness.run import audit
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, dump
from slimbench.leaderboard.compare import compare
from slimbench.leaderboard.exchange import dataset, importing, parquet
from slimbench.leaderboard.exchange.foreign import Named, public_name
from slimbench.leaderboard.exchange.importing import Outcome
from slimbench.leaderboard.rows.outcomes import outcomes as outcomes_by_method
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import build
from slimbench.leaderboard.tracking import wandb as tracking
from tests.support.board_records import Spec, board, records
from tests.support.paths import FOREIGN, SLIMBENCH

DENSE, RTN = FOREIGN / "lm_eval" / "tiny-llama", FOREIGN / "lm_eval" / "tiny-rtn"
OPTIMUM = FOREIGN / "optimum_benchmark"


def put(source: Path, root: Path, model: str | None = None, pipeline: str | None = None, **options: Any) -> list[importing.Report]:
    return list(importing.add([source], Store(root), named=Named(model, pipeline), **options))


def outcomes(reports: list[importing.Report]) -> list[Outcome]:
    return [report.outcome for report in reports]


def files(root: Path) -> dict[str, bytes]:
    """Every file but the id of the folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.json") if path.parent.name != ".slimbench"}


def results_file(folder: Path) -> Path:
    (found,) = folder.glob("results_*.json")
    return found


def with_pair(root: Path) -> list[Row]:
    """The board of a dense and a rounded model that lm-eval measured."""
    assert outcomes(put(DENSE, root)) == [Outcome.IMPORTED]
    assert outcomes(put(RTN, root, "tiny-llama", "rtn-3bit")) == [Outcome.IMPORTED]
    return rows(Store(root).scan()[0])


@pytest.fixture
def without_samples(tmp_path: Path) -> Path:
    """The same results without the samples files."""
    for folder in (DENSE, RTN):
        target = tmp_path / "bare" / folder.name
        target.mkdir(parents=True)
        shutil.copy(results_file(folder), target)
    return tmp_path / "bare"


def test_parquet_gives_back_the_same_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "before")
    for record in board():
        store.put(record)
    with_pair(tmp_path / "before")
    (tmp_path / "all.parquet").write_bytes(parquet.of_records(store.scan()[0]))
    assert set(outcomes(put(tmp_path / "all.parquet", tmp_path / "after"))) == {Outcome.IMPORTED}
    assert files(tmp_path / "after") == files(tmp_path / "before")
    assert all(record.foreign for record in Store(tmp_path / "after").scan()[0])
    assert set(outcomes(put(tmp_path / "all.parquet", tmp_path / "after"))) == {Outcome.THERE}


def test_flat_columns_are_those_of_the_record() -> None:
    import io

    import pyarrow.parquet as pq

    made = board()
    for record, line in zip(made, pq.read_table(io.BytesIO(parquet.of_records(made))).to_pylist(), strict=True):
        assert (line["model"], line["stage"], line["status"], line["key"]) == (record.cell.model, record.stage, record.status, record.key)
        assert line["perplexity"] == (record.quality.perplexity[0].perplexity if record.quality else None)
        assert line["decode_ms"] == (median(record.speed.points[0].candidate.decode_ms) if record.speed else None)
        assert line["disk_bytes"] == (record.compress.disk_bytes if record.compress else None)
        assert Record.model_validate_json(line["record"]) == Record.model_validate_json(dump(record))


def test_the_data_set_loads_with_datasets(tmp_path: Path) -> None:
    import yaml
    from datasets import load_dataset

    made = [record for spec in (Spec(), Spec("gptq", "quantization", loss=1.3, bits=4.25)) for record in records(spec)]
    dataset.write(made, tmp_path / "set", license="cc-by-4.0")
    loaded = load_dataset(str(tmp_path / "set"), "records", split="train", cache_dir=str(tmp_path / "cache"))
    assert [Record.model_validate_json(text).key for text in loaded["record"]] == [record.key for record in made]
    shown = load_dataset(str(tmp_path / "set"), "board", split="train", cache_dir=str(tmp_path / "cache"))
    expected = rows(made)
    assert set(shown.column_names) == set(Row.model_fields)
    for line, row in zip(shown, expected, strict=True):
        assert (line["pipeline"], line["perplexity"], line["is_reference"]) == (row.pipeline, row.perplexity, row.is_reference)
        assert line["flags"] == row.flags and json.loads(line["task_accuracy"]) == row.task_accuracy
    front = yaml.safe_load((tmp_path / "set" / "README.md").read_text().split("---")[1])
    assert front["license"] == "cc-by-4.0" and [c["config_name"] for c in front["configs"]] == ["records", "board"]
    assert set(outcomes(put(tmp_path / "set", tmp_path / "again"))) == {Outcome.IMPORTED}
    assert [record.key for record in Store(tmp_path / "again").scan()[0]]


def test_lm_eval_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    (report,) = put(DENSE, tmp_path)
    theirs = json.loads(results_file(DENSE).read_text())
    record = report.record
    assert record and record.quality and record.imported
    assert {task.task for task in record.quality.zeroshot} == {"sums", "parity"}  # the group `pair` repeats them
    for task in record.quality.zeroshot:
        scores = theirs["results"][task.task]
        assert task.metric == ("acc_norm" if task.task == "sums" else "acc")
        assert (task.accuracy, task.stderr) == (scores[f"{task.metric},none"], scores[f"{task.metric}_stderr,none"])
        assert fmean(task.items.correct) == pytest.approx(task.accuracy)
        assert len(task.items) == theirs["n-samples"][task.task]["effective"]
        assert task.chance == pytest.approx(1 / (3 if task.task == "sums" else 2))
        assert all(len(choices) == (3 if task.task == "sums" else 2) for choices in task.items.loglikelihoods)
    (document,) = record.quality.documents
    scores = theirs["results"]["lines"]
    assert document.word_perplexity == pytest.approx(scores["word_perplexity,none"], rel=1e-9)
    assert document.byte_perplexity == pytest.approx(scores["byte_perplexity,none"], rel=1e-9)
    assert document.bits_per_byte == pytest.approx(scores["bits_per_byte,none"], rel=1e-9)
    assert (record.cell.engine, record.cell.device, record.cell.dtype, record.cell.family) == ("transformers", "cpu", "float32", "dense")
    assert record.imported.label == "lm-eval 0.4.13" and "/" not in record.imported.file and record.started.endswith("+00:00")
    assert record.imported.sha256 and record.quality.evidence is None


def test_a_pair_of_lm_eval_is_compared_on_its_items(tmp_path: Path) -> None:
    dense, rtn = sorted(with_pair(tmp_path), key=lambda row: not row.is_reference)
    assert dense.is_reference and dense.table_key == rtn.table_key and rtn.family == "quantization"
    assert rtn.imported == "lm-eval 0.4.13" and "imported from lm-eval 0.4.13" in rtn.flags[0] and rtn.status == Status.OK
    assert rtn.accuracy_delta == pytest.approx((rtn.accuracy or 0) - (dense.accuracy or 0)) and rtn.accuracy_rank == 1
    assert (rtn.weight_bytes, rtn.effective_bits, rtn.kernel, rtn.disk_bytes, rtn.perplexity) == (None,) * 5
    assert set(rtn.perplexity_by_protocol) == {"lines document (word)", "lines document (byte)"}
    found = compare.compare(Store(tmp_path).scan()[0], "rtn-3bit", "dense")
    assert found.accuracy and len(found.accuracy.tasks) == 2


def test_without_samples_there_are_accuracies_and_no_pairs(tmp_path: Path, without_samples: Path) -> None:
    root = tmp_path / "runs"
    put(without_samples / DENSE.name, root)
    put(without_samples / RTN.name, root, "tiny-llama", "rtn-3bit")
    found = rows(Store(root).scan()[0])
    for row, folder in zip(sorted(found, key=lambda row: not row.is_reference), (DENSE, RTN), strict=True):
        theirs = json.loads(results_file(folder).read_text())["results"]
        assert row.task_accuracy == {"parity": theirs["parity"]["acc,none"], "sums": theirs["sums"]["acc_norm,none"]}
        errors = theirs["parity"]["acc_stderr,none"], theirs["sums"]["acc_norm_stderr,none"]
        assert row.accuracy_se == pytest.approx(math.hypot(*errors) / 2)
        assert (row.accuracy_rank, row.accuracy_delta, row.mcnemar_p, row.flips_to_wrong, row.worst_task) == (None,) * 5
        assert row.task_delta == {} and row.task_p == {}
        assert any(flag.startswith("lines: word perplexity") and "left out" in flag for flag in row.flags)
    assert compare.compare(Store(root).scan()[0], "rtn-3bit", "dense").accuracy is None


def test_the_error_from_items_is_the_one_that_lm_eval_reports(tmp_path: Path, without_samples: Path) -> None:
    put(DENSE, tmp_path / "with")
    put(without_samples / DENSE.name, tmp_path / "bare")
    (full,), (bare,) = (rows(Store(tmp_path / name).scan()[0]) for name in ("with", "bare"))
    assert full.accuracy_se == pytest.approx(bare.accuracy_se) and full.keys.compress == bare.keys.compress


def test_importing_again_changes_nothing(tmp_path: Path) -> None:
    with_pair(tmp_path)
    put(OPTIMUM, tmp_path)
    before = files(tmp_path)
    again = [*put(DENSE, tmp_path), *put(RTN, tmp_path, "tiny-llama", "rtn-3bit"), *put(OPTIMUM, tmp_path)]
    assert set(outcomes(again)) == {Outcome.THERE}
    assert files(tmp_path) == before


def test_another_result_of_the_same_cell_is_not_written_over_the_first(tmp_path: Path) -> None:
    put(DENSE, tmp_path)
    before = files(tmp_path)
    (refused,) = put(RTN, tmp_path, "tiny-llama", "dense")
    assert refused.outcome is Outcome.OTHER and "--replace" in refused.line and files(tmp_path) == before
    assert outcomes(put(RTN, tmp_path, "tiny-llama", "dense", replace=True)) == [Outcome.IMPORTED]
    assert files(tmp_path).keys() == before.keys() and files(tmp_path) != before


def test_optimum_benchmark_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    found = {report.record.cell.pipeline + report.record.cell.engine: report.record for report in put(OPTIMUM, tmp_path) if report.record}
    assert set(found) == {"densepytorch", "gptq(bits=4)pytorch", "densevllm"}
    theirs = json.loads((OPTIMUM / "gptq" / "benchmark_report.json").read_text())
    record = found["gptq(bits=4)pytorch"]
    assert (
        record.speed
        and record.speed.evidence is None
        and record.cell.family == "quantization"
        and record.cell.model == "example/tiny-llama"
    )
    (point,) = record.speed.points
    assert (point.batch, point.prompt, point.new_tokens, point.reference) == (2, 128, 16, None)
    assert point.candidate.prefill_ms == pytest.approx([1000 * s for s in theirs["prefill"]["latency"]["values"]])
    assert point.candidate.decode_ms == pytest.approx([1000 * s / 15 for s in theirs["decode"]["latency"]["values"]])
    assert record.speed.memory.process_peak_bytes == round(1e6 * theirs["load_model"]["memory"]["max_ram"])
    assert record.speed.memory.device_used_bytes == round(1e6 * theirs["generate"]["memory"]["max_allocated"])
    assert record.speed.memory.weight_bytes is None and record.wall_seconds is None
    board_rows = {row.pipeline + row.engine: row for row in rows(Store(tmp_path).scan()[0])}
    row = board_rows["gptq(bits=4)pytorch"]
    assert row.throughput_tokens_per_s == pytest.approx(theirs["decode"]["throughput"]["value"], rel=0.05)  # median against mean
    assert (
        row.speedup is None
        and row.weight_bytes is None
        and row.hardware == "Example Card 24GB"
        and row.imported == "optimum-benchmark 0.5.0"
    )
    assert row.table_key == board_rows["densepytorch"].table_key and board_rows["densepytorch"].is_reference
    assert any("less the mean prefill" in flag for flag in board_rows["densevllm"].flags)
    assert not any("less the mean prefill" in flag for flag in row.flags)


def test_a_board_of_imported_records_says_so(tmp_path: Path) -> None:
    with_pair(tmp_path / "runs")
    put(OPTIMUM, tmp_path / "runs")
    for record in board():
        Store(tmp_path / "runs").put(record)
    written = build.build(tmp_path / "runs", tmp_path / "board", figures=False)
    assert "imported from lm-eval 0.4.13" in (tmp_path / "board" / "table.md").read_text()
    shown = json.loads((tmp_path / "board" / "table.json").read_text())
    assert {row["imported"] for row in shown} == {None, "lm-eval 0.4.13", "optimum-benchmark 0.5.0"}
    stored = Store(tmp_path / "runs").scan()[0]
    assert len(tracking.runs(stored)) == len(shown)
    assert "rtn-3bit" not in outcomes_by_method(stored)
    drawn = audit.draw(tmp_path / "runs", len(stored), 0, list(Stage))
    assert len(drawn) == sum(r.status is Status.OK and r.imported is None for r in stored)
    assert all(isinstance(audit.plan(record), audit.Verdict) for record in drawn)
    assert any("imported from optimum-benchmark" in path.read_text() for path in written if path.suffix == ".html")


def test_texts_and_paths_of_a_file_stay_out_of_the_record(tmp_path: Path) -> None:
    source = tmp_path / "in" / results_file(DENSE).name
    source.parent.mkdir()
    data = json.loads(results_file(DENSE).read_text())
    data["config"]["model_args"] = {"pretrained": "/home/someone/secret place/my-model", "token": "hf_secret", "load_in_4bit": True}
    source.write_text(json.dumps(data))
    samples = next(DENSE.glob("samples_sums_*"))
    lines = [
        json.loads(line) | {"doc": {"q": "TEXT OF THE BENCHMARK"}, "resps": ["AN ANSWER"]} for line in samples.read_text().splitlines()
    ]
    source.with_name(samples.name).write_text("\n".join(map(json.dumps, lines)))
    (report,) = put(source, tmp_path / "runs")
    assert report.record and report.record.cell.model == "my-model" and report.record.cell.pipeline == "load_in_4bit"
    assert report.record.cell.family == "imported" and report.record.cell.reference != report.record.cell.keys
    content = b"".join(files(tmp_path / "runs").values())
    for word in (b"someone", b"hf_secret", b"TEXT OF", b"AN ANSWER", str(tmp_path).encode()):
        assert word not in content


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a results folder of lm-eval with its results changed."""
    shutil.copytree(folder, to)
    data = json.loads(results_file(folder).read_text())
    change(data)
    results_file(to).write_text(json.dumps(data))
    return to


@pytest.mark.parametrize(
    "change",
    [
        {"gen_kwargs": {"temperature": 0.9, "do_sample": True}},
        {"gen_kwargs": "temperature=0.9"},
        {"fewshot_seed": 7},
        {"model_args": {"pretrained": "tiny-llama", "dtype": "float32", "max_length": 128}},
        {"model_dtype": "torch.bfloat16"},
        {"model_args": "pretrained=tiny-llama,dtype=float32,revision=step1000"},
    ],
    ids=["sampled", "sampled as text", "few-shot seed", "length", "dtype", "revision"],
)
def test_another_evaluation_is_no_other_result_of_the_same_cell(change: dict[str, Any], tmp_path: Path) -> None:
    with_pair(tmp_path / "runs")
    other = changed(DENSE, tmp_path / "other", lambda data: data["config"].update(change))
    (report,) = put(other, tmp_path / "runs")
    assert report.outcome is Outcome.IMPORTED and report.record
    found = rows(Store(tmp_path / "runs").scan()[0])
    assert len({(*row.table_key, row.label, row.engine_label) for row in found}) == 3
    put(DENSE, tmp_path / "alone")
    rtn = changed(RTN, tmp_path / "rtn", lambda data: data["config"].update(change))
    put(rtn, tmp_path / "alone", None if "revision" in str(change) else "tiny-llama", "rtn-3bit")
    assert [row.accuracy_delta for row in rows(Store(tmp_path / "alone").scan()[0])] == [None, None], "it has no reference"


def test_two_compressed_models_are_told_apart_by_what_their_arguments_name(tmp_path: Path) -> None:
    pipelines = []
    for number, more in enumerate(
        ("gguf_file=/home/me/q8_0.gguf", "gguf_file=q4_0.gguf", "load_in_4bit=True,bnb_4bit_quant_type=nf4", "load_in_4bit=True")
    ):
        source = changed(DENSE, tmp_path / str(number), lambda data: data["config"].update(model_args=f"pretrained=tiny-llama,{more}"))  # noqa: B023
        (report,) = put(source, tmp_path / "runs")
        assert report.outcome is Outcome.IMPORTED and report.record
        pipelines.append(report.record.cell.pipeline)
    assert pipelines == ["gguf_file(q8_0.gguf)", "gguf_file(q4_0.gguf)", "load_in_4bit(bnb_4bit_quant_type=nf4)", "load_in_4bit"]


@pytest.mark.parametrize(
    "name", ["/home/me/model", "file:///home/me/model", "FILE:/home/me/model", "s3://me/model", "C:\\me\\model", "~/model/"]
)
def test_of_a_path_the_last_part_is_shown(name: str) -> None:
    assert public_name(name) == "model" and public_name("org/model-1.5") == "org/model-1.5"


def test_items_that_do_not_add_up_are_left_out(tmp_path: Path) -> None:
    (report,) = put(changed(DENSE, tmp_path / "in", lambda data: data["results"]["sums"].update({"acc_norm,none": 0.9})), tmp_path / "runs")
    assert report.record and report.record.quality
    tasks = {task.task: task for task in report.record.quality.zeroshot}
    assert tasks["sums"].accuracy == 0.9 and not tasks["sums"].items and tasks["parity"].items
    assert "sums: items left out, they do not add up to its acc_norm" in report.record.quality.flags
    (row,) = rows(Store(tmp_path / "runs").scan()[0])
    assert row.accuracy == pytest.approx((0.9 + tasks["parity"].accuracy) / 2) and row.accuracy_rank is None


def test_a_figure_that_is_no_number_is_left_out_with_a_flag(tmp_path: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["results"]["sums"]["acc_norm,none"] = math.nan
        data["results"]["odd"] = {"bleu,none": 3.0}

    (report,) = put(changed(DENSE, tmp_path / "in", spoil), tmp_path / "runs")
    assert report.record and report.record.quality and [task.task for task in report.record.quality.zeroshot] == ["parity"]
    assert "odd: left out, it has no accuracy" in report.record.quality.flags
    assert any(flag.startswith("sums: left out") for flag in report.record.quality.flags)


TIMES = b'"prefill": {"latency": {"values": [1]}}, "decode": {"latency": {"values": [1]}}'
HOSTILE = {
    "empty.json": b"",
    "list.json": b"[1, 2]",
    "deep.json": b"[" * 100_000,
    "binary.json": bytes(range(256)),
    "strange.json": b'{"results": {}, "versions": {}}',
    "nothing.json": b'{"results": {"a": {"bleu,none": 1}}, "versions": []}',
    "wrong.json": b'{"results": {"a": {"acc,none": "x"}, "b": 3}, "n-shot": 7, "versions": 1, "config": []}',
    "unnamed.json": b'{"results": {"a": {"acc,none": 0.5}}, "versions": {}}',
    "forward.json": b'{"forward": {"latency": {"unit": "s", "values": [1.0]}}}',
    "alone.json": b"{" + TIMES + b"}",
    "zero.json": b'{"config": {}, "report": {"prefill": {"latency": {"values": [0]}}, "decode": {"latency": {"values": [1]}}}}',
    "shapes.json": b'{"config": {"scenario": 1}, "report": {' + TIMES + b"}}",
    "broken.parquet": b"PAR1 and nothing else",
    "other.txt": b"hello",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    (report,) = put(tmp_path / name, tmp_path / "runs")
    assert report.outcome is Outcome.UNREADABLE and report.reason and "\n" not in report.line
    assert not (tmp_path / "runs").exists()


def test_hostile_records_in_parquet_cannot_leave_the_folder(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = records(Spec())[0]
    escape = good.model_copy(deep=True)
    escape.key = escape.cell.keys.compress = "../../../../escaped"
    stray = good.model_copy(update={"key": "of-another-cell"})
    texts = [dump(good).decode(), dump(escape).decode(), dump(stray).decode(), "{", None, '{"schema_version": 99}']
    pq.write_table(pa.table({"record": texts}), tmp_path / "x.parquet")
    reports = put(tmp_path / "x.parquet", tmp_path / "a" / "b" / "runs")
    assert outcomes(reports) == [Outcome.IMPORTED, Outcome.IMPORTED, *[Outcome.UNREADABLE] * 4]
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "runs") for path in tmp_path.rglob("*.json"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "y.parquet")
    (report,) = put(tmp_path / "y.parquet", tmp_path / "runs")
    assert report.outcome is Outcome.UNREADABLE and "no column 'record'" in report.reason


def test_what_slimbench_measured_must_have_evidence() -> None:
    quality = next(record for record in records(Spec()) if record.stage is Stage.QUALITY)
    data = quality.model_dump()
    del data["quality"]["evidence"]
    with pytest.raises(ValueError, match="no evidence, and the record is not imported"):
        Record.model_validate(data)


def slimbench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*SLIMBENCH, "records", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_commands(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (tmp_path / "bad.json").write_text("{")
    done = slimbench("import", DENSE, tmp_path / "bad.json", "--results", root)
    assert done.returncode == 1 and not done.stderr
    first, second, summary = done.stdout.splitlines()
    assert first.startswith("imported: tiny-llama · dense · quality: ") and second.startswith("could not be read: ")
    assert summary == "1 imported, 1 could not be read"
    assert slimbench("import", DENSE, "--results", root).returncode == 0
    done = slimbench("export", "--results", root, "--to", tmp_path / "x.parquet")
    assert done.returncode == 0 and (tmp_path / "x.parquet").is_file()
    assert slimbench("export", "--results", root, "--to", tmp_path / "x.csv").returncode == 0 and (tmp_path / "x.csv").is_file()
    assert slimbench("export", "--results", root, "--to", tmp_path / "set").returncode == 0 and (tmp_path / "set" / "README.md").is_file()
    for wrong in (
        ("import", DENSE, "--results", root, "--format", "lm-evl"),
        ("import", tmp_path / "x.parquet", "--results", root, "--format", "parquet", "--model", "a"),
        ("export", "--results", root, "--to", tmp_path / "x.xlsx"),
        ("export", "--results", root, "--to", tmp_path / "set", "--format", "parquet"),
        ("export", "--results", tmp_path / "none", "--to", tmp_path / "set"),
        ("export", "--results", root, "--to", tmp_path / "set", "--license", "a: b"),
    ):
        done = slimbench(*wrong)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, wrong

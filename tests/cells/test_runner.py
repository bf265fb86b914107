"""Stages in real child processes: whatever happens to them, there is exactly one record, and the next run goes on."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slimbench.harness.config import environments
from slimbench.harness.config.environments import Environment
from slimbench.harness.run import provenance
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.ledger import is_stale
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.store import artefact
from slimbench.util.files import cache_dir
from tests.support import losing
from tests.support.running import Listener, cell, run

BAD = "tests.support.misbehaving.Misbehaving"
INVENTORY = "tests.support.modules.Inventory"


def bad(overrides: list[str], how: str, *more: str) -> Cell:
    return cell(overrides, "~method.dense", f"+method.bad._target_={BAD}", f"+method.bad.how={how}", *more)


def test_a_cell_leaves_three_good_records_for_itself_and_its_reference(runner: Runner, overrides: list[str]) -> None:
    records = run(runner, cell(overrides, "method=rtn-4bit"))
    assert [(r.stage, r.status) for r in records] == [(stage, Status.OK) for stage in Stage]
    found = {(r.cell.pipeline, r.stage): r for r in runner.store.scan()[0]}
    assert len(found) == 6
    quality, dense = found["rtn-4bit", Stage.QUALITY].quality, found["dense", Stage.QUALITY].quality
    assert quality is not None
    assert dense is not None
    assert len(quality.perplexity[0].window_nll) == 6
    assert quality.evidence.effective_bits < dense.evidence.effective_bits / 4
    speed = found["rtn-4bit", Stage.SPEED].speed
    assert speed is not None
    assert speed.points[0].reference is not None
    assert len(speed.points[0].candidate.decode_ms) == len(speed.points[0].reference.decode_ms)
    itself = found["dense", Stage.SPEED].speed.points[0]  # type: ignore[union-attr]
    assert len(itself.reference.decode_ms) == len(itself.candidate.decode_ms), "the reference is measured against itself"
    assert speed.memory.kv_cache_bytes and speed.copy_bandwidth_gbs > 0 and speed.points[0].first_call_ms
    compress = found["rtn-4bit", Stage.COMPRESS]
    assert compress.compress is not None
    assert compress.compress.disk_bytes == sum(
        p.stat().st_size for p in artefact.location(compress.key).iterdir() if p.name != "artefact.json"
    )
    assert compress.provenance["packages"]["torch"]
    assert compress.command.startswith("slimbench run ")
    assert str(runner.store.root) not in compress.model_dump_json() and "results" not in compress.config


def test_what_is_recorded_is_not_run_again_unless_asked(runner: Runner, overrides: list[str]) -> None:
    run(runner, cell(overrides))
    first = runner.store.scan()[0]
    runner.listener = again = Listener()
    run(runner, cell(overrides))
    assert not again.ran and not again.reused
    assert runner.store.scan()[0] == first
    runner.listener = forced = Listener()
    run(runner, cell(overrides, "on_existing=stale"))
    assert not forced.ran
    run(runner, cell(overrides, "on_existing=all"))
    assert len(forced.ran) == 3


def test_quality_is_the_same_number_each_time(runner: Runner, overrides: list[str]) -> None:
    once = run(runner, cell(overrides, "method=rtn-4bit"))[1].quality
    twice = run(runner, cell(overrides, "method=rtn-4bit", "on_existing=all"))[1].quality
    assert once is not None
    assert twice is not None
    assert once.perplexity[0].window_nll == twice.perplexity[0].window_nll


@pytest.mark.parametrize(
    ("how", "more", "status", "message"),
    [
        ("raise", (), Status.FAILED, "library"),
        ("exit", (), Status.FAILED, "exit code 3"),
        ("abort", (), Status.FAILED, "SIGABRT"),
        ("unsupported", (), Status.UNSUPPORTED, "not on this machine"),
        ("hang", ("limits.wall_s=5",), Status.TIMEOUT, "limits.wall_s"),
        ("share", ("limits.memory_gb=1.6",), Status.FAILED, "library"),
        ("allocate", ("limits.memory_gb=1.5",), Status.OOM, "exceeded the limit of 1.5 GB"),
    ],
)
def test_each_way_to_fail_is_one_record_and_leaves_no_half_artefact(
    runner: Runner, overrides: list[str], how: str, more: tuple[str, ...], status: Status, message: str
) -> None:
    this = bad(overrides, how, *more)
    (record,) = run(runner, this)
    assert record.status is status
    assert record.failure is not None
    assert message in record.failure.message
    assert record.phase == "compress bad"
    assert record.peak_memory_bytes
    assert not artefact.exists(this.identity.keys.compress)
    assert run(runner, this)[0].started == record.started, "a failure stays recorded until asked for"


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("full", Status.TRANSIENT, Reason.DISK),
        ("quota", Status.TRANSIENT, Reason.DISK),
        ("broken", Status.TRANSIENT, Reason.DISK),
        ("stale", Status.TRANSIENT, Reason.DISK),
        ("safetensors", Status.TRANSIENT, Reason.DISK),
        ("handles", Status.TRANSIENT, Reason.MACHINE),
        ("nobody", Status.TRANSIENT, Reason.NETWORK),
        ("busy", Status.TRANSIENT, Reason.HUB),
        ("offline", Status.TRANSIENT, Reason.HUB),
        ("card", Status.TRANSIENT, Reason.CARD),
        ("card memory", Status.OOM, None),
        ("missing", Status.FAILED, None),
        ("not found", Status.FAILED, None),
    ],
)
def test_what_the_machine_did_is_told_from_what_the_method_did(
    runner: Runner, overrides: list[str], how: str, status: Status, reason: Reason | None
) -> None:
    (record,) = run(runner, bad(overrides, f"'{how}'", "stages=[]"))
    assert record.failure and (record.status, record.failure.reason) == (status, reason), record.failure


def test_a_killed_worker_is_recorded_and_run_again_by_the_same_command(runner: Runner, overrides: list[str]) -> None:
    this = bad(overrides, "kill")
    (record,) = run(runner, this)
    assert record.failure is not None
    assert (record.status, record.failure.type, record.failure.reason) == (Status.TRANSIENT, "SIGKILL", Reason.INTERRUPTED)
    runner.listener = listener = Listener()
    run(runner, this)
    assert ("bad", Stage.COMPRESS) in listener.ran
    (again,) = run(runner, this)
    assert len(again.attempts) == 2 and again.attempts[0].started == record.started
    assert again.wall_seconds > sum(attempt.seconds for attempt in again.attempts) > record.wall_seconds


def test_an_artefact_that_cannot_be_loaded_is_a_failed_record_of_the_stage_that_tried(runner: Runner, overrides: list[str]) -> None:
    records = run(runner, bad(overrides, "nothing"))
    assert [(r.stage, r.status) for r in records] == [
        (Stage.COMPRESS, Status.OK),
        (Stage.QUALITY, Status.FAILED),
        (Stage.SPEED, Status.FAILED),
    ]


def test_an_artefact_lost_from_the_cache_is_made_again(runner: Runner, overrides: list[str]) -> None:
    this = cell(overrides, "method=rtn-8bit")
    run(runner, this)
    artefact.discard(this.identity.keys.compress)
    runner.store.path(this.identity, Stage.QUALITY, this.hardware(Stage.QUALITY)).unlink()
    records = run(runner, this)
    assert [r.status for r in records] == [Status.OK] * 3
    assert artefact.exists(this.identity.keys.compress)


@pytest.mark.parametrize("loss", [losing.REMOVE, losing.CUT])
def test_an_artefact_that_is_lost_under_a_stage_is_no_fact_and_is_made_again(runner: Runner, overrides: list[str], loss: str) -> None:
    this = cell(overrides, "method=rtn-8bit", "seed=4711", "engine._target_=tests.support.losing.LosingEngine", "stages=[quality]")
    runner.attempt(this.reference(), Stage.COMPRESS)
    runner.attempt(this, Stage.COMPRESS)
    (cache_dir() / loss).touch()
    record = runner.attempt(replace(this, config=this.config.model_copy(update={"on_existing": "all"})), Stage.QUALITY)
    assert record and record.failure and (record.status, record.failure.reason) == (Status.TRANSIENT, Reason.DISK), record
    again = runner.attempt(this, Stage.QUALITY)
    assert again and again.status is Status.OK and [attempt.reason for attempt in again.attempts] == [Reason.DISK]


def test_cuda_without_a_card_and_a_model_too_large_are_unsupported(runner: Runner, overrides: list[str]) -> None:
    for more, message in ((["device=cuda"], "no CUDA card"), (["model.parameters=900000000000"], "weights 3600 GB")):
        records = run(runner, cell([o for o in overrides if o != "device=cpu"], *more))
        assert records and all(record.status is Status.UNSUPPORTED for record in records)
        assert all(record.failure and message in record.failure.message for record in records)


def test_random_weights_are_measured_for_speed_only(runner: Runner, overrides: list[str]) -> None:
    shape = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 256}"
    mine = [o for o in overrides if not o.startswith("model")]
    records = run(runner, cell(mine, "model=custom", "model.name=r", "model.source=random", f"+model.shape={shape}"))
    assert [r.stage for r in records] == [Stage.COMPRESS, Stage.SPEED]
    assert all(r.status is Status.OK for r in records)


def test_a_worker_knows_slimbench_by_one_name(runner: Runner, overrides: list[str]) -> None:
    """The folders at the top lie on its path, as those of another project may."""
    compress, quality = run(runner, cell(overrides, "~method.dense", f"+method.inventory._target_={INVENTORY}", "stages=[quality]"))
    assert quality.status is Status.OK
    assert compress.compress and compress.compress.claim.details == {"second_names": [], "stages": True}


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_record_tells_the_process_that_ran_it_and_no_folder_of_its_owner(
    runner: Runner, overrides: list[str], tiny: Path, text: Path, how: str
) -> None:
    results = f"results={runner.store.root}"
    (failed,) = run(runner, bad(overrides, how, results))
    if how == "raise":
        assert failed.failure and failed.failure.traceback and failed.failure.stderr_tail
        assert failed.failure.message.endswith(f"failed on …/{tiny.name}") and f"failed on …/{tiny.name}" in failed.failure.traceback
        assert f"reading …/{tiny.name}" in failed.failure.stderr_tail
    (compress, *_) = run(runner, cell(overrides, "method=dense", "stages=[quality]", results))
    for record in (failed, compress):
        facts = record.provenance
        assert facts["packages"]["torch"] and facts["variables"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
        assert facts["variables"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID", "set for the worker alone"
        assert facts["hardware"] and facts["threads"] == 1 and "environment" not in facts
        written = record.model_dump_json()
        assert not [folder for folder in (tiny.parent, text.parent, runner.store.root, Path.home()) if str(folder) in written]
        assert "results" not in record.config and "results=" not in record.command
        assert record.config["model"]["source"] == f"file:{tiny.name}" and f"model.source=file:{tiny.name}" in record.command


def test_a_stage_in_an_environment_of_its_own_tells_that_one(
    runner: Runner, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packages, those that a requirement brought along too, beside the variables; and staleness is judged by them."""
    own = Environment("own", "", ["asked-for==0.1"], overlay=True)
    monkeypatch.setattr(environments, "catalogue", lambda: {own.name: own})
    packages = own.folder / "lib" / "python3" / "site-packages"
    install(packages, "brought-along", "0.2")
    own.python.parent.mkdir()
    own.python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    own.python.chmod(0o755)
    (own.folder / ".ready").touch()
    this = cell(overrides, "engine.environment=own", "stages=[quality]")
    compress, quality = run(runner, this)
    assert quality.status is Status.OK, quality.failure
    facts = quality.provenance
    assert facts["environment"] == {"name": "own", "requirements": ["asked-for==0.1"]}
    assert facts["variables"]["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert facts["packages"]["brought-along"] == "0.2" and "brought-along" not in compress.provenance["packages"]
    assert not is_stale(quality) and not is_stale(compress)
    install(packages, "torch", "0.0.1")
    provenance._versions.cache_clear()
    assert is_stale(quality) and not is_stale(compress)


def install(packages: Path, name: str, version: str) -> None:
    """What pip leaves of a distribution without files."""
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_longer_pipeline_goes_on_from_the_artefact_of_a_shorter_one(runner: Runner, overrides: list[str]) -> None:
    seed, stages = "seed=77", "stages=[quality]"
    run(runner, cell(overrides, "method=magnitude", seed, stages))
    (compress, *_) = run(runner, cell(overrides, "method=[magnitude,rtn-4bit]", seed, stages))
    assert compress.compress and compress.compress.reused_steps == ["magnitude"]
    assert list(compress.compress.step_seconds) == ["magnitude", "rtn-4bit"] and compress.compress.claim.sparsity == pytest.approx(
        0.5, abs=1e-3
    )

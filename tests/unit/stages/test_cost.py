"""What a compression costs, and on what it was calibrated."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.measure.cost import Cost
from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import compress
from slimbench.harness.store import artefact
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records
from tests.unit.measure.test_lies import Silent


def test_waiting_costs_no_processor_time() -> None:
    cost = Cost("cpu")
    time.sleep(0.2)
    spent = cost.read()
    assert spent["seconds"] >= 0.2
    assert spent["cpu_seconds"] < 0.1
    assert (spent["device_seconds"], spent["peak_device_bytes"]) == (None, None)


def test_children_count() -> None:
    cost = Cost("cpu")
    subprocess.run([sys.executable, "-P", "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert cost.read()["cpu_seconds"] >= 0.25


def test_a_compression_beside_other_load_is_flagged(overrides: list[str]) -> None:
    stranger = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    ended = subprocess.run(
        ["sh", "-c", 'nice -n 5 "$0" -S -c "$1" >/dev/null 2>&1 & echo $!', sys.executable, stranger], capture_output=True, check=True
    )
    try:
        result = compress.run(resolve([*overrides, "method=gptq", "calibration_samples=8"]), uuid.uuid4().hex, Silent())
    finally:
        os.kill(int(ended.stdout), signal.SIGKILL)
    assert result.load["other_cores"] > 0.25
    assert any(flag.startswith("other load: ") and flag.endswith(" (compression)") for flag in result.flags)


def test_a_compression_that_went_on_from_a_checkpoint_is_flagged(overrides: list[str]) -> None:
    config, key = resolve([*overrides, "method=rtn-4bit"]), uuid.uuid4().hex
    artefact.checkpoints(key, 0).mkdir(parents=True)
    assert "rtn-4bit went on from a checkpoint: its times are those since the interruption" in compress.run(config, key, Silent()).flags
    assert not any("checkpoint" in flag for flag in compress.run(config, uuid.uuid4().hex, Silent()).flags)


@pytest.fixture(scope="module")
def made(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, CompressResult]:
    """Key, calibration text and result of a calibrated compression."""
    file = tmp_path_factory.mktemp("calibration") / "calibration.txt"
    file.write_text(" ".join(f"Sentence {i} of the calibration text." for i in range(40)))
    more = ["~method.dense", "+method.step._target_=tests.support.lying.Calibrated", f"calibration=file:{file}"]
    config = resolve([*overrides, *more, "calibration_samples=6", "calibration_length=32", "calibration_seed=5"])
    key = uuid.uuid4().hex
    return key, file, compress.run(config, key, Silent())


def test_calibration_is_recorded_by_content(made: tuple[str, Path, CompressResult]) -> None:
    _, file, result = made
    facts = result.calibration
    assert facts is not None
    assert (facts.source, facts.samples, facts.length, facts.seed) == ("file:calibration.txt", 6, 32, 5)
    assert facts.text_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    seen = [token for window in result.claim.details["ids"] for token in window]
    assert facts.tokens_sha256 == hashlib.sha256(struct.pack(f"<{6 * 32}q", *seen)).hexdigest()
    assert (result.calibration_tokens, result.training_tokens, result.trained_parameters, result.tuning_free) == (6 * 32, 0, 0, True)


def test_each_file_is_recorded_with_its_hash(made: tuple[str, Path, CompressResult]) -> None:
    key, _, result = made
    folder = artefact.location(key)
    assert {file.name for file in result.files} == {"config.json", "generation_config.json", "model.safetensors"}
    for file in result.files:
        content = (folder / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert result.disk_bytes == artefact.disk_bytes(folder) == sum(file.bytes for file in result.files)


def test_time_is_recorded(made: tuple[str, Path, CompressResult]) -> None:
    result = made[2]
    assert result.cpu_seconds is not None
    assert 0 < result.step_seconds["step"] <= result.seconds
    assert result.cpu_seconds > 0
    assert (result.device_seconds, result.peak_device_bytes) == (None, None)


def test_rows_show_the_cost() -> None:
    found = records(Spec("lora"))
    result = next(record.compress for record in found if record.stage is Stage.COMPRESS)
    assert result is not None
    result.cpu_seconds, result.device_seconds, result.peak_device_bytes = 140.0, 1800.0, 5_000_000_000
    result.training_tokens, result.trained_parameters, result.tuning_free, result.calibration_tokens = 10_000, 4096, False, 65_536
    (row,) = (row for row in rows(found) if row.pipeline == "lora")
    assert (row.compress_cpu_seconds, row.compress_device_hours, row.peak_device_bytes) == (140.0, 0.5, 5_000_000_000)
    assert (row.training_tokens, row.trained_parameters, row.tuning_free, row.calibration_tokens) == (10_000, 4096, False, 65_536)
    assert row.peak_memory_bytes == 1_234_567_890


def test_rows_of_older_records_leave_open_what_was_not_measured() -> None:
    (row,) = rows(records(Spec("gptq")))
    assert (row.compress_cpu_seconds, row.compress_device_hours, row.peak_device_bytes) == (None, None, None)
    assert row.tuning_free is True

"""What a row joins belongs together, or the row says that it does not."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.compress import ArtefactFile, content
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.flags.joined import mixed
from slimbench.leaderboard.flags.kinds import Figure, Kind, invalidating, kind
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import HARDWARE, PROVENANCE, board

OTHER = "0" * 64


def of(made: list[Record], stage: Stage, pipeline: str = "gptq") -> Record:
    return next(record for record in made if record.cell.pipeline == pipeline and record.stage is stage)


def told(made: list[Record], pipeline: str = "gptq") -> list[str]:
    return mixed(next(row for row in rows(made) if row.pipeline == pipeline).flags)


@pytest.fixture
def made() -> list[Record]:
    """A board whose records know the bytes that they measured."""
    found = board()
    for record in found:
        if record.compress:
            record.compress.files = [
                ArtefactFile(name="model.safetensors", bytes=1, sha256=hashlib.sha256(record.key.encode()).hexdigest())
            ]
    written = {record.key: record.compress.artefact for record in found if record.compress}
    for record in found:
        result = record.quality or record.speed
        if result and result.evidence:
            result.evidence.artefact = written[record.cell.keys.compress]
    return found


def test_the_identity_of_bytes_is_what_sha256sum_says(tmp_path: Path) -> None:
    for name in ("b.json", "a.safetensors"):
        (tmp_path / name).write_text(name)
    sums = subprocess.run("sha256sum a.safetensors b.json", shell=True, cwd=tmp_path, capture_output=True, check=True).stdout
    files = [ArtefactFile(name=name, bytes=6, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in ("b.json", "a.safetensors")]
    assert content(files) == content(files[::-1]) == hashlib.sha256(sums).hexdigest()
    assert content([]) is None and content([*files, ArtefactFile(name="c", bytes=1)]) is None


def test_rows_of_one_artefact_machine_and_code_say_nothing(made: list[Record]) -> None:
    assert not [flag for row in rows(made) for flag in mixed(row.flags)]


@pytest.mark.parametrize("stage", [Stage.QUALITY, Stage.SPEED])
def test_a_row_of_other_bytes_than_its_compression_says_so(made: list[Record], stage: Stage) -> None:
    record = of(made, stage)
    result = record.quality or record.speed
    assert result and result.evidence
    result.evidence.artefact = OTHER
    (flag,) = told(made)
    assert flag.startswith(f"{stage} of other bytes than the compression (00000000, not ") and not told(made, "rtn")
    taken = {figure for figure in Figure if invalidating([flag], [figure])}
    assert taken == ({Figure.QUALITY} if stage is Stage.QUALITY else {Figure.DECODE, Figure.PREFILL, Figure.MEMORY})


def test_a_speed_that_is_older_than_the_artefact_says_so_unless_it_knows_its_bytes(made: list[Record]) -> None:
    record = of(made, Stage.SPEED)
    record.started = "2000-01-01T00:00:00+00:00"
    assert not told(made)
    assert record.speed and record.speed.evidence
    record.speed.evidence.artefact = None
    assert told(made) == ["speed is older than the artefact, and does not say of which bytes it is"]
    assert kind(told(made)[0]) is Kind.NOTE


def test_a_quality_of_another_machine_says_so(made: list[Record]) -> None:
    record = of(made, Stage.QUALITY)
    record.hardware = HardwareIdentity(fingerprint="0badcafe", label="Another CPU · 4 threads · 8 GB")
    assert record.quality and record.quality.evidence
    for loaded in (None, OTHER):
        record.quality.evidence.artefact = loaded
        mine = next(row for row in rows(made) if row.pipeline == "gptq" and row.decode_tokens_per_s)
        assert "quality measured on Another CPU · 4 threads · 8 GB" in mixed(mine.flags)
        assert invalidating(mine.flags, [Figure.QUALITY]) and not invalidating(mine.flags, [Figure.DECODE, Figure.COST])


def test_a_quality_of_the_same_bytes_is_no_less_for_having_been_measured_elsewhere(made: list[Record]) -> None:
    of(made, Stage.QUALITY).hardware = HardwareIdentity(fingerprint="0badcafe", label="Another CPU · 4 threads · 8 GB")
    mine = next(row for row in rows(made) if row.pipeline == "gptq" and row.decode_tokens_per_s)
    assert "of the same bytes: quality from Another CPU · 4 threads · 8 GB" in mine.flags
    assert not mixed(mine.flags) and not invalidating(mine.flags, [Figure.QUALITY])


def test_processors_of_one_name_with_other_instructions_are_two_machines(made: list[Record]) -> None:
    """Their kernels round otherwise, and take other times."""
    record = of(made, Stage.QUALITY)

    def flags(instructions: Any) -> list[str]:
        record.provenance = PROVENANCE | {"hardware": HARDWARE | {"cpu_flags": instructions}}
        return next(row for row in rows(made) if row.pipeline == "gptq" and row.decode_tokens_per_s).flags

    own, amx = record.hardware.label, ["amx_tile", "amx_int8", "amx_fp16", "amx_bf16"]
    assert f"of the same bytes: quality from another {own} (with amx_bf16, amx_fp16, amx_int8 and 1 more)" in flags([*amx, "avx2", "fma"])
    assert record.quality and record.quality.evidence
    record.quality.evidence.artefact = OTHER
    assert f"quality measured on another {own} (with sse2, without fma)" in mixed(flags(["avx2", "sse2"]))
    for same in (["fma", "avx2"], [], None):
        assert not any("another" in flag for flag in flags(same))


def test_a_row_of_older_code_than_its_table_says_so_and_one_of_its_own_method_does_not(made: list[Record]) -> None:
    for number, record in enumerate(made):
        record.started = f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}+00:00"
        record.code = {"engine transformers": "new", f"method {record.cell.pipeline}": record.cell.pipeline}
    of(made, Stage.SPEED).code["engine transformers"] = "old"
    assert told(made) == ["speed: engine transformers of other code than in the newest row of the table"]
    assert kind(told(made)[0]) is Kind.NOTE
    assert not told(made, "rtn")

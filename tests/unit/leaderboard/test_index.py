"""Which records make a row: its own hardware's first, and never the speed or the reference of another machine."""

from __future__ import annotations

from slimbench.harness.schema.compress import ArtefactFile, content
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records

GPTQ = Spec("gptq", "quantization", loss=1.2, bits=4.25)
OTHER = HardwareIdentity(fingerprint="0badcafe", label="Example CPU 9000 · 2 threads · 8 GB")
"""Called as the machine of the other records is: only its fingerprint tells them apart."""


def moved(made: list[Record], *stages: Stage) -> list[Record]:
    """The records with those of some stages on the other machine."""
    return [r.model_copy(update={"hardware": OTHER}) if r.stage in stages else r for r in made]


def test_a_reference_of_another_machine_is_none() -> None:
    (dense, same) = rows([*records(Spec()), *records(GPTQ)])
    assert dense.is_reference and same.perplexity_delta_percent and same.accuracy_delta is not None
    board = rows([*moved(records(Spec()), *Stage), *records(GPTQ)])
    (alone,) = [row for row in board if not row.is_reference]
    assert alone.perplexity == same.perplexity and alone.perplexity_delta_percent is None and alone.accuracy_delta is None
    assert alone.speedup == same.speedup, "it was paired in one process"
    quality = next(r for r in records(GPTQ) if r.stage is Stage.QUALITY)
    assert Index(oldest_first([*moved(records(Spec()), *Stage), *records(GPTQ)])).reference(quality) is None


def test_results_from_before_hardware_was_told_apart_keep_the_reference_that_they_had() -> None:
    made = [r.model_copy(update={"cell": r.cell.model_copy(update={"former_keys": [r.cell.keys]})}) for r in records(GPTQ)]
    board = rows([*moved(records(Spec()), *Stage), *made])
    assert [row.perplexity_delta_percent is not None for row in board if not row.is_reference] == [True]
    index = Index(oldest_first([*moved(records(Spec()), *Stage), *made]))
    assert index.reference(next(r for r in made if r.stage is Stage.SPEED)) is None, "speed never had one of another machine"


def test_a_cell_has_a_row_for_each_machine_and_each_shows_its_own_speed() -> None:
    there = moved([r.model_copy(deep=True) for r in records(GPTQ) if r.stage is Stage.SPEED], Stage.SPEED)
    for record in there:
        assert record.speed
        record.speed.points[0].candidate.decode_ms = [10 * ms for ms in record.speed.points[0].candidate.decode_ms]
    first, second = sorted(rows([*records(GPTQ), *there]), key=lambda row: row.decode_tokens_per_s or 0, reverse=True)
    assert first.decode_tokens_per_s and second.decode_tokens_per_s
    assert round(first.decode_tokens_per_s / second.decode_tokens_per_s) == 10 and second.fingerprint == OTHER.fingerprint
    assert first.keys == second.keys and first.place != second.place and first.table_key != second.table_key
    assert second.perplexity == first.perplexity, "the quality of the other machine serves"


def test_a_row_without_speed_does_not_borrow_any() -> None:
    (row,) = [r for r in rows(moved(records(GPTQ), Stage.QUALITY, Stage.COMPRESS)) if r.fingerprint == OTHER.fingerprint]
    assert row.decode_tokens_per_s is None and row.status == "incomplete" and "speed" in (row.reason or "")


def test_a_processor_that_compresses_for_a_card_has_no_row() -> None:
    made = moved(records(Spec("gptq", "quantization", device="cuda")), Stage.COMPRESS)
    for record in made:
        record.config["device"] = {"name": "cuda", "index": 0, "compress": "cpu"}
    (row,) = rows(made)
    assert row.fingerprint != OTHER.fingerprint and row.compress_seconds is not None


def compressed(started: str, artefact: str | None, fingerprint: str) -> Record:
    """A compression of gptq, of some bytes."""
    (made,) = (record.model_copy(deep=True) for record in records(GPTQ) if record.stage is Stage.COMPRESS)
    assert made.compress
    made.compress.files = [ArtefactFile(name="model.safetensors", bytes=1, sha256=artefact)]
    return made.model_copy(update={"started": started, "hardware": HardwareIdentity(fingerprint=fingerprint, label="Example CPU")})


def _content(file: str | None) -> str | None:
    return content([ArtefactFile(name="model.safetensors", bytes=1, sha256=file)])


def scored(started: str, artefact: str | None) -> Record:
    """A quality of gptq on the other machine, of some bytes."""
    (made,) = (record.model_copy(deep=True) for record in records(GPTQ) if record.stage is Stage.QUALITY)
    assert made.quality
    made.quality.evidence = Evidence(
        artefact=_content(artefact), weight_bytes=1, parameters=1, layers=[], effective_bits=4.25, sparsity=0.0
    )
    return made.model_copy(update={"started": started, "hardware": OTHER})


def shown(stage: Stage, *made: Record, fingerprint: str = OTHER.fingerprint) -> tuple[str, str] | None:
    """When and where that was measured which a row of a machine shows of a stage."""
    found = Index(oldest_first(made)).of(stage, made[0].cell.keys, fingerprint)
    return (found.started, found.hardware.fingerprint) if found else None


EARLY, MIDDLE, LATE, LAST = (f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 5))


def test_of_the_compressions_of_other_machines_a_row_shows_that_of_its_own_bytes() -> None:
    made = [compressed(EARLY, "a" * 64, "aaaaaaaa"), compressed(MIDDLE, "b" * 64, "bbbbbbbb"), compressed(LAST, "c" * 64, "cccccccc")]
    for letter, started in (("a", EARLY), ("b", MIDDLE), ("c", LAST)):
        assert shown(Stage.COMPRESS, scored(LATE, letter * 64), *made) == (started, letter * 8)
    (row,) = [row for row in rows([scored(LATE, "a" * 64), *made]) if row.fingerprint == OTHER.fingerprint]
    assert not [flag for flag in row.flags if "other bytes" in flag]


def test_without_known_bytes_it_shows_the_last_compression_before_its_own_results() -> None:
    made = [compressed(EARLY, "a" * 64, "aaaaaaaa"), compressed(MIDDLE, "b" * 64, "bbbbbbbb"), compressed(LAST, "c" * 64, "cccccccc")]
    assert shown(Stage.COMPRESS, scored(LATE, None), *made) == (MIDDLE, "b" * 8)
    assert shown(Stage.COMPRESS, scored(LATE, "d" * 64), *made) == (MIDDLE, "b" * 8), "none is of these bytes"
    after = scored(EARLY, None).model_copy(update={"started": "2025-12-31T00:00:00+00:00"})
    assert shown(Stage.COMPRESS, after, *made) == (EARLY, "a" * 8), "of those after it the first"
    assert shown(Stage.COMPRESS, scored(LATE, None), *made, compressed(LAST, "e" * 64, OTHER.fingerprint)) == (LAST, OTHER.fingerprint)


def test_of_the_qualities_of_other_machines_a_row_shows_that_of_its_own_bytes_or_the_last_before_its_own_results() -> None:
    there = scored(EARLY, "a" * 64).model_copy(update={"hardware": HardwareIdentity(fingerprint="aaaaaaaa", label="Example CPU")})
    for letter, expected in (("a", (EARLY, "aaaaaaaa")), ("b", (LATE, OTHER.fingerprint)), ("c", (EARLY, "aaaaaaaa"))):
        made = [there, scored(LATE, "b" * 64), compressed(MIDDLE, letter * 64, "bbbbbbbb")]
        assert shown(Stage.QUALITY, *made, fingerprint="bbbbbbbb") == expected

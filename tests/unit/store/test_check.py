"""`records check`: each kind of broken record is named, sound ones are not, and what lies in `results/` is sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.cli.records import check as command
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.check import check
from slimbench.harness.store.store import Store
from tests.support.board_records import Spec, board, records
from tests.support.paths import ROOT

GPTQ = Spec("gptq", "quantization", bits=4.25, size=0.426)


def _planted(folder: Path, stage: Stage, plant: Callable[[dict[str, Any]], None]) -> list[str]:
    """What the check says after a record was changed in its file."""
    store = Store(folder)
    paths = {record.stage: store.put(record) for record in records(GPTQ)}
    assert check(store) == (3, [])
    data = json.loads(paths[stage].read_text())
    plant(data)
    paths[stage].write_text(json.dumps(data))
    files, faults = check(store)
    assert files == 3
    return [fault.what for fault in faults]


def _set(value: Any, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def plant(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return plant


def _linear_of_eight_bits(data: dict[str, Any]) -> None:
    layer = {"role": "linear", "parameters": 400_000_000, "bytes": 400_000_000, "bits_per_weight": 8.0}
    data["quality"]["evidence"]["layers"][0].update(layer)


@pytest.mark.parametrize(
    ("stage", "plant", "says"),
    [
        (Stage.QUALITY, _set("other", "cell", "model"), "belongs at other/gptq/quality-"),
        (Stage.QUALITY, _set("0" * 12, "key"), "but its cell says"),
        (Stage.QUALITY, _set(None, "quality"), "ok, but without a result of quality"),
        (Stage.SPEED, _set("oom", "status"), "oom, but without a failure"),
        (Stage.QUALITY, _set(1.5, "quality", "perplexity", 0, "perplexity"), "perplexity 1.5 of wikipedia, but its windows give"),
        (Stage.QUALITY, _set(0.99, "quality", "zeroshot", 0, "accuracy"), "accuracy 0.99 of bb_general_knowledge, but its items give"),
        (Stage.QUALITY, _linear_of_eight_bits, "claims 4.25 bits for 400000000 weights, but its files have only"),
        (Stage.QUALITY, _set(4.0, "quality", "evidence", "layers", 0, "bits_per_weight"), "4 bits a weight of Linear, but 2000 bytes"),
        (Stage.COMPRESS, _set(7, "compress", "disk_bytes"), "disk_bytes 7, but its files have"),
        (Stage.SPEED, _set(1.2, "speed", "points", 0, "roofline", "fraction"), "120% of what the read bandwidth allows"),
        (Stage.SPEED, _set(None, "speed", "evidence", "kernel"), "a speed without the kernel that ran"),
        (Stage.SPEED, lambda data: data["speed"]["points"][0]["reference"]["decode_ms"].pop(), "21 runs, but 20 of the reference"),
        (Stage.SPEED, lambda data: data.pop("stage"), "not a valid record: stage"),
    ],
)
def test_what_a_record_breaks_is_named(stage: Stage, plant: Callable[[dict[str, Any]], None], says: str, tmp_path: Path) -> None:
    assert [what for what in _planted(tmp_path, stage, plant) if says in what]


def test_a_simulated_artefact_may_be_smaller_than_its_bits_and_bad_ends_are_sound(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = [record for record in board() if not record.cell.pipeline.startswith("packed4")]  # it reaches 103 % of its roof
    for record in made:
        store.put(record)
    assert check(store) == (len(made), [])


def test_the_command_lists_and_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    path = Store(tmp_path).put(records(GPTQ)[0])
    with pytest.raises(typer.Exit) as sound:
        command(tmp_path)
    assert sound.value.exit_code == 0 and capsys.readouterr().out == "1 records, all sound\n"
    path.write_text("{")
    with pytest.raises(typer.Exit) as broken:
        command(tmp_path, "json")
    (fault,) = json.loads(capsys.readouterr().out)
    assert broken.value.exit_code == 1 and fault["path"] == path.relative_to(tmp_path).as_posix()
    assert fault["what"].startswith("not a record")


def test_the_records_of_reference_are_sound() -> None:
    files, faults = check(Store(ROOT / "results"))
    assert files > 500 and faults == []

"""What the cache holds, and what of it may go."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.store import artefact, usage
from slimbench.harness.store.store import Store
from slimbench.util import locks
from tests.support.board_records import compress_record
from tests.unit.store.test_artefact import CONTENT, _publish

DAY = 86400


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three artefacts and three models, last used 40, 20 days and an hour ago."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLIMBENCH_CACHE", str(folder))
    for name, age in (("old", 40 * DAY), ("middle", 20 * DAY), ("new", 3600)):
        _publish(name)
        model = folder / "models" / f"{name}-bfloat16-1"
        model.mkdir(parents=True)
        (model / "weights").write_bytes(b"1" * 1000)
        for path in (*artefact.object_of(name).rglob("*"), artefact.object_of(name), model / "weights", model):
            os.utime(path, (time.time() - age,) * 2)
    return folder


def _names(pruned: usage.Pruned) -> set[str]:
    return {f"{item.kind} {item.path.name.partition('-')[0]}" for item in pruned.items}


def test_each_kind_is_measured(fresh: Path) -> None:
    items = {(item.kind, item.path.name): item for item in usage.items() if item.kind != "hashes"}
    assert set(items) == {("artefacts", name) for name in ("old", "middle", "new")} | {
        ("models", f"{name}-bfloat16-1") for name in ("old", "middle", "new")
    }
    manifest = (artefact.object_of("old") / artefact.MANIFEST).stat().st_size
    assert items["artefacts", "old"].bytes == sum(map(len, CONTENT.values())) + manifest and items["artefacts", "old"].files == 4
    assert abs(time.time() - items["models", "middle-bfloat16-1"].used - 20 * DAY) < DAY


def test_a_file_of_two_names_counts_once(fresh: Path) -> None:
    before = sum(item.bytes for item in usage.items())
    os.link(fresh / "models" / "new-bfloat16-1" / "weights", fresh / "models" / "old-bfloat16-1" / "again")
    assert sum(item.bytes for item in usage.items()) == before


def test_what_was_not_used_for_long_goes(fresh: Path) -> None:
    assert _names(usage.prune(30 * DAY, None, dry=True)) == {"artefacts old", "models old"}
    assert artefact.exists("old"), "nothing is removed yet"
    done = usage.prune(30 * DAY, None)
    assert _names(done) == {"artefacts old", "models old"} and done.bytes == sum(item.bytes for item in done.items)
    assert not artefact.exists("old") and artefact.exists("middle") and len(list(artefact.objects().iterdir())) == 2


def test_the_least_recently_used_go_until_the_rest_is_small_enough(fresh: Path) -> None:
    total = sum(item.bytes for item in usage.items())
    assert len(usage.prune(None, total - 1, dry=True).items) == 1
    assert _names(usage.prune(None, 0)) == {"artefacts old", "models old", "artefacts middle", "models middle"}, "a day's use stays"


def test_what_is_opened_locked_staged_or_named_by_kept_records_stays(fresh: Path) -> None:
    record = compress_record()
    named = record.model_copy(update={"cell": record.cell.model_copy(update={"model": "old"})})
    _publish(record.cell.keys.compress)
    os.utime(artefact.object_of(record.cell.keys.compress), (0, 0))
    assert f"artefacts {record.cell.keys.compress}" in _names(usage.prune(DAY, None, dry=True))
    artefact.opened("old")
    with locks.held(fresh / "models" / "middle-bfloat16-1"), artefact.staging("middle"):
        assert _names(usage.prune(2 * DAY, None, [named])) == set()
    assert _names(usage.prune(2 * DAY, None, [named])) == {"artefacts middle", "models middle"}


def test_the_command_says_bytes_and_keeps_what_records_name(fresh: Path, tmp_path: Path) -> None:
    record = compress_record()
    Store(tmp_path / "runs").put(record.model_copy(update={"cell": record.cell.model_copy(update={"model": "old"})}))
    runner = CliRunner()
    told = json.loads(runner.invoke(app, ["cache", "du", "--json"]).stdout)
    assert {kind["kind"]: kind["items"] for kind in told["kinds"]} | {"hashes": 0} == {"models": 3, "artefacts": 3, "hashes": 0}
    assert "models" in runner.invoke(app, ["cache", "du"]).stdout
    dry = runner.invoke(app, ["cache", "prune", "--dry-run", "--keep-results", str(tmp_path / "runs")])
    assert dry.exit_code == 0 and "would go" in dry.stdout and "models" not in dry.stdout and artefact.exists("old")
    done = runner.invoke(app, ["cache", "prune", "--older-than", "10d", "--max", "1.5TB", "--json"])
    assert {Path(item["path"]).name for item in json.loads(done.stdout)["items"] if item["kind"] == "models"} == {
        "old-bfloat16-1",
        "middle-bfloat16-1",
    }


@pytest.mark.parametrize("words", [["--max", "much"], ["--older-than", "long"], ["--keep-results", "/nowhere"]])
def test_a_wrong_size_time_or_folder_is_refused(fresh: Path, words: list[str]) -> None:
    from slimbench.harness.config.errors import ConfigError

    result = CliRunner().invoke(app, ["cache", "prune", *words])
    assert isinstance(result.exception, ConfigError) and artefact.exists("old")

"""Records of the time of import paths are carried over: what agrees with itself, whole or not at all, and no figure changes."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config import engines
from slimbench.harness.config.sources import shipped
from slimbench.harness.run import identity, trust
from slimbench.harness.run.cell import make_cell
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import SCHEMA_VERSION, Record
from slimbench.harness.store import migrate as migrating
from slimbench.harness.store import origin
from slimbench.harness.store.keys import speed_part
from slimbench.harness.store.migrate import migrate
from slimbench.harness.store.store import Store, dump, read
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tracking.wandb import runs
from slimbench.util.hashing import short_hash
from slimbench.util.text import slug
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT

FIXTURE: dict[str, Any] = json.loads((ROOT / "tests" / "support" / "legacy_keys.json").read_text(encoding="utf-8"))
RESULTS = {record.stage.value: json.loads(dump(record)) for record in records(Spec("gptq", "quantization", bits=4.25))}
STAGES = ("compress", "quality", "speed")


def old_record(cell: dict[str, Any], stage: str) -> dict[str, Any]:
    """A record file of schema 5: the figures of a synthetic record under a cell that the old code gave its keys."""
    dense = {"name": "dense", "target": "methods.dense.Dense", "settings": {}}
    pipeline = [{"settings": {}, **step, "name": step["target"].rpartition(".")[2].lower()} for step in cell["pipeline"]]
    engine = next(target for target, names in migrating.legacy_keys._data()["engines"].items() if cell["engine"] in names)
    parts = {name: copy.deepcopy(FIXTURE[name][cell[name]]) for name in ("model", "suite", "speed")}
    config = parts | {name: copy.deepcopy(cell[name]) for name in ("device", "calibration", "seed")}
    config |= {"pipeline": pipeline, "reference": dense, "results": "/home/alice/runs", "limits": {"wall_s": 7200.0}}
    config["engine"] = {"name": cell["engine"], "target": engine, "loaders": {"packed": "methods.kernels.packed.load"}}
    data = copy.deepcopy(RESULTS[stage])
    data["cell"] |= {"model": parts["model"]["name"], "pipeline": "+".join(step["name"] for step in pipeline)}
    data["cell"] |= {
        "steps": [step | {"reference": "paper"} for step in pipeline],
        "engine": cell["engine"],
        "device": cell["device"]["name"],
    }
    data["cell"] |= {name: dict(zip(STAGES, cell[name], strict=True)) for name in ("keys", "reference")}
    hardware = copy.deepcopy(FIXTURE["hardware"][cell["hardware"]])
    data |= {"schema_version": 5, "config": config, "key": data["cell"]["keys"][stage], "command": "slimbench run"}
    data["provenance"] |= {"hardware": {"cpu_flags": ["avx2"], "cores": 2, "gpus": []} | hardware, "threads": 2}
    del data["hardware"]
    return data


def old_path(root: Path, data: dict[str, Any]) -> Path:
    return root / slug(data["cell"]["model"]) / slug(data["cell"]["pipeline"]) / f"{data['stage']}-{data['key']}.json"


def save(root: Path, data: dict[str, Any]) -> Path:
    path = old_path(root, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the id of the folder, which is `own` in the others."""
    own = next(iter(origin.ids(root)), "none").encode()
    paths = [path for path in root.rglob("*") if path.is_file() and path.parent.name != origin.FOLDER]
    return {path.relative_to(root).as_posix(): path.read_bytes().replace(own, b"own") for path in paths}


def numbers(value: Any) -> Iterator[str]:
    """Every number below a value, to the last bit."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, float):
        yield value.hex() if math.isfinite(value) else str(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield float(value).hex()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The three records of every fourth committed cell, as they were."""
    for cell in FIXTURE["committed"][::4]:
        for stage in STAGES:
            save(tmp_path, old_record(cell, stage))
    return tmp_path


def test_every_record_is_under_the_key_that_todays_code_gives_and_no_figure_changes(folder: Path) -> None:
    before = {(r.stage, r.key): r for path in Store(folder).files() if isinstance(r := read(path), Record)}
    done = migrate(Store(folder))
    assert not done.left and not done.current and len(done.moved) > 150
    after, unreadable = Store(folder).scan()
    assert not unreadable and len(after) == len(done.moved)
    for record in after:
        (former,) = record.cell.former_keys
        old = before[record.stage, former.of(record.stage)]
        for part in ("compress", "quality", "speed", "wall_seconds", "peak_memory_bytes"):
            ours, theirs = (json.loads(r.model_dump_json())[part] for r in (record, old))
            assert ours == theirs and [*numbers(ours)] == [*numbers(theirs)]
        assert record.schema_version == SCHEMA_VERSION and record.started == old.started and record.hardware == old.hardware
        assert Store(folder).path(record.cell, record.stage, record.hardware) in Store(folder).files()
        text = json.dumps([record.cell.model_dump(), record.config])
        assert "methods." not in text and "harness." not in text and "alice" not in text


def test_a_cell_of_today_finds_its_migrated_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artefacts and quality under today's keys; speed under those of the protocol of then, which knew one process.

    By the version that `compiled` had then: what it decodes by has changed since.
    """
    today_of = engines.version
    monkeypatch.setattr(engines, "version", lambda target: 1 if target.endswith(".CompiledEngine") else today_of(target))
    cells = [c for c in FIXTURE["committed"] if all(s["target"].endswith(("Dense", "RTN", "GPTQ")) for s in c["pipeline"])]
    names = {"dense": "dense", "rtn": "rtn-4bit", "gptq": "gptq"}
    assert set(names.values()) <= set(shipped("method"))
    for cell in cells:
        save(tmp_path, old_record(cell, "quality"))
    migrate(Store(tmp_path))
    found = Store(tmp_path).scan()[0]
    assert len({record.cell.engine for record in found}) > 4
    for record in found:
        config = copy.deepcopy(record.config)
        for step in (*config["pipeline"], config["reference"]):
            step["name"] = names[step["method"]]
        today = make_cell(trust.configuration(config, trusted=True)).identity
        for now, then in ((today.keys, record.cell.keys), (today.reference, record.cell.reference)):
            assert (now.compress, now.quality) == (then.compress, then.quality) and now.speed != then.speed
        with monkeypatch.context() as patch:
            patch.setattr(identity, "speed_part", lambda settings, _: speed_part(settings | {"processes": None}, 1))
            former = make_cell(trust.configuration(config, trusted=True)).identity
        assert (former.keys, former.reference) == (record.cell.keys, record.cell.reference)


def test_a_second_run_changes_nothing(folder: Path) -> None:
    count = len(migrate(Store(folder)).moved)
    before = contents(folder)
    again = migrate(Store(folder))
    assert (len(again.moved), len(again.current), len(again.left)) == (0, count, 0)
    assert contents(folder) == before


@pytest.mark.parametrize("at", ["before the new file", "between the two", "after the old one"])
def test_an_interruption_loses_nothing_and_the_next_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    import shutil

    whole = folder.parent / f"{folder.name}-whole"
    shutil.copytree(folder, whole)
    migrate(Store(whole))
    write, unlink, calls = migrating.write, Path.unlink, [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt

    def interrupted_write(path: Path, record: Record) -> None:
        if at == "before the new file":
            count()
        write(path, record)

    def interrupted_unlink(path: Path, missing_ok: bool = False) -> None:
        if at == "between the two":
            count()
        unlink(path, missing_ok)
        if at == "after the old one":
            count()

    with monkeypatch.context() as patch:
        patch.setattr(migrating, "write", interrupted_write)
        patch.setattr(Path, "unlink", interrupted_unlink)
        with pytest.raises(KeyboardInterrupt):
            migrate(Store(folder))
    assert len(Store(folder).scan()[1]) == 0
    migrate(Store(folder))
    assert contents(folder) == contents(whole)
    shutil.rmtree(whole)


def _made_up(data: dict[str, Any]) -> None:
    data["cell"]["keys"]["quality"] = data["key"] = "0123456789abcdef"


def _other_settings(data: dict[str, Any]) -> None:
    data["config"]["suite"]["seqlen"] = 64


def _own_class(data: dict[str, Any]) -> None:
    data["config"]["pipeline"][0]["target"] = "own.Method"


def _other_reference(data: dict[str, Any]) -> None:
    data["cell"]["reference"]["compress"] = "0123456789abcdef"


def _other_key(data: dict[str, Any]) -> None:
    data["key"] = data["cell"]["keys"]["speed"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_made_up, "its quality key is 0123456789abcdef, its content gives"),
        (_other_settings, "its quality key is"),
        (_own_class, "no shipped method class 'own.Method'"),
        (_other_reference, "its compress key of the reference is 0123456789abcdef"),
        (_other_key, "its cell says"),
    ],
)
def test_what_does_not_agree_is_left_as_it_is_and_named(tmp_path: Path, change: Any, reason: str) -> None:
    good, forged = (old_record(FIXTURE["committed"][index], "quality") for index in (0, 1))
    change(forged)
    path = save(tmp_path, forged)
    save(tmp_path, good)
    before = path.read_bytes()
    done = migrate(Store(tmp_path))
    name = path.relative_to(tmp_path).as_posix()
    assert path.read_bytes() == before and list(done.left) == [name] and len(done.moved) == 1
    assert reason in done.left[name] and "\n" not in done.left[name]
    command = [sys.executable, "-P", "-m", "slimbench", "records", "migrate", "--results", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and f"left as it is: {name}: " in ran.stdout


def test_a_record_in_a_foreign_place_is_left(tmp_path: Path) -> None:
    data = old_record(FIXTURE["committed"][0], "speed")
    path = tmp_path / "other" / "place" / f"speed-{data['key']}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    assert "it belongs at" in migrate(Store(tmp_path)).left["other/place/" + path.name]
    (tmp_path / "other" / "place" / "speed-half.json").write_text("{")
    assert len(migrate(Store(tmp_path)).left) == 2


def test_a_record_that_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    data = old_record(FIXTURE["committed"][0], "speed")
    save(tmp_path, data)
    migrate(Store(tmp_path))
    (record,) = Store(tmp_path).scan()[0]
    newer = record.model_copy(update={"started": "2030-01-01T00:00:00+00:00"})
    Store(tmp_path).put(newer)
    path = save(tmp_path, data)
    done = migrate(Store(tmp_path))
    assert "is another record" in done.left[path.relative_to(tmp_path).as_posix()]
    assert Store(tmp_path).get(record.cell, Stage.SPEED, record.hardware) == newer


def test_results_of_other_tools_keep_their_keys(tmp_path: Path) -> None:
    for imported in FIXTURE["imported"]:
        data = copy.deepcopy(RESULTS[imported["stage"]]) | copy.deepcopy(imported)
        data["cell"] = RESULTS[imported["stage"]]["cell"] | data["cell"]
        data |= {"schema_version": 5, "key": imported["cell"]["keys"][imported["stage"]]}
        data["imported"] = {"file": "results.json", "sha256": "0" * 64} | data["imported"]
        save(tmp_path, data)
    done = migrate(Store(tmp_path))
    assert not done.left and len(done.moved) == len(FIXTURE["imported"])
    for record in Store(tmp_path).scan()[0]:
        assert record.cell.former_keys == [] and record.key == record.cell.keys.of(record.stage)


def test_a_record_that_is_not_migrated_is_read_under_its_old_key(tmp_path: Path) -> None:
    data = old_record(FIXTURE["committed"][0], "quality")
    record = read(save(tmp_path, data))
    assert isinstance(record, Record)
    assert record.key == data["key"] and record.schema_version == 5 and record.cell.former_keys == []
    assert record.hardware.label.startswith(FIXTURE["hardware"][FIXTURE["committed"][0]["hardware"]]["cpu"])
    assert all("target" not in step and step["method"] for step in (*record.cell.steps, *record.config["pipeline"]))
    (row,) = rows([record])
    assert row.keys.quality == data["key"] and row.perplexity


def test_a_tracked_run_keeps_its_id(tmp_path: Path) -> None:
    cell = FIXTURE["committed"][0]
    for stage in STAGES:
        save(tmp_path, old_record(cell, stage))
    migrate(Store(tmp_path))
    migrated = Store(tmp_path).scan()[0]
    assert [run.id for run in runs(migrated)] == [short_hash(*cell["keys"])]
    fresh = [r.model_copy(update={"cell": r.cell.model_copy(update={"former_keys": []})}) for r in migrated]
    elsewhere = [r.model_copy(update={"hardware": r.hardware.model_copy(update={"fingerprint": "0badcafe"})}) for r in fresh]
    ids = {run.id for made in (migrated, fresh, elsewhere) for run in runs(made)}
    assert len(ids) == 3, "one run for each machine"


def test_no_method_and_no_torch_is_imported(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from slimbench.harness.store.migrate import migrate\nfrom slimbench.harness.store.store import Store\n"
        f"migrate(Store(Path({str(folder)!r})))\n"
        "families = tuple('slimbench.methods.' + name for name in ('quantization', 'pruning', 'dense'))\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith(families)])"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

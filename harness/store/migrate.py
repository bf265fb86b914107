"""A results folder from keys that hash import paths to keys that hash names, in place.

Each record's old keys are computed again from the record alone; only one whose keys, path and cell agree is written anew, under its new
key and its hardware. No method is imported, and no number changes. The new file is written beside the old one before that is removed:
what is cut short goes on when it is run again, and a folder that is migrated stays as it is.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from slimbench.harness.schema.former import legacy_keys
from slimbench.harness.schema.former.legacy_keys import METHOD_VERSION, LegacyError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import NAMED_KEYS, SCHEMA_VERSION, Record
from slimbench.harness.store import origin, shared
from slimbench.harness.store.decode import decode
from slimbench.harness.store.keys import Parts, model_part, speed_part, suite_part
from slimbench.harness.store.store import Store, parse, read, write
from slimbench.util.text import slug

_ENGINE_VERSION = _DIVERGENCE_VERSION = _ZEROSHOT_VERSION = _SPEED_VERSION = 1
_PERPLEXITY_VERSION = "{}-1"


@dataclass
class Migration:
    """What became of the files of a folder, each by its path in it.

    Attributes:
        moved: Old path → new path.
        current: Those that need nothing.
        left: Path → one line that says why it was left as it is.
    """

    moved: dict[str, str] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def migrate(store: Store) -> Migration:
    """Write the records of a folder anew under their present keys.

    Raises:
        OSError: The folder cannot be written; run again, it goes on.
    """
    result, old, unfinished = Migration(), {}, store.root / origin.FOLDER / "migrating"
    if not origin.ids(store.root):
        store.claim()
        unfinished.touch()
    own = store.claim() if unfinished.exists() else None
    for path in store.files():
        name = path.relative_to(store.root).as_posix()
        try:
            raw = shared.join(decode(path.read_bytes()), shared.folder_of(path))
            if raw.get("schema_version", 1) >= NAMED_KEYS:
                result.current.append(name)
                continue
            old[name] = (raw, _verified(raw, name))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            result.left[name] = " ".join(str(error).split()) or type(error).__name__
    table = _table(old, result)
    for name, (raw, former) in old.items():
        if name in result.left:
            continue
        record = _renewed(raw, former, table)
        if isinstance(record, str):
            result.left[name] = record
            continue
        record.origin = own  # what lay in a folder before it had an id is its own; what was copied beside others is not
        target = store.path(record.cell, record.stage, record.hardware)
        place = target.relative_to(store.root).as_posix()
        if target.exists() and read(target) != record:
            result.left[name] = f"{place} is another record"
        else:
            write(target, record)
            (store.root / name).unlink()
            result.moved[name] = place
    unfinished.unlink(missing_ok=True)
    return result


Former = dict[str, dict[str, str]]


def _verified(raw: dict[str, Any], name: str) -> Former:
    """The old keys of a record and of its reference, if its content, its cell and its path agree on them.

    Raises:
        LegacyError: They do not, or cannot be computed.
    """
    former, cell, stage = legacy_keys.recompute(raw), raw["cell"], Stage(raw["stage"])
    for part, keys in former.items():
        if (stated := {stage.value: cell[part].get(stage.value) for stage in Stage}) != keys:
            wrong = next(stage for stage in keys if keys[stage] != stated[stage])
            raise LegacyError(
                f"its {wrong} key{' of the reference' * (part == 'reference')} is {stated[wrong]}, its content gives {keys[wrong]}"
            )
    if raw["key"] != former["keys"][stage]:
        raise LegacyError(f"its key is {raw['key']}, its cell says {former['keys'][stage]}")
    place = f"{slug(cell['model'])}/{slug(cell['pipeline'])}/{stage.value}-{slug(raw['key'])}.json"
    if name != place:
        raise LegacyError(f"it belongs at {place}")
    return former


def _table(old: dict[str, tuple[dict[str, Any], Former]], result: Migration) -> dict[str, str]:
    """Old key → new key, of cells and references."""
    table: dict[str, str] = {}
    for name, (raw, former) in old.items():
        try:
            present = former if raw.get("imported") else _present(raw)
        except LegacyError as error:
            result.left[name] = str(error)
            continue
        for part, keys in former.items():
            table.update({key: present[part][stage] for stage, key in keys.items()})
    return table


def _present(raw: dict[str, Any]) -> Former:
    """The keys that a cell of the same configuration has today, and those of its reference."""
    config = raw["config"]
    return {"keys": _keys(raw, config["pipeline"]), "reference": _keys(raw, [config["reference"]])}


def _keys(raw: dict[str, Any], pipeline: list[dict[str, Any]]) -> dict[str, str]:
    config = raw["config"]
    model, suite = legacy_keys.model(config["model"]), legacy_keys.protocol(config["suite"], "suite", ("name", "batch_tokens"))
    speed = legacy_keys.protocol(config["speed"], "speed", ("name",))
    speed["grid"] = [legacy_keys.protocol(point, "speed_point", ()) for point in speed["grid"]]
    calibrated = any(legacy_keys.entry("settings", step["target"], "method class")["calibration"] for step in pipeline)
    device = config["device"]
    parts = Parts(
        model=model_part(
            model["source"],
            model.get("content"),
            model["revision"],
            model["dtype"],
            model["shape"],
            bool(config["model"].get("trust_remote_code")),
        ),
        pipeline=[
            {"name": legacy_keys.method_name(step["target"]), "version": METHOD_VERSION, "settings": legacy_keys.settings(step)}
            for step in pipeline
        ],
        calibration=legacy_keys.calibration(config["calibration"]) if calibrated else None,
        seed=config.get("seed", 0),
        compress_device=device["name"],
        engine={"name": legacy_keys.engine_name(config["engine"]["name"], config["engine"]["target"]), "version": _ENGINE_VERSION},
        device=device["name"],
        suite=suite_part(
            suite,
            [legacy_keys.corpus(spec) for spec in suite["corpus"]],
            legacy_keys.tasks(suite["include_path"], suite["tasks"]) if suite["tasks"] else None,
            _protocol_versions(suite),
        ),
        speed=speed_part(speed, _SPEED_VERSION),
        threads=legacy_keys.asked_threads(raw),
    )
    return parts.keys().model_dump()


def _protocol_versions(suite: dict[str, Any]) -> dict[str, Any]:
    names = [text.partition("@")[0] for text in suite["protocols"]] if suite["corpus"] else []
    versions: dict[str, Any] = {name: _PERPLEXITY_VERSION.format(name) for name in names}
    versions |= {"divergence": _DIVERGENCE_VERSION} if suite["divergence"] and suite["corpus"] else {}
    return versions | ({"zeroshot": _ZEROSHOT_VERSION} if suite["tasks"] else {})


def _renewed(raw: dict[str, Any], former: Former, table: dict[str, str]) -> Record | str:
    """The record under its present keys, or one line that says why there is none."""
    data = copy.deepcopy(raw)
    for part, keys in former.items():
        data["cell"][part] = {stage: table[key] for stage, key in keys.items()}
    data["key"] = table[raw["key"]]
    if data["cell"]["keys"] != former["keys"]:
        data["cell"]["former_keys"] = [former["keys"]]
    record = parse(json.dumps(data).encode())
    return record if isinstance(record, str) else record.model_copy(update={"schema_version": SCHEMA_VERSION})

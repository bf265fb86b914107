"""What lies in the folders of a finished sweep is damaged: records, their shared parts, artefacts, and whatever else is cached."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store
from tests.chaos.scene import Fault, Scene
from tests.chaos.shim import Call, Depth, Program, Rule

_Damage = Callable[[Path, random.Random], None]


def _flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def _cut(file: Path, dice: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(1, len(content))])


_BYTES: dict[str, _Damage] = {
    "a bit flipped": _flip,
    "cut short": _cut,
    "of no length": lambda file, dice: file.write_bytes(b"") and None,
    "zeroed": lambda file, dice: file.write_bytes(bytes(file.stat().st_size)) and None,
    "removed": lambda file, dice: file.unlink(),
}


def _field(*path: str, value: Any) -> _Damage:
    """Set a field of a record, whatever lies around it."""

    def damage(file: Path, dice: random.Random) -> None:
        content = json.loads(file.read_text())
        place = content
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        file.write_text(json.dumps(content))

    return damage


_FIELDS: dict[str, _Damage] = {
    "no schema": _field("schema_version", value=None),
    "another key": _field("key", value="0" * 16),
    "another cell": _field("cell", "model", value="foreign"),
    "another origin": _field("origin", value="f" * 16),
    "a status of no kind": _field("status", value="splendid"),
}


def _records(scene: Scene) -> list[Path]:
    return sorted(scene.results.glob("*/*/*.json"))


def _spoil(scene: Scene, record: Path) -> None:
    """The stage of this record has to run again."""
    stage, key = record.name.split("-")[:2]
    scene.spoilt.add(f"{stage}-{key}")


def _of_record(name: str, damage: _Damage, seed: int) -> Fault:
    def before(scene: Scene) -> bool:
        dice = random.Random(seed)
        if not (paths := [path for path in _records(scene) if not _is_spoilt(scene, path)]):
            return False
        path = dice.choice(paths)
        damage(path, dice)
        _spoil(scene, path)
        return True

    return Fault("corruption", f"record: {name}", before=before)


def _is_spoilt(scene: Scene, record: Path) -> bool:
    return "-".join(record.name.split("-")[:2]) in scene.spoilt


def _swapped(seed: int) -> Fault:
    """Two artefacts stand in each other's place."""

    def before(scene: Scene) -> bool:
        one, other = random.Random(seed).sample(sorted((scene.cache / "artefacts").iterdir()), 2)
        if not _measure_again(scene, {one.name, other.name}):
            return False
        aside = scene.root / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        return True

    return Fault("corruption", "two artefacts swapped", before=before)


def _newer(seed: int) -> Fault:
    """A record of a slimbench that is yet to come: it is left alone, and the sweep says so until it is gone."""
    kept: dict[Path, bytes] = {}

    def before(scene: Scene) -> bool:
        dice = random.Random(seed)
        if not (paths := [path for path in _records(scene) if not _is_spoilt(scene, path)]):
            return False
        path = dice.choice(paths)
        kept[path] = path.read_bytes()
        _field("schema_version", value=999)(path, dice)
        return True

    def undo(scene: Scene) -> None:
        for path, content in kept.items():
            path.write_bytes(content)

    return Fault("corruption", "record: of a newer schema", before=before, undo=undo, codes=frozenset({1, 2}))


def _copied(seed: int) -> Fault:
    """A record lies a second time, under the name of another stage or cell."""

    def before(scene: Scene) -> bool:
        source, target = random.Random(seed).sample(_records(scene), 2)
        if _is_spoilt(scene, source) or _is_spoilt(scene, target):
            return False
        shutil.copyfile(source, target)
        _spoil(scene, target)
        return True

    return Fault("corruption", "record: that of another stage", before=before)


def _of_artefact(name: str, damage: _Damage, seed: int) -> Fault:
    """A file of an artefact is damaged, and its measurement has to run again."""

    def before(scene: Scene) -> bool:
        dice = random.Random(seed)
        link = dice.choice(sorted((scene.cache / "artefacts").iterdir()))
        files = [path for path in sorted(link.resolve().rglob("*")) if path.is_file() and path.stat().st_size]
        if not _measure_again(scene, {link.name}):
            return False
        _damage(dice.choice(files), damage, dice)
        return True

    return Fault("corruption", f"objects: {name}", before=before)


def _measure_again(scene: Scene, keys: set[str]) -> bool:
    """Remove the records of what was measured on some artefacts; whether there are such of each."""
    store = Store(scene.results)
    measured = [record for record in store.scan()[0] if record.stage is Stage.QUALITY and record.cell.keys.compress in keys]
    paths = [store.path(record.cell, record.stage, record.hardware) for record in measured]
    if {record.cell.keys.compress for record in measured} != keys or any(_is_spoilt(scene, path) for path in paths):
        return False
    for path in paths:
        path.unlink()
        _spoil(scene, path)
    return True


def _damage(file: Path, damage: _Damage, dice: random.Random) -> None:
    """Damage a file that may be read-only."""
    file.parent.chmod(0o755)
    file.chmod(0o644)
    damage(file, dice)


def _of_cache(folder: str, name: str, damage: _Damage, seed: int) -> Fault:
    """A cached file is damaged, and a measurement that reads it has to run again."""

    def before(scene: Scene) -> bool:
        dice = random.Random(seed)
        files = [path for path in sorted((scene.cache / folder).rglob("*")) if path.is_file() and path.stat().st_size]
        if not files:
            return False
        _damage(dice.choice(files), damage, dice)
        return _forget_one(scene, seed)

    return Fault("corruption", f"{folder}: {name}", before=before)


def _forget_one(scene: Scene, seed: int) -> bool:
    """Remove the record of a measurement, so that it runs again."""
    paths = [path for path in _records(scene) if path.name.startswith("quality") and not _is_spoilt(scene, path)]
    if paths:
        path = random.Random(seed).choice(paths)
        path.unlink()
        _spoil(scene, path)
    return True


def _under_way(dice: random.Random, seed: int) -> Fault:
    """An artefact is cut short while a stage has it loaded, mapped or not."""
    place = dice.choice(["load", "file:text.txt"])
    rule = Rule(
        Call.WRITE, text=f'"event": "phase", "name": "{place}', programs=Program.SERVER, depths=Depth.CHILD, skip=dice.choice([0, 1])
    )

    def act(scene: Scene, pid: int) -> None:
        files = sorted((scene.cache / "objects").glob("*/model.safetensors"))
        _cut(random.Random(seed).choice(files), random.Random(seed))

    return Fault(
        "corruption", f"an artefact cut short under a running stage, in {'load' if place == 'load' else 'quality: perplexity'}", rule, act
    )


def corruption(dice: random.Random, words: str) -> Fault:
    """Damage to a record, to an artefact, or to what is cached beside it."""
    seed = dice.randrange(1 << 32)
    what = dice.choice(
        [
            "record",
            "record",
            "record",
            "field",
            "field",
            "objects",
            "objects",
            "reference",
            "tokens",
            "hashes",
            "swapped",
            "copied",
            "under way",
            "newer",
        ]
    )
    if what == "under way":
        return _under_way(dice, seed)
    if what == "swapped":
        return _swapped(seed)
    if what == "copied":
        return _copied(seed)
    if what == "newer":
        return _newer(seed)
    if what == "field":
        name = dice.choice(sorted(_FIELDS))
        return _of_record(name, _FIELDS[name], seed)
    name = dice.choice(sorted(_BYTES))
    if what == "record":
        return _of_record(name, _BYTES[name], seed)
    return _of_artefact(name, _BYTES[name], seed) if what == "objects" else _of_cache(what, name, _BYTES[name], seed)

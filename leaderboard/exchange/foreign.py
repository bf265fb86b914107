"""What the readers of other tools' files share: how a file is opened, and which cell its results become."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slimbench.harness.schema.hardware import identify
from slimbench.harness.schema.identity import CellIdentity, Keys, Stage, Status
from slimbench.harness.schema.record import Imported, Record
from slimbench.util.hashing import short_hash

DENSE = "dense"
NOT_MEASURED = "none"
UNKNOWN = "unknown"
_PATH = re.compile(r"^([~./\\]|file:|[a-z][\w+.-]*:[\\/])|\\", re.IGNORECASE)


class Unreadable(Exception):
    """A file from which nothing can be imported; the message is one line."""


@dataclass(frozen=True)
class Named:
    """What the user says about the files: the dense source, and the pipeline by which it was compressed. None: what the file says."""

    model: str | None = None
    pipeline: str | None = None


@dataclass(frozen=True)
class Source:
    """A JSON file of another tool.

    Attributes:
        data: Its content, a mapping.
        digest: SHA-256 of its bytes.
    """

    path: Path
    data: dict[str, Any]
    digest: str

    @classmethod
    def read(cls, path: Path) -> Source:
        """Raises `Unreadable` where the file is no JSON object."""
        try:
            content = path.read_bytes()
            data = json.loads(content)
        except (OSError, ValueError, RecursionError) as error:
            raise Unreadable(f"not a JSON file: {error}") from error
        if not isinstance(data, dict):
            raise Unreadable("its JSON is not an object")
        return cls(path, data, sha256(content).hexdigest())


@dataclass(frozen=True)
class Setting:
    """What a file says of the cell beside its results.

    Attributes:
        revision: Which version of the model it is, where that is not the usual one.
        compression: How the model was compressed, in the tool's own words; None where nothing says so.
        protocol: What defines the numbers: only cells with the same protocol are compared.
    """

    tool: str
    version: str | None
    model: str | None
    compression: str | None
    engine: str
    device: str
    dtype: str
    stage: Stage
    suite: str
    speed: str
    protocol: dict[str, Any]
    revision: str | None = None
    parameters: int | None = None
    run: str | None = None
    seed: int = 0


def record(source: Source, setting: Setting, named: Named, result: Any, wall_seconds: float | None, provenance: dict[str, Any]) -> Record:
    """The record of an imported result.

    Its keys are made of what identifies the cell, not of its numbers, so that the same cell of another file has the same keys; the
    reference is the imported `dense` cell of the same model, dtype, tool, engine, device and protocol. A revision belongs to the name
    that the file gives, not to the one that the user gives.

    Raises:
        Unreadable: The file does not name the model, and neither does the user.
    """
    name = public_name(setting.model)
    model = named.model or (f"{name}@{setting.revision}" if name and setting.revision else name)
    if not model:
        raise Unreadable("it does not name the model; give --model")
    pipeline = named.pipeline or setting.compression or DENSE
    names = step_names(pipeline)
    part = "quality" if setting.stage is Stage.QUALITY else "speed"
    section = {"suite" if part == "quality" else "speed": {"tool": setting.tool, **setting.protocol}}
    keys = _keys(setting, model, pipeline)
    return Record(
        stage=setting.stage,
        status=Status.OK,
        key=keys.of(setting.stage),
        cell=CellIdentity(
            model=model,
            dtype=setting.dtype,
            parameters=setting.parameters,
            pipeline=pipeline,
            steps=[{"name": name} for name in names],
            family=_family(names),
            engine=setting.engine,
            device=setting.device,
            suite=setting.suite,
            speed=setting.speed,
            seed=setting.seed,
            keys=keys,
            reference=_keys(setting, model, DENSE),
        ),
        hardware=identify(provenance.get("hardware"), setting.device, threads=provenance.get("threads") or 0),
        started=setting.run or "",
        wall_seconds=wall_seconds,
        **{part: result},
        config={"stages": [setting.stage.value], **section},
        command="",
        provenance=provenance,
        imported=Imported(tool=setting.tool, version=setting.version, file=source.path.name, sha256=source.digest, run=setting.run),
    )


def step_names(pipeline: str) -> list[str]:
    """The methods of a pipeline label: `sparsegpt(pattern=2:4)+gptq` are `sparsegpt` and `gptq`."""
    return [name.strip() or UNKNOWN for name in re.sub(r"\([^()]*\)", "", pipeline).split("+")]


def public_name(name: Any) -> str | None:
    """A model's name as it may be shown: a hub id as it is, of a path or an address the last component."""
    text = name.strip() if isinstance(name, str) else ""
    if not _PATH.search(text):
        return text or None
    return next((part for part in reversed(re.split(r"[\\/]+", text)) if part not in ("", ".", "..", "~")), None)


def section(data: Any, *path: str) -> dict[str, Any]:
    """The mapping at a path of keys; empty where there is none."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def device(value: Any) -> str:
    """`cuda:0` is `cuda`."""
    return (text(value) or UNKNOWN).partition(":")[0]


def _keys(setting: Setting, model: str, pipeline: str) -> Keys:
    compress = short_hash("imported", setting.tool, ascii(model), ascii(setting.dtype), ascii(pipeline))
    where = (compress, ascii(setting.engine), setting.device)
    protocol = json.dumps(setting.protocol, sort_keys=True)
    made = {stage.value: short_hash(*where, stage, protocol if stage is setting.stage else "") for stage in Stage}
    return Keys(**made | {Stage.COMPRESS.value: compress})


def _family(names: Sequence[str]) -> str:
    """The families of the methods that slimbench knows; `imported` where it does not know one of them."""
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.config.registry import entry

    families = []
    for name in names:
        if name == DENSE:
            continue
        try:
            families.append(str(entry(name).method.family))
        except ConfigError:
            return "imported"
    return "+".join(dict.fromkeys(families)) or "dense"

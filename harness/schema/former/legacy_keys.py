"""The content keys of records up to schema 5, computed again from a record alone.

Those keys hashed the import path of each method class beside the hardware of the machine that planned. What the code and the
catalogues of that time gave to a key stands in `legacy_keys.json`, so no method class is imported, and no file or host that a
record names is read. Neither this module nor its data follows later changes: they name records that exist.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DATA = Path(__file__).with_name("legacy_keys.json")
METHOD_VERSION = 1
"""The version of each method whose records carry a key of this kind."""

_CALIBRATION_VERSION = 1
_SEPARATOR = "\n\n"
_TRUE, _FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")


class LegacyError(ValueError):
    """The keys of a record cannot be computed from it. The message is one line."""


def recompute(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The keys that a record of schema 1 to 5 was given, and those of its reference.

    Args:
        record: The contents of its file, not changed by `migrate`.

    Returns:
        `keys` and `reference`, each with `compress`, `quality` and `speed`.

    Raises:
        LegacyError: They depend on something that is not in the record, such as a local folder or a class of the user's own.
    """
    try:
        if record.get("imported"):
            return _imported(record)
        config, hardware = record["config"], record["provenance"]["hardware"]
        return {
            "keys": _keys(config, config["pipeline"], hardware),
            "reference": _keys(config, [config["reference"]], hardware),
        }
    except LegacyError:
        raise
    except LookupError as error:
        raise LegacyError(f"the record does not say {' '.join(str(error).split())}") from error
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise LegacyError(f"the record is not of the form of its time: {' '.join(str(error).split())}") from error


def method_name(target: str) -> str:
    """The name of the method behind the dotted path of a class.

    Raises:
        LegacyError: It is no class that slimbench shipped.
    """
    return str(entry("methods", target, "method class"))


def engine_name(name: str, target: str) -> str:
    """The name of the engine that a record was measured with, given its name and the dotted path of its class.

    Raises:
        LegacyError: It is no engine that slimbench shipped.
    """
    if name not in entry("engines", target, "engine class"):
        raise LegacyError(f"no shipped engine {name!r} of class {target}")
    return name


def asked_threads(record: Mapping[str, Any]) -> int | None:
    """The CPU threads that the user asked for; None where a record only says how many cores its machine gave."""
    threads, cores = record["config"]["device"].get("threads"), record.get("provenance", {}).get("hardware", {}).get("cores")
    asked = re.search(r"\bdevice\.threads=", record.get("command") or "")
    return threads if asked or threads != cores else None


@cache
def _data() -> dict[str, dict[str, Any]]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def entry(table: str, name: Any, kind: str) -> Any:
    """What a table of `legacy_keys.json` says of a name. Raises `LegacyError` where it is not there."""
    found = _data()[table]
    if not isinstance(name, str) or name not in found:
        raise LegacyError(f"no shipped {kind} {name!r}")
    return found[name]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _keys(config: Mapping[str, Any], pipeline: Sequence[Mapping[str, Any]], hardware: Mapping[str, Any]) -> dict[str, str]:
    calibrated = any(entry("settings", step["target"], "method class")["calibration"] for step in pipeline)
    compress = _digest(
        {
            "model": model(config["model"]),
            "pipeline": [{"target": step["target"], "settings": settings(step)} for step in pipeline],
            "calibration": calibration(config["calibration"]) if calibrated else None,
            "seed": config.get("seed", 0),
        }
    )
    suite, device = protocol(config["suite"], "suite", ("name", "batch_tokens")), config["device"]
    quality = _digest(
        {
            "compress": compress,
            "engine": config["engine"]["name"],
            "device": device["name"],
            "protocol": suite | {"include_path": None, "corpus": None},
            "corpora": [corpus(spec) for spec in suite["corpus"]],
            "tasks": tasks(suite["include_path"], suite["tasks"]) if suite["tasks"] else None,
        }
    )
    speed = protocol(config["speed"], "speed", ("name",))
    speed["grid"] = [protocol(point, "speed_point", ()) for point in speed["grid"]]
    speed_key = _digest(
        {
            "compress": compress,
            "engine": config["engine"]["name"],
            "hardware": _hardware(device, hardware),
            "protocol": speed,
        }
    )
    return {"compress": compress, "quality": quality, "speed": speed_key}


def model(model: Mapping[str, Any]) -> dict[str, Any]:
    """What identified the dense source; `content` is there for an asset."""
    source = model["source"]
    identity = {"source": source, "revision": model.get("revision"), "dtype": model.get("dtype", "bfloat16"), "shape": model.get("shape")}
    kind, _, rest = source.partition(":")
    if kind == "asset":
        return identity | {"content": entry("assets", rest, "asset")}
    if kind == "file":
        raise LegacyError("the model is a local folder, whose content is not in the record")
    if kind not in ("hf", "random"):
        raise LegacyError(f"no model source {source!r}")
    return identity


def settings(step: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a step as its class held them: defaults filled in, types coerced, those that are off left out."""
    known = entry("settings", step["target"], "method class")["settings"]
    given = step.get("settings", {})
    if unknown := [name for name in given if name not in known]:
        raise LegacyError(f"{step['target']} has no setting {unknown[0]!r}")
    held = {name: _coerced(given[name], kind, name) if name in given else default for name, (kind, default) in known.items()}
    return {name: value for name, value in held.items() if value is not None}


def _coerced(value: Any, kind: str | list[Any], name: str) -> Any:
    """A value as pydantic gives it to a field.

    Args:
        kind: `int`, `float`, `bool` or `str`, with a question mark where null is allowed; or the list of all choices.
    """
    if isinstance(kind, list):
        if value in kind:
            return kind[kind.index(value)]
    elif value is None and kind.endswith("?"):
        return None
    else:
        try:
            return _COERCE[kind.rstrip("?")](value)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            pass
    raise LegacyError(f"setting {name!r} cannot be {value!r}")


def _int(value: Any) -> int:
    number = int(re.sub(r"\.0+$", "", value.strip()) if isinstance(value, str) else value)
    if not isinstance(value, str) and number != value:
        raise ValueError("no whole number")
    return number


def _bool(value: Any) -> bool:
    if isinstance(value, str):
        return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[value.lower()]
    return (False, True)[(0, 1).index(value)]


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


_COERCE: dict[str, Callable[[Any], Any]] = {"int": _int, "float": float, "bool": _bool, "str": _str}


def calibration(calibration: Mapping[str, Any]) -> str:
    """The fingerprint of calibration text and sampling."""
    sampled = (calibration["samples"], calibration["length"], calibration["seed"])
    return _digest([corpus(calibration["source"]), *sampled, _CALIBRATION_VERSION])


def corpus(spec: str) -> str:
    """The fingerprint of a text."""
    if spec.startswith("file:"):
        raise LegacyError("a corpus is a local file, whose content is not in the record")
    return _digest([spec, _SEPARATOR]) if spec.startswith("hf:") else str(entry("corpora", spec, "corpus"))


def tasks(include_path: str | None, tasks: Sequence[str]) -> str:
    """The fingerprint of zero-shot tasks."""
    if include_path is None:
        return _digest(sorted(tasks))
    if include_path != "asset:bigbench":
        raise LegacyError("the tasks are defined in a local folder, whose content is not in the record")
    return _digest([entry("tasks", task, "task") for task in sorted(tasks)])


def protocol(section: Mapping[str, Any], table: str, apart: Sequence[str]) -> dict[str, Any]:
    """The fields that define the numbers: those of the section, the others at their default."""
    defaults = _data()[table]
    given = {name: value for name, value in section.items() if name not in apart}
    if unknown := [name for name in given if name not in defaults]:
        raise LegacyError(f"{table.replace('_', ' ')} has no field {unknown[0]!r}")
    return defaults | given


def _hardware(device: Mapping[str, Any], hardware: Mapping[str, Any]) -> str:
    """The card that a cell asks for, where the machine has it; the processor with the threads of the cell and the memory."""
    if device["name"] == "cpu":
        return f"{hardware['cpu']} · {device.get('threads') or 'unknown'} threads · {round(hardware['memory_bytes'] / 2**30)} GB"
    if device["name"] != "cuda":
        raise LegacyError(f"device {device['name']!r} is not resolved")
    index, cards = device.get("index", 0), hardware.get("gpus", [])
    return str(cards[index]["name"]) if index < len(cards) else "cuda"


def _imported(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The keys of what another tool measured: they hash what identifies the cell, and no class."""
    cell, stage, tool = record["cell"], record["stage"], record["imported"]["tool"]
    section = record["config"]["suite" if stage == "quality" else "speed"]
    protocol = json.dumps({name: value for name, value in section.items() if name != "tool"}, sort_keys=True)

    def keys(pipeline: str) -> dict[str, str]:
        compress = _short_hash("imported", tool, ascii(cell["model"]), ascii(cell["dtype"]), ascii(pipeline))
        where = (compress, ascii(cell["engine"]), cell["device"])
        later = {name: _short_hash(*where, name, protocol if name == stage else "") for name in ("quality", "speed")}
        return {"compress": compress} | later

    return {"keys": keys(cell["pipeline"]), "reference": keys("dense")}


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12]

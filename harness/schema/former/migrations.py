"""Records of older schemas, brought to the current one: one function a step, each frozen when the next schema comes."""

from __future__ import annotations

from typing import Any

from slimbench.harness.schema.former import legacy_keys
from slimbench.harness.schema.hardware import identify
from slimbench.harness.schema.record import SCHEMA_VERSION


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Bring the contents of a record file to the current schema.

    Raises:
        ValueError: The record is of a newer version than this program reads.
    """
    version = data.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"record schema {version!r} is newer than {SCHEMA_VERSION}; update slimbench")
    if version < 2:
        speed = data.get("speed")
        for point in speed.get("points", []) if isinstance(speed, dict) else []:
            _point_of_schema_1(point)
    if version < 3:
        quality = data.get("quality")
        for task in quality.get("zeroshot", []) if isinstance(quality, dict) else []:
            _items_of_schema_2(task)
    if version < 4:
        _memory_of_schema_3(data)
    if version < 5:
        _prompts_of_schema_4(data)
        data.get("config", {}).pop("results", None)  # a folder of the machine that measured
    if version < 6:
        _paths_of_schema_5(data)
    if version < 7:
        _interruptions_of_schema_6(data)
    return data


def _point_of_schema_1(point: dict[str, Any]) -> None:
    """Give the fields of a speed point their present names; fields that have them already are left alone."""
    if "warmup_ms" in point:
        point["first_call_ms"] = point.pop("warmup_ms")
    point["probes"] = [{"copy_gbs": probe} if isinstance(probe, int | float) else probe for probe in point.get("probes", [])]


_KEPT_CACHES = ("compiled", "llamacpp", "vllm", "vllm-cpu")


def _memory_of_schema_3(data: dict[str, Any]) -> None:
    """Forget the activations of engines that keep their KV cache: it was taken off them though it had been there before the run."""
    speed, cell = data.get("speed"), data.get("cell")
    memory = speed.get("memory") if isinstance(speed, dict) else None
    if isinstance(memory, dict) and isinstance(cell, dict) and cell.get("engine") in _KEPT_CACHES:
        memory["activation_bytes"] = None


def _prompts_of_schema_4(data: dict[str, Any]) -> None:
    """Flag what was measured while the last token of a prompt made a copy of a dense head that shares its weight with the embedding."""
    speed = data.get("speed") if isinstance(data.get("speed"), dict) else None
    if not speed or not isinstance(speed.get("evidence"), dict) or not isinstance(speed.get("memory"), dict):
        return
    layers = speed["evidence"].get("layers", [])
    copied = sum(layer["bytes"] for layer in layers if layer["layer"] == "Embedding")
    own = any(layer["layer"].startswith(("Packed", "Codebook", "Adapted")) for layer in layers)
    if own and 0 < copied <= (speed["memory"].get("activation_bytes") or 0):
        speed.setdefault("flags", []).append("prefill and activations are with a copy of the dense head that is no longer made")


def _items_of_schema_2(task: dict[str, Any]) -> None:
    """Turn a list of items into their columns; items that are columns already are left alone."""
    items = task.get("items")
    if isinstance(items, list):
        columns = {"ids": "id", "hashes": "hash", "correct": "correct"}
        task["items"] = {name: [item[field] for item in items] for name, field in columns.items()}
        task["items"]["loglikelihoods"] = [item.get("loglikelihoods", []) for item in items]


def _paths_of_schema_5(data: dict[str, Any]) -> None:
    """Name methods and engine in place of the paths of their classes, and the hardware. The keys stay what they were."""
    if isinstance(data.get("config"), dict):
        data["config"].pop("results", None)
    cell, config, provenance = (part if isinstance(part := data.get(name), dict) else {} for name in ("cell", "config", "provenance"))
    if "steps" in cell:
        cell["steps"] = [_named(step) for step in cell["steps"]]
    if "pipeline" in config:
        config["pipeline"] = [_named(step) for step in config["pipeline"]]
    if isinstance(config.get("reference"), dict):
        config["reference"] = _named(config["reference"])
    if isinstance(engine := config.get("engine"), dict):
        config["engine"] = {"name": engine.get("name"), "version": 1}
    device = config["device"] if isinstance(config.get("device"), dict) else {}
    if not data.get("imported") and device:
        device["compress"] = device.get("name")
        device["threads"] = legacy_keys.asked_threads(data)
    threads = provenance.get("threads")
    place = identify(provenance.get("hardware"), str(cell.get("device")), device.get("index") or 0, threads or 0)
    data.setdefault("hardware", place.model_dump())


def _interruptions_of_schema_6(data: dict[str, Any]) -> None:
    """Tell a stage that was ended from outside from one that failed."""
    failure = data.get("failure")
    if isinstance(failure, dict) and failure.pop("interrupted", False):
        failure["reason"] = "interrupted"
        data["status"] = "transient"


def _named(step: dict[str, Any]) -> dict[str, Any]:
    """A step with the name and version of its method in place of its class, where that is one of slimbench's own."""
    rest = {name: value for name, value in step.items() if name != "target"}
    if "target" not in step or "method" in step:
        return rest
    try:
        return rest | {"method": legacy_keys.method_name(step["target"]), "version": legacy_keys.METHOD_VERSION}
    except legacy_keys.LegacyError:
        return rest

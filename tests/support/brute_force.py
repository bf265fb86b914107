"""The figures of cells and the best of them, from the JSON of records and nothing else of the project: what a recommendation must equal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

Json = dict[str, Any]
STAGES = ("compress", "quality", "speed")


@dataclass(frozen=True)
class Cell:
    """A cell whose stages all ended well, on one machine.

    Attributes:
        spoiled: What cannot be relied on: `cell`, `quality`, `memory`, `decode`.
    """

    compress: str
    pipeline: str
    perplexity: float
    ratio: float | None
    memory: float | None
    weights: float
    disk: float
    speed: float | None
    speedup: float | None
    spoiled: frozenset[str]


def cells(folder: Path, place: str, **wanted: str) -> list[Cell]:
    """The cells of one table.

    Args:
        folder: Of the records.
        place: Fingerprint of the machine.
        wanted: What the cells have, such as `suite="quick"`.
    """
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json")) if path.name.startswith(STAGES)]
    newest: dict[tuple[str, str, str], Json] = {}
    for record in sorted(records, key=lambda r: r["started"]):
        newest[record["stage"], record["key"], record["hardware"]["fingerprint"]] = record
    here = [r for r in records if r["hardware"]["fingerprint"] == place and all(r["cell"][name] == value for name, value in wanted.items())]
    last = {tuple(r["cell"]["keys"][stage] for stage in STAGES): r for r in sorted(here, key=lambda r: r["started"])}
    return [found for record in last.values() if (found := _cell(record, place, newest))]


def best(found: Iterable[Cell], budget: Mapping[str, float | None], objective: str, include_flagged: bool) -> tuple[Cell | None, set[str]]:
    """The best cell that keeps to a budget, by trying all, and those that only what is spoiled keeps from being tried.

    Args:
        budget: As the fields of `Budget`.
    """
    read = {"cell", "quality"}
    read |= {"memory"} if budget["memory_bytes"] is not None or objective == "size" else set()
    read |= {"decode"} if {budget["min_speed"], budget["min_speedup"]} != {None} or objective == "speed" else set()
    chosen, order, out = None, (math.inf,) * 4, set()
    for cell in found:
        memory = cell.memory if include_flagged or "memory" not in cell.spoiled else None
        limits = [
            ("memory", budget["memory_bytes"], memory, 1),
            ("", budget["max_disk_bytes"], cell.disk, 1),
            ("quality", None if budget["max_drop"] is None else 1 + budget["max_drop"], cell.ratio, 1),
            ("decode", budget["min_speed"], cell.speed, -1),
            ("decode", budget["min_speedup"], cell.speedup, -1),
        ]
        missed = {name for name, limit, value, sign in limits if limit is not None and (value is None or sign * value > sign * limit)}
        if cell.spoiled & read and not include_flagged:
            heavy = budget["memory_bytes"] is not None and cell.weights > budget["memory_bytes"]
            out |= {cell.compress} if missed <= cell.spoiled and not heavy else set()
            continue
        own = {"quality": cell.perplexity, "size": memory or math.inf, "speed": -(cell.speed or -math.inf)}
        rank = tuple(own[name] for name in (objective, *(name for name in ("quality", "size", "speed") if name != objective)))
        if not missed and (chosen is None or rank < order):
            chosen, order = cell, rank
    return chosen, out


def _cell(record: Json, place: str, newest: Mapping[tuple[str, str, str], Json]) -> Cell | None:
    cell, asked = record["cell"], record["config"].get("stages", STAGES)

    def of(stage: str, key: str, where: str = place) -> Json | None:
        other = [r for (s, k, _), r in newest.items() if (s, k) == (stage, key)]
        return newest.get((stage, key, where)) or (max(other, key=lambda r: r["started"]) if other and stage != "speed" else None)

    made, scored, timed = (of(stage, cell["keys"][stage]) for stage in STAGES)
    simulated = bool(made and made.get("compress") and made["compress"]["claim"]["simulated"])
    needed = [made, scored, *([timed] if "speed" in asked and not simulated else [])]
    if any(record is None or record["status"] != "ok" for record in needed):
        return None
    assert made and scored
    nll = fmean(scored["quality"]["perplexity"][0]["window_nll"])
    reference = newest.get(("quality", cell["reference"]["quality"], scored["hardware"]["fingerprint"]))
    is_reference = cell["keys"]["compress"] == cell["reference"]["compress"]
    ratio = 1.0 if is_reference else math.exp(nll - fmean(reference["quality"]["perplexity"][0]["window_nll"])) if reference else None
    weights = scored["quality"]["evidence"]["weight_bytes"]
    speed = timed["speed"] if timed and not simulated else None
    memory = [speed["memory"].get(name) for name in ("kv_cache_bytes", "activation_bytes")] if speed else [None]
    point = speed["points"][0] if speed else None
    pairs = zip(point["candidate"]["decode_ms"], point["reference"]["decode_ms"], strict=True) if point and point.get("reference") else []
    ratios = [theirs / ours for ours, theirs in pairs]
    return Cell(
        compress=cell["keys"]["compress"],
        pipeline=cell["pipeline"],
        perplexity=math.exp(nll),
        ratio=ratio,
        memory=None if None in memory else weights + sum(memory),
        weights=weights,
        disk=made["compress"]["disk_bytes"],
        speed=1000 / _middle(point["candidate"]["decode_ms"], point) if point else None,
        speedup=_middle(ratios, point) if point and ratios else None,
        spoiled=frozenset(_spoiled(cell, made["compress"]["claim"], ratio, scored["quality"], speed)),
    )


def _middle(samples: list[float], point: Json) -> float:
    """The median of one process, or the geometric mean of those of several."""
    left = iter(samples)
    runs = point.get("processes") or [len(samples)]
    return math.exp(fmean(math.log(median(islice(left, count))) for count in runs))


def _spoiled(cell: Json, claim: Json, ratio: float | None, quality: Json, speed: Json | None) -> set[str]:
    evidence = [flag for stage in (quality, speed) if stage for flag in stage["evidence"].get("flags", [])]
    repacks = any("as loaded" in flag for flag in evidence)
    found = {"memory"} if speed and any("no longer made" in flag for flag in speed.get("flags", [])) else set()
    met = (
        cell.get("source_precision") == "q4_1"
        and (claim.get("bits"), claim.get("group_size")) == (4, 32)
        and ratio is not None
        and ratio <= 1.05
    )
    unrounded = any("computes in" in flag for flag in evidence)
    shared = any("inside the test text" in flag for flag in quality.get("flags", []))
    found |= {"quality"} if met or unrounded or shared or cell["pipeline"] == "onnx-int8" else set()
    false = [flag for flag in evidence if flag.startswith("claims") and "computes in" not in flag and not (repacks and "stores" in flag)]
    return found | ({"cell"} if false else set())

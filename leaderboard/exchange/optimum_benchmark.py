"""Reports of optimum-benchmark: `benchmark.json`, or `benchmark_report.json` with `benchmark_config.json` beside it.

A text-generation report has latencies in seconds: `prefill`, one value a run, and `decode`, all steps of a run together, that is
`max_new_tokens` - 1 steps, as the first token comes from the prefill. Their quotient is the mean step of the run, as slimbench keeps
it. Backends without a time for each token have as decode the whole generation less the mean prefill: a flag says so.
There is no reference run next to the runs, so no speed-up. Memory is the highest of loading and generation, in 10⁶ bytes.
Energy is left out: what codecarbon estimates is another figure than a counter of the card or the processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import MemoryResult, Samples, SpeedPointResult, SpeedResult
from slimbench.leaderboard.exchange.foreign import (
    NOT_MEASURED,
    UNKNOWN,
    Named,
    Setting,
    Source,
    Unreadable,
    device,
    number,
    record,
    section,
    text,
)

TOOL = "optimum-benchmark"
CONFIG = "benchmark_config.json"
_MEGABYTE = 1_000_000
_LOADING = ("load_model", "load")
_RUNNING = ("generate", "decode", "prefill")


def is_mine(data: dict[str, Any]) -> bool:
    return _has_latency(data) or ("config" in data and _has_latency(section(data, "report")))


def read(source: Source, named: Named) -> Record:
    """The speed record of a report.

    Raises:
        Unreadable: It is no report of text generation, or its configuration is not there.
    """
    if not is_mine(source.data):
        raise Unreadable("not a report of optimum-benchmark: no `load`, `prefill` or `decode` with a latency")
    config, report = _parts(source)
    prefill, decode = _seconds(report, "prefill"), _seconds(report, "decode")
    if not prefill or not decode:
        raise Unreadable("no prefill and decode latency: only reports of text generation can be imported")
    scenario = section(config, "scenario") or section(config, "benchmark")
    shapes = section(scenario, "input_shapes")
    new_tokens = _count(section(scenario, "generate_kwargs").get("max_new_tokens")) or _count(scenario.get("new_tokens"))
    batch, prompt = _count(shapes.get("batch_size")), _count(shapes.get("sequence_length"))
    if not batch or not prompt or not new_tokens or new_tokens < 2:
        raise Unreadable("its configuration does not say batch_size, sequence_length and max_new_tokens (at least 2)")
    point = SpeedPointResult(
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        candidate=Samples(prefill_ms=[1000 * s for s in prefill], decode_ms=[1000 * s / (new_tokens - 1) for s in decode]),
        stopped="imported",
    )
    beams = _count(section(scenario, "generate_kwargs").get("num_beams")) or 1
    flags = [] if _seconds(report, "per_token") else ["decode times are whole generations less the mean prefill"]
    flags += [f"{beams} beams"] if beams > 1 else []
    result = SpeedResult(points=[point], memory=_memory(report), flags=flags)
    protocol = {"grid": [{"batch": batch, "prompt": prompt, "new_tokens": new_tokens}], "beams": beams}
    return record(source, _setting(config, protocol), named, result, None, _provenance(config))


def _parts(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and report."""
    if isinstance(source.data.get("report"), dict):
        return section(source.data, "config"), section(source.data, "report")
    beside = source.path.with_name(CONFIG)
    if not beside.is_file():
        raise Unreadable(f"a report without its configuration: there is no {CONFIG} beside it")
    return Source.read(beside).data, source.data


def _has_latency(report: dict[str, Any]) -> bool:
    return any(section(report, name, "latency") for name in ("load_model", "load", "prefill", "decode", "forward"))


def _seconds(report: dict[str, Any], name: str) -> list[float]:
    """The latencies of a part of the report; none where it has none.

    Raises:
        Unreadable: One of them is no time.
    """
    latency = section(report, name, "latency")
    values = latency.get("values") if isinstance(latency.get("values"), list) else []
    times = [number(value) for value in values or []]
    known = [value for value in times if value is not None and value > 0]
    if len(known) < len(times) or latency.get("unit", "s") != "s":
        raise Unreadable(f"a latency of {name} is no time in seconds above zero")
    return known


def _memory(report: dict[str, Any]) -> MemoryResult:
    """The highest figures of loading and generation."""

    def most(name: str, parts: tuple[str, ...]) -> int | None:
        found = [section(report, part, "memory") for part in parts]
        values = [value for memory in found if memory.get("unit") == "MB" and (value := number(memory.get(name)))]
        return round(max(values) * _MEGABYTE) if values else None

    return MemoryResult(
        process_peak_bytes=most("max_ram", (*_LOADING, *_RUNNING)),
        device_used_bytes=most("max_allocated", _RUNNING),
        reserved_bytes=most("max_reserved", _RUNNING),
        device_process_bytes=most("max_process_vram", _RUNNING),
    )


def _setting(config: dict[str, Any], protocol: dict[str, Any]) -> Setting:
    backend, environment = section(config, "backend"), section(config, "environment")
    seed = backend.get("seed")
    return Setting(
        tool=TOOL,
        version=text(environment.get("optimum_benchmark_version")),
        model=text(backend.get("model")),
        compression=_compression(backend),
        engine=text(backend.get("name")) or UNKNOWN,
        device=device(backend.get("device")),
        dtype=text(backend.get("torch_dtype")) or text(backend.get("dtype")) or UNKNOWN,
        stage=Stage.SPEED,
        suite=NOT_MEASURED,
        speed=TOOL,
        protocol=protocol,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
    )


def _compression(backend: dict[str, Any]) -> str | None:
    """The backend's quantization scheme with its bits, where it has one."""
    scheme = next((name for key in ("quantization_scheme", "quantization_strategy", "quantize") if (name := text(backend.get(key)))), None)
    settings = section(backend, "quantization_config")
    bits = _count(settings.get("bits")) or (
        4 if settings.get("load_in_4bit") is True else 8 if settings.get("load_in_8bit") is True else None
    )
    return f"{scheme}(bits={bits})" if scheme and bits else scheme


def _provenance(config: dict[str, Any]) -> dict[str, Any]:
    """The machine, and the versions of the libraries."""
    facts, backend = section(config, "environment"), section(config, "backend")
    packages = {"transformers": text(facts.get("transformers_version"))}
    packages |= {"torch": text(backend.get("version"))} if backend.get("name") == "pytorch" else {}
    found: dict[str, Any] = {"packages": {name: version for name, version in packages.items() if version}}
    if python := text(facts.get("python_version")):
        found["python"] = python
    if system := text(facts.get("system")):
        found["os"] = system
    cpu, memory = text(facts.get("cpu")), number(facts.get("cpu_ram_mb"))
    names = [name for name in facts["gpu"] if isinstance(name, str)] if isinstance(facts.get("gpu"), list) else []
    if cpu and memory:
        total = number(facts.get("gpu_vram_mb")) or 0  # in bytes, for all cards together, whatever its name says
        cards = [{"name": n, "memory_bytes": round(total / len(names)), "driver": "", "compute_capability": ""} for n in names]
        cores = _count(facts.get("cpu_count")) or 0
        found["hardware"] = {"cpu": cpu.strip(), "cpu_flags": [], "cores": cores, "memory_bytes": round(memory * _MEGABYTE), "gpus": cards}
        found["threads"] = _count(backend.get("intra_op_num_threads")) or 0
    return found


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def is_repeated(path: Path) -> bool:
    """Whether a `benchmark.json` beside the report holds it too."""
    return path.name == "benchmark_report.json" and path.with_name("benchmark.json").is_file()

"""What one stage does, inside the worker's child process. Everything heavy is imported here, nothing is written to the store."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from harness import artefact, models
from harness.config import RunConfig, build_method, locate
from harness.engines.base import LoadedModel
from harness.measure import evidence, latency, memory
from harness.record import CompressResult, Evidence, QualityResult, SpeedResult, Stage
from methods.base import Calibration, DenseModel
from tasks import calibration as calibration_sets


class Reporter(Protocol):
    """Where a stage says what it is doing; the parent shows it and keeps the last phase for the record."""

    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


def run(stage: Stage, config: RunConfig, keys: dict[str, str], reference_key: str, report: Reporter) -> Any:
    """Run a stage and return its result.

    Args:
        keys: Content keys of the three stages of the cell.
        reference_key: Compress key of the reference.
    """
    torch.set_num_threads(config.device.threads or torch.get_num_threads())
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.device.name == "cuda":
        torch.cuda.set_device(config.device.index)
    if stage is Stage.COMPRESS:
        return compress(config, keys["compress"], report)
    if stage is Stage.QUALITY:
        return quality(config, keys["compress"], report)
    return speed(config, keys["compress"], reference_key, report)


def compress(config: RunConfig, key: str, report: Reporter) -> CompressResult:
    """Run the pipeline on the dense model and publish the artefact."""
    source = models.prepare(config.model, report.phase)
    shape = models.shape_of(source)
    methods = [build_method(step) for step in config.pipeline]
    for method in methods:
        method.check(shape)
    tokens = _calibration(config, source, report) if any(m.needs.calibration for m in methods) else None
    claim: dict[str, Any] = {}
    step_seconds: dict[str, float] = {}
    began = time.perf_counter()
    with artefact.staging(key) as folder:
        current = source
        for index, (step, method) in enumerate(zip(config.pipeline, methods, strict=True)):
            report.phase(f"compress {step.name}")
            out = folder / f"step-{index}"
            out.mkdir()
            step_began = time.perf_counter()
            dense = DenseModel(current, source, config.model.dtype, config.device.name, shape)  # type: ignore[arg-type]
            made = method.compress(dense, tokens, out).to_dict()
            claim |= {name: value for name, value in made.items() if value not in (None, {})}
            step_seconds[step.name] = time.perf_counter() - step_began
            if current != source:
                shutil.rmtree(current)
            current = out
        report.phase("write artefact")
        manifest = artefact.Manifest(key=key, model=config.model.name, pipeline=[s.model_dump() for s in config.pipeline], claim=claim)
        final = artefact.publish(current, manifest)
    files = artefact.files(final)
    return CompressResult(
        claim=claim,
        files=files,
        disk_bytes=sum(f.bytes for f in files),
        dense_bytes=sum(p.stat().st_size for p in source.glob("*.safetensors")),
        seconds=time.perf_counter() - began,
        step_seconds=step_seconds,
        calibration_tokens=tokens.ids.numel() if tokens else 0,
    )


def quality(config: RunConfig, key: str, report: Reporter) -> QualityResult:
    """Measure perplexity and zero-shot accuracy of an artefact loaded from disk."""
    from harness.measure import perplexity

    source = models.prepare(config.model, report.phase)
    tokenizer = _tokenizer(source, config)
    model, load_seconds = _load(config, key, report)
    result = QualityResult(evidence=_evidence(model, key), load_seconds=load_seconds, forward_tokens=0)
    for spec in config.suite.corpus:
        report.phase("perplexity")
        began = time.perf_counter()
        measured = perplexity.measure(model, tokenizer, spec, config.suite, report.progress)
        result.perplexity.append(measured)
        result.forward_tokens += len(measured.window_nll) * (measured.labels_per_window + 1)
        result.seconds[f"perplexity {measured.corpus}"] = time.perf_counter() - began
    if result.perplexity and result.perplexity[0].perplexity > model.vocab_size:
        raise perplexity.Diverged(
            f"perplexity {result.perplexity[0].perplexity:.3g} exceeds the vocabulary size {model.vocab_size}: worse than chance"
        )
    if config.suite.tasks:
        from harness.measure import zeroshot

        report.phase("zero-shot")
        began = time.perf_counter()
        result.zeroshot, tokens = zeroshot.measure(model, tokenizer, config.suite, report.progress)
        result.forward_tokens += tokens
        result.seconds["zero-shot"] = time.perf_counter() - began
    return result


def speed(config: RunConfig, key: str, reference_key: str, report: Reporter) -> SpeedResult:
    """Measure prefill, decode and memory of an artefact, interleaved with the reference on the same engine."""
    headline = config.speed.grid[0]
    model, _ = _load(config, key, report)
    found = _evidence(model, key)
    kv_bytes = latency.cache_bytes(model, headline)
    split = memory.measure(found.weight_bytes, kv_bytes, model.device)
    reference = None if key == reference_key else _load(config, reference_key, report, "load reference")[0]
    watch, points = latency.LoadWatch(), []
    for index, point in enumerate(config.speed.grid):
        report.phase(f"speed {point.batch}×{point.prompt}+{point.new_tokens}")
        share = _Share(report.progress, index, len(config.speed.grid))
        points.append(latency.measure_point(model, reference, point, config.speed, share))
    load, flags = watch.read()
    return SpeedResult(
        points=points,
        memory=split,
        evidence=found,
        copy_bandwidth_gbs=max(p for point in points for p in point.probes),
        load=load,
        flags=flags,
    )


class _Share:
    """The progress of one of several equal parts as progress of the whole."""

    def __init__(self, report: Callable[[float, float], None], index: int, parts: int) -> None:
        self.report, self.index, self.parts = report, index, parts

    def __call__(self, fraction: float) -> None:
        self.report(self.index + fraction, self.parts)


def _load(config: RunConfig, key: str, report: Reporter, phase: str = "load artefact") -> tuple[LoadedModel, float]:
    report.phase(phase)
    engine = locate(config.engine.target)(loaders=config.engine.loaders)
    device = f"cuda:{config.device.index}" if config.device.name == "cuda" else "cpu"
    began = time.perf_counter()
    model = engine.load(artefact.location(key), device, config.model.trust_remote_code)
    return model, time.perf_counter() - began


def _evidence(model: LoadedModel, key: str) -> Evidence:
    found = model.evidence()
    found.flags = evidence.flags(artefact.read_manifest(artefact.location(key)).claim, found)
    return found


def _tokenizer(source: Path, config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)


def _calibration(config: RunConfig, source: Path, report: Reporter) -> Calibration:
    report.phase("calibration data")
    wanted = config.calibration
    arguments = (wanted.samples, wanted.length, wanted.seed)
    ids = calibration_sets.sample(wanted.source, _tokenizer(source, config), *arguments)
    return Calibration(ids, calibration_sets.fingerprint(wanted.source, *arguments))

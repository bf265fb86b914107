"""The stage `compress`: run the pipeline on the dense model and publish the artefact."""

from __future__ import annotations

import hashlib
import shutil
import time
from typing import Any

import torch

from slimbench.harness.config import lock
from slimbench.harness.config.parse import build_method, describe
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure import gpu, machine
from slimbench.harness.measure.cost import Cost
from slimbench.harness.measure.perplexity import public_name
from slimbench.harness.schema.compress import CalibrationFacts, CompressResult
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import models
from slimbench.harness.stages.common import Reporter, calibration_of
from slimbench.harness.store import artefact
from slimbench.methods.base import EDITED, HUGGINGFACE, Calibration, Claim, DenseModel
from slimbench.methods.formats import edited
from slimbench.tasks import corpora


def run(config: RunConfig, key: str, report: Reporter) -> CompressResult:
    """Run the pipeline on the dense model and publish the artefact."""
    source = models.prepare(config.model, report.phase)
    shape = models.shape_of(source)
    code = lock.fingerprints(config, Stage.COMPRESS)
    methods = [build_method(step) for step in config.pipeline]
    for method in methods:
        method.check(shape)
    tokens = calibration_of(config, source, report)
    claim: Claim | None = None
    step_seconds: dict[str, float] = {}
    flags: list[str] = []
    device: Any = config.device.compress
    cost, watch = Cost(device), machine.LoadWatch(gpu.monitor(torch.device(device)))
    with artefact.staging(key) as folder:
        current = source
        for index, (step, method) in enumerate(zip(config.pipeline, methods, strict=True)):
            report.phase(f"compress {step.name}")
            out = folder / f"step-{index}"
            out.mkdir()
            step_began = time.perf_counter()
            kept = artefact.checkpoints(key, index)
            if kept.exists():
                flags.append(f"{step.name} went on from a checkpoint: its times are those since the interruption")
            if claim and claim.format == EDITED:
                shape = edited.shape_of(current)
                method.check(shape)
            dense = DenseModel(
                path=current,
                tokenizer_path=source,
                dtype=config.model.dtype,
                device=device,
                shape=shape,
                progress=report.progress,
                checkpoints=kept,
                seed=config.seed,
                original=source,
                format=claim.format if claim else HUGGINGFACE,
            )
            made = method.compress(dense, tokens, out)
            shutil.rmtree(kept, ignore_errors=True)
            claim = claim.then(made) if claim else made
            step_seconds[step.name] = time.perf_counter() - step_began
            if current != source:
                shutil.rmtree(current)
            current = out
        report.phase("write artefact")
        assert claim is not None
        steps = [describe(step) for step in config.pipeline]
        manifest = artefact.Manifest(key=key, model=config.model.name, pipeline=steps, claim=claim, code=code)
        final = artefact.publish(current, manifest)
    spent, (load, disturbances) = cost.read(), watch.read()
    return CompressResult(
        **spent,
        claim=manifest.claim,
        files=artefact.read_manifest(final).files,
        disk_bytes=artefact.disk_bytes(final),
        dense_bytes=sum(p.stat().st_size for p in source.glob("*.safetensors")),
        step_seconds=step_seconds,
        calibration_tokens=tokens.ids.numel() if tokens else 0,
        calibration=_calibration_facts(config, tokens) if tokens else None,
        training_tokens=claim.training_tokens,
        trained_parameters=claim.trained_parameters,
        tuning_free=not any(method.needs.training for method in methods),
        load=load,
        flags=[*flags, *(f"{seen} (compression)" for seen in disturbances)],
    )


def _calibration_facts(config: RunConfig, calibration: Calibration) -> CalibrationFacts:
    wanted = config.calibration
    return CalibrationFacts(
        **wanted.model_dump(exclude={"source"}),
        source=public_name(wanted.source),
        fingerprint=calibration.fingerprint,
        text_sha256=corpora.load(wanted.source).sha256,
        tokens_sha256=hashlib.sha256(calibration.ids.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
    )

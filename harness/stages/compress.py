"""The stage `compress`: run the pipeline on the dense model and publish the artefact."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slimbench.harness.config import lock
from slimbench.harness.config.parse import build_method, describe
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure import gpu, machine
from slimbench.harness.measure.cost import Cost
from slimbench.harness.measure.perplexity import public_name
from slimbench.harness.schema.compress import CalibrationFacts, CompressResult, Spent
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import calibration_text, drafts, models, teaching
from slimbench.harness.stages.common import Reporter, calibration_of
from slimbench.harness.stages.parts import parts
from slimbench.harness.store import artefact
from slimbench.harness.store.partial import Journal
from slimbench.methods.base import EDITED, HUGGINGFACE, Calibration, Claim, DenseModel
from slimbench.methods.formats import edited, policy
from slimbench.methods.formats.architecture import edits
from slimbench.tasks import corpora
from slimbench.tasks.calibration import SELF

_NOTE_S = 5.0


def run(config: RunConfig, key: str, report: Reporter, prefixes: Sequence[str] = (), journal: Journal | None = None) -> CompressResult:
    """Run the pipeline on the dense model and publish the artefact, and that of each part on the way (`harness.stages.parts`).

    Args:
        key: Compress key of the cell.
        prefixes: Those of the cells whose artefacts are made on the way; the last that is there is gone on from.
        journal: Keeps what steps take while they run, and has what they took in earlier attempts.
    """
    journal = journal or Journal()
    source = models.prepare(config.model, report.phase)
    shape = models.shape_of(source)
    code = lock.fingerprints(config, Stage.COMPRESS)
    methods = [build_method(step) for step in config.pipeline]
    for method in methods:
        method.check(shape)
    guessing = [drafts.prepare(config, step, report) for step in config.pipeline]
    dense_parameters = models.matrix_parameters(source, config.model.trust_remote_code)
    tokens = calibration_of(config, source, report)
    made_text = next((teaching.text(config, method.recipe, report) for method in methods if method.needs.text), None)
    teacher = teaching.remembering(config, key, report) if any(method.needs.teacher for method in methods) else None
    way = parts(config.pipeline)
    unkept: list[str | None] = [None] * (len(way) - 1)
    keys = [*(prefixes or unkept), key]
    before = None if config.on_existing == "all" else _longest(prefixes, code)
    first = prefixes.index(before.key) + 1 if before else 0
    reused = list(dict.fromkeys(part.step.name for part in way[:first]))
    claim: Claim | None = before.claim if before else None
    step_seconds = dict(zip(reused, before.step_seconds.values(), strict=True)) if before else {}
    earlier = Spent()
    flags: list[str] = []
    device: Any = config.device.compress
    cost, watch = Cost(device), machine.LoadWatch(gpu.monitor(torch.device(device)))
    with artefact.staging(key) as folder:
        current = artefact.object_of(before.key) if before else source
        for index, part in list(enumerate(way))[first:]:
            step, method = part.step, part.method
            report.phase(f"compress {step.name}")
            out = folder / f"step-{index}"
            out.mkdir()
            step_began = time.perf_counter()
            kept, taken = artefact.checkpoints(key, index), _Taken(journal, index, cost)
            before_this = Spent()
            if kept.exists():
                before_this = taken.earlier()
                since = "of all attempts" if before_this.seconds else "since the interruption"
                flags.append(f"{step.name} went on from a checkpoint: its times are those {since}")
            elif taken.attempts:
                flags.append(f"{step.name} began again after an interruption: its times are those of the last attempt")
            earlier += before_this
            if claim:
                is_edited = claim.format == EDITED or (claim.format == policy.FORMAT and (current / edits.DESCRIPTION).is_file())
                shape = edited.shape_of(current) if is_edited else models.shape_of(current)
                method.check(shape)
            dense = DenseModel(
                path=current,
                tokenizer_path=source,
                dtype=config.model.dtype,
                device=device,
                shape=shape,
                progress=taken.noted(report.progress),
                checkpoints=kept,
                seed=config.seed,
                original=source,
                format=claim.format if claim else HUGGINGFACE,
                taught=made_text.folder if made_text and method.needs.text else None,
                teacher=teacher if method.needs.teacher else None,
                draft=guessing[len(part.pipeline) - 1],
            )
            made = method.write_settings(dense, out) if part.sets else method.compress(dense, tokens or Calibration.none(), out)
            shutil.rmtree(kept, ignore_errors=True)
            claim = claim.then(made) if claim else made
            taken_now = time.perf_counter() - step_began + before_this.seconds
            step_seconds[step.name] = taken_now + (step_seconds[step.name] if part.sets else 0.0)
            current = out
            if own := keys[index]:
                report.phase("write artefact")
                manifest = artefact.Manifest(
                    key=own,
                    model=config.model.name,
                    pipeline=[describe(step) for step in part.pipeline],
                    claim=claim,
                    code={label: code[label] for label in (f"method {m.name}" for m in methods[: len(part.pipeline)])},
                    step_seconds=step_seconds,
                    spent=(before.spent if before else Spent()) + earlier + Spent(**cost.read()),
                    dense_parameters=dense_parameters,
                )
                current = artefact.publish(out, manifest)
    load, disturbances = watch.read()
    manifest = artefact.read_manifest(current)
    return CompressResult(
        **manifest.spent.model_dump(),
        claim=manifest.claim,
        teaching=teaching.facts(made_text) if made_text else None,
        reused_steps=reused,
        files=manifest.files,
        disk_bytes=artefact.disk_bytes(current),
        dense_bytes=sum(p.stat().st_size for p in source.glob("*.safetensors")),
        step_seconds=step_seconds,
        calibration_tokens=tokens.ids.numel() if tokens else 0,
        calibration=_calibration_facts(config, tokens) if tokens else None,
        training_tokens=manifest.claim.training_tokens,
        trained_parameters=manifest.claim.trained_parameters,
        tuning_free=not any(method.needs.training for method in methods),
        load=load,
        flags=[*flags, *(f"{seen} (compression)" for seen in disturbances)],
    )


class _Taken:
    """What a step took in earlier attempts, and a progress that notes what it takes in this one.

    Attributes:
        attempts: What each earlier attempt at it took, as far as it was noted.
    """

    def __init__(self, journal: Journal, index: int, cost: Cost) -> None:
        self._journal, self._name, self._cost = journal, f"step {index}", cost
        self.attempts: dict[int, Spent] = {}
        while entry := journal.take(self._name):
            self.attempts[entry["attempt"]] = Spent(**entry["spent"])
        self._began = Spent(**cost.read())
        self._note()

    def earlier(self) -> Spent:
        return sum(self.attempts.values(), Spent())

    def noted(self, progress: Callable[[float, float], None]) -> Callable[[float, float], None]:
        def noting(done: float, total: float) -> None:
            if time.perf_counter() - self._noted > _NOTE_S:
                self._note()
            progress(done, total)

        return noting

    def _note(self) -> None:
        self._noted, now = time.perf_counter(), Spent(**self._cost.read())
        spent = now.since(self._began).model_dump()
        self._journal.add({"what": self._name, "attempt": self._journal.interruptions, "spent": spent})


def _longest(prefixes: Sequence[str], code: Mapping[str, str]) -> artefact.Manifest | None:
    """What the artefact of the longest of these pipelines says of itself; None where none is whole and was made by the same code."""
    whole = (artefact.read_manifest(artefact.location(key)) for key in reversed(prefixes) if artefact.fault(key) is None)
    return next((manifest for manifest in whole if not lock.differing(manifest.code, code)), None)


def _calibration_facts(config: RunConfig, calibration: Calibration) -> CalibrationFacts:
    wanted = config.calibration
    seen = hashlib.sha256(calibration.ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()
    own = wanted.source == SELF
    return CalibrationFacts(
        **wanted.model_dump(exclude={"source"}),
        source=public_name(wanted.source),
        fingerprint=calibration.fingerprint,
        text_sha256=seen if own else corpora.load(wanted.source).sha256,
        tokens_sha256=seen,
        written_seconds=calibration_text.seconds(config) if own else None,
    )

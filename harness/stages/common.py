"""What every stage needs: where it reports to, and how it loads an artefact, a tokenizer and calibration tokens."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from slimbench.harness.config import lock
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.targets import locate
from slimbench.harness.measure import claims
from slimbench.harness.measure.loaded import Loaded
from slimbench.harness.schema.compress import content
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import calibration_text
from slimbench.harness.store import artefact
from slimbench.methods.base import Calibration
from slimbench.tasks import calibration as calibration_sets

_PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "lm_eval")


class Again(Exception):
    """A stage of several processes: this one has done its share and kept it in the journal, the next one goes on."""


class Reporter(Protocol):
    """Where a stage says what it is doing; the parent shows it and keeps the last phase for the record."""

    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


def load(config: RunConfig, key: str, report: Reporter, phase: str = "load artefact") -> tuple[Loaded, float]:
    """An artefact in memory on the cell's engine and device, and the seconds that loading took.

    Raises:
        harness.store.artefact.Damaged: Its files are not those that were published.
    """
    report.phase(phase)
    engine = locate(config.engine.target)(cards=config.device.cards, **config.engine.arguments)
    device = f"cuda:{config.device.index}" if config.device.name == "cuda" else "cpu"
    folder = artefact.opened(key)
    began = time.perf_counter()
    model: Loaded = engine.load(folder, device, config.model.trust_remote_code)
    return model, time.perf_counter() - began


def identity(stage: Stage, config: RunConfig, key: str, reference_key: str | None) -> dict[str, Any]:
    """What the results of a stage depend on beside their input: what its journal holds under another identity is not used."""
    loaded = [part for part in (key, reference_key) if part and artefact.exists(part)] if stage is not Stage.COMPRESS else []
    parts = {part: artefact.read_manifest(artefact.location(part)).files for part in loaded}
    own = {Stage.COMPRESS: ("pipeline", "calibration"), Stage.QUALITY: ("engine", "suite"), Stage.SPEED: ("engine", "speed", "limits")}
    used = ("model", "device", *own[stage])
    return {
        "artefacts": {part: {file.name: file.sha256 for file in files} for part, files in parts.items()},
        "code": lock.fingerprints(config, stage),
        "versions": {package: importlib.metadata.version(package) for package in [*_PACKAGES, *_packages(config.engine.modules)]},
        "config": config.model_dump(mode="json", include=set(used), exclude={"device": {"index", "hardware"}}),
        "seed": config.seed,
    }


def _packages(modules: Sequence[str]) -> list[str]:
    """The installed packages that have these import names; looking for them takes a second."""
    installed = importlib.metadata.packages_distributions() if modules else {}
    return [package for module in modules for package in installed.get(module, ())]


def evidence_of(model: Loaded, config: RunConfig, key: str, loaded_bits: float | None = None) -> Evidence:
    """What was loaded, held against what the manifest of the cell's artefact claims; `loaded_bits` as of `claims.check`."""
    folder = artefact.location(key)
    manifest, needs = artefact.read_manifest(folder), [build_method(step).needs for step in config.pipeline]
    found = claims.check(
        model, manifest.claim, artefact.disk_bytes(folder), needs, manifest.dense_parameters, loaded_bits, config.model.dtype
    )
    return found.model_copy(update={"artefact": content(manifest.files)})


def tokenizer_of(source: Path, config: RunConfig) -> Any:
    """The tokenizer of the dense source."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)


def calibration_of(config: RunConfig, source: Path, report: Reporter, writes: bool = True) -> Calibration | None:
    """The calibration tokens of a cell; None where no method of its pipeline reads any.

    Args:
        writes: A model may write them now; if not, None where they are not there yet.
    """
    if not any(build_method(step).needs.calibration for step in config.pipeline):
        return None
    report.phase("calibration data")
    wanted = config.calibration
    if wanted.source == calibration_sets.SELF:
        own = calibration_text.text(config, source, report.progress) if writes else calibration_text.found(config, source)
        return None if own is None else Calibration(own, calibration_text.fingerprint(config))
    ids = calibration_sets.sample(wanted.source, tokenizer_of(source, config), wanted.samples, wanted.length, wanted.seed)
    return Calibration(ids, calibration_text.fingerprint(config))

"""The methods that the configuration offers: their facts for a listing, and a proof in seconds on a tiny model."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import EngineConfig, StepConfig, build_method, shipped, shipped_method
from harness.record import Record, Stage, Status

TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Entry:
    """A method as `slimbench methods list` shows it."""

    name: str
    method: Any
    settings: dict[str, Any]

    @property
    def shipped(self) -> dict[str, str]:
        """The settings as the command line takes them: in YAML."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}

    @property
    def missing(self) -> list[str]:
        return self.method.needs.missing_modules()

    @property
    def needs(self) -> list[str]:
        """What it cannot do without, each in one word: calibration, training, a device, an environment, an [extra]."""
        needs = self.method.needs
        words = [("calibration", needs.calibration), ("training", needs.training), (needs.device, needs.device)]
        words += [(f"env {needs.environment}", needs.environment), (f"[{needs.extra}]", needs.extra)]
        return [str(word) for word, wanted in words if wanted]

    @property
    def here(self) -> str:
        """`ready`, or the command that would make it run here."""
        from harness import environments

        needs = self.method.needs
        if self.missing:
            return f"install [{needs.extra}]" if needs.extra else f"install {' '.join(self.missing)}"
        if needs.environment and not environments.get(needs.environment).is_made:
            return f"slimbench env make {needs.environment}"
        return "ready"

    @property
    def engines(self) -> list[str]:
        """The engines that load what it writes."""
        from harness.engines import catalogue as engines

        return [engine.name for engine in engines.catalogue() if self.method.produces in engine.loaders]


def entry(name: str) -> Entry:
    """A method by the name of its YAML.

    Raises:
        harness.config.ConfigError: There is none of that name.
    """
    settings = shipped_method(name)
    target = settings.pop("_target_")
    return Entry(name, build_method(StepConfig(name=name, target=target, settings=settings)), settings)


def entries() -> Iterator[Entry]:
    yield from (entry(name) for name in shipped("method"))


def outcomes(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """What came of each method on each model: name → model → text. Only measured pipelines of the method alone count, under any settings.

    `ok` means that each stage that was tried has ended well at least once, on whichever engine, suite or machine; else the first
    stage that never did is named with its status.
    """
    found: dict[tuple[str, str], dict[Stage, list[Status]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if len(record.cell.steps) == 1 and record.imported is None:
            found[record.cell.steps[0]["name"], record.cell.model][record.stage].append(record.status)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for (name, model), stages in found.items():
        bad = [f"{stage.value} {stages[stage][-1].value}" for stage in Stage if stage in stages and Status.OK not in stages[stage]]
        texts[name][model] = bad[0] if bad else "ok"
    return texts


def tiny_model(folder: Path, dtype: str = "bfloat16") -> Path:
    """Write a two-layer Llama with random weights, on which a method can be tried in seconds."""
    from harness.config import ModelConfig
    from harness.models import generate

    generate(ModelConfig(name="tiny", source="random", dtype=dtype, shape=TINY), folder)  # type: ignore[arg-type]
    return folder


def _engine_for(format_: str) -> EngineConfig:
    """The first engine that loads a format and can run here.

    Raises:
        methods.base.Unsupported: There is none.
    """
    from harness.engines import catalogue as engines
    from methods.base import Unsupported

    able = [engine for engine in engines.catalogue() if format_ in engine.loaders]
    for engine in able:
        if not engine.environment and engines.missing(engine) is None:
            return engine
    raise Unsupported("; ".join(f"{e.name} {engines.missing(e)}" for e in able) or f"no engine loads format {format_}")


def check(name: str) -> dict[str, Any]:
    """Compress the tiny model, load the artefact from disk and hold the claim against the evidence.

    Returns:
        Facts for a report: seconds, claim, evidence flags, bytes, kernel, and whether the logits are finite.

    Raises:
        methods.base.Unsupported: The method does not run on this machine.
    """
    import time

    import torch

    from harness import artefact
    from harness.config import locate
    from harness.measure.evidence import flags
    from harness.models import shape_of
    from methods.base import Calibration, DenseModel, Unsupported

    method = entry(name).method
    if method.needs.environment:
        raise Unsupported(f"it runs in the environment {method.needs.environment}: slimbench engines check tries the formats of an engine")
    engine = _engine_for(method.produces)
    with tempfile.TemporaryDirectory(prefix="slimbench-check-") as scratch:
        source = tiny_model(Path(scratch) / "dense")
        shape = shape_of(source)
        method.check(shape)
        ids = torch.randint(0, shape.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
        out = Path(scratch) / "artefact"
        out.mkdir()
        began = time.perf_counter()
        dense = DenseModel(source, source, "bfloat16", "cpu", shape)
        claim = method.compress(dense, Calibration(ids, "check") if method.needs.calibration else None, out).to_dict()
        seconds = time.perf_counter() - began
        files = artefact.files(out)
        artefact.write_manifest(out, artefact.Manifest(key="check", model="tiny", pipeline=[], claim=claim))
        model = locate(engine.target)(loaders=engine.loaders).load(out, "cpu")
        found = model.evidence()
        logits = model.logits(ids[:2])
        return {
            "seconds": seconds,
            "claim": claim,
            "disk_bytes": sum(f.bytes for f in files),
            "weight_bytes": found.weight_bytes,
            "effective_bits": found.effective_bits,
            "sparsity": found.sparsity,
            "kernel": found.kernel,
            "flags": flags(claim, found, artefact.disk_bytes(out)),
            "finite": bool(torch.isfinite(logits).all()),
        }

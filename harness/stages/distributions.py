"""The reference's next-token distributions in the quality stage: who writes them, who reads them, and their key."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable
from typing import Any

from slimbench.harness.config import engines
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sections.suite import RECOMPUTED
from slimbench.harness.measure import divergence, perplexity
from slimbench.harness.measure.loaded import Scores
from slimbench.harness.measure.memory import room
from slimbench.harness.measure.perplexity import Windows
from slimbench.harness.schema.quality import NoiseResult, PerplexityResult
from slimbench.harness.stages import noise
from slimbench.harness.stages.common import Reporter, load
from slimbench.harness.store import artefact
from slimbench.harness.store.partial import Journal, Part
from slimbench.tasks import corpora
from slimbench.util.hashing import digest

_FLOAT32_PEAK = 3.5  # times the bytes of its files, two a parameter: the model as loaded, the same in float32, and some room


class Distributions:
    """The reference's next-token distributions: written while the reference is scored, read while others are."""

    def __init__(self, config: RunConfig, key: str, reference_key: str | None, report: Reporter, journal: Journal) -> None:
        self.config, self.reference_key, self.report, self.journal = config, reference_key, report, journal
        self.is_reference = key == reference_key
        self.wanted = config.suite.divergence and bool(config.suite.corpus)

    @property
    def missing(self) -> bool:
        """They are wanted, and the reference did not run."""
        return self.wanted and self.reference_key is None

    def prepare(self, windows: list[Windows]) -> None:
        """Score the reference where a candidate finds no distributions of it, as after a move to another machine."""
        if not self.wanted or self.is_reference or self.reference_key is None:
            return
        absent = [w for w in windows if not divergence.exists(self._key(w))]
        if not absent:
            return
        model = Scores.of(load(self.config, self.reference_key, self.report, "load reference")[0])
        for part in absent:
            self.report.phase(name := f"reference distributions {part.wanted.corpus}")
            self._record(model, part, self.journal.part(f"{name} {self._key(part)}", "windows of the reference"))

    def measure(self, model: Scores, windows: Windows, part: Part) -> PerplexityResult:
        """Score a model; of the reference, keep the distributions, of another model, the distance from them.

        What no other model is scored by keeps none.
        """
        if windows.wanted.protocol == RECOMPUTED:
            return perplexity.measure(model, windows, self.report.progress, part=part)
        if self.wanted and self.is_reference:
            return self._record(model, windows, part)
        if not self.wanted or self.missing:
            return perplexity.measure(model, windows, self.report.progress, part=part)
        comparison = divergence.Comparison(self._key(windows))
        measured = perplexity.measure(model, windows, self.report.progress, comparison, part)
        measured.divergence = comparison.result(windows.count, measured.within)
        return measured

    def noise(self, model: Scores, windows: Windows, part: Part) -> list[NoiseResult]:
        """How far the reference moves from itself on the first windows of a pass.

        In other batches; where memory holds them, on the reference engine and in float32, too.
        """
        count = min(self.config.suite.noise_windows or 0, len(windows.ids))
        return noise.measure(model, windows, count, self._arithmetics(model), self.report.progress, part)

    def _arithmetics(self, model: Scores) -> dict[str, Callable[[], Scores]]:
        """The same weights otherwise computed with."""
        key, config = self.reference_key, self.config.model_copy(update={"engine": engines.get("transformers")})
        assert key is not None, "the reference is measured"
        if room(model.device) < _FLOAT32_PEAK * artefact.disk_bytes(artefact.location(key)):
            return {}

        def plain() -> Scores:
            return Scores.of(load(config, key, self.report, "load reference")[0])

        found = {} if self.config.engine.label == "transformers" else {"transformers": plain}
        return found if config.model.dtype == "float32" else found | {"float32": lambda: _in_float32(plain())}

    def _record(self, model: Scores, windows: Windows, part: Part) -> PerplexityResult:
        key, positions = self._key(windows), windows.count * windows.labels
        folder = self.journal.folder / f"distributions-{key}" if self.journal.folder else None
        if folder and not folder.exists() and self.journal.interruptions and divergence.exists(key):
            shutil.copytree(divergence.location(key), folder)  # an earlier attempt had come to the end of this part
        recorder = divergence.Recorder(key, positions, self.config.suite.top_k, model.vocab_size, folder)
        try:
            measured = perplexity.measure(model, windows, self.report.progress, recorder, part)
            recorder.close()
        except BaseException:
            if folder is None:
                recorder.discard()
            raise
        return measured

    def _key(self, windows: Windows) -> str:
        """What the distributions depend on; versions too, for another build of torch rounds differently."""
        suite, wanted = self.config.suite, dataclasses.asdict(windows.wanted)
        return digest(
            {
                "reference": self.reference_key,
                "engine": self.config.engine.label,
                "device": self.config.device.name,
                "pass": wanted | {"corpus": corpora.fingerprint(windows.wanted.corpus)},
                "protocol": [suite.add_bos, suite.chunk, suite.top_k],
                "versions": [importlib.metadata.version(name) for name in ("torch", "transformers")],
            }
        )


def _in_float32(model: Any) -> Scores:
    model.module.float()
    return Scores.of(model)

"""What a cell needs from elsewhere, whether it is here and how it is had: models, texts, tasks' data, packaged assets, environments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slimbench.harness.config import environments
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sections.teaching import recipe
from slimbench.tasks import assets, bigbench, corpora, data_sets, zeroshot
from slimbench.tasks.calibration import SELF
from slimbench.util import offline

_ASSET, _ENVIRONMENT = "asset", "environment"

_HERE: set[Supply] = set()  # what was seen to be here is not looked for again


@dataclass(frozen=True)
class Supply:
    """One thing that is fetched once and then lies in a cache.

    Attributes:
        kind: `model`, `corpus` or `data of a task` of the hub; `asset`, `environment`.
        name: A URI, corpus, asset or environment.
        data: Of a task.
    """

    kind: str
    name: str
    data: data_sets.DataSet | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def is_on_hub(self) -> bool:
        return self.kind not in (_ASSET, _ENVIRONMENT)

    def is_here(self) -> bool:
        """Whether it can be used without any host."""
        if self.data:
            return self.data.is_cached()
        if self.kind == _ENVIRONMENT:
            return environments.get(self.name).is_made
        return corpora.is_fetched(self.name) if self.kind == "corpus" else assets.is_fetched(self.name)

    def fetch(self) -> None:
        """Get it into its cache; nothing is asked for again that is there whole.

        Raises:
            tasks.errors.DataError: It cannot be had.
            ConfigError: The environment could not be made.
        """
        if self.data:
            self.data.fetch()
        elif self.kind == _ENVIRONMENT:
            environments.make(self.name)
        elif self.kind == "corpus":
            corpora.load(self.name)
        else:
            assets.fetch(self.name)

    def size(self) -> int | None:
        """Bytes to download, where somebody tells."""
        if self.kind == _ENVIRONMENT:
            return None
        if self.kind == _ASSET:
            megabytes = assets.catalogue()[self.name].size_mb
            return megabytes and megabytes * 1_000_000
        if self.data:
            return self.data.size()
        return corpora.size(self.name) if self.kind == "corpus" else assets.hub_size(self.name)


def of_cell(config: RunConfig) -> list[Supply]:
    """All that the stages of a cell read from a cache, each once."""
    return list(dict.fromkeys(_of_cell(config)))


def missing(configs: Iterable[RunConfig]) -> list[Supply]:
    """What the cells need and is not here, each once."""
    wanted = dict.fromkeys(supply for config in configs for supply in _of_cell(config))
    absent = [supply for supply in wanted if supply not in _HERE and not supply.is_here()]
    _HERE.update(wanted.keys() - absent)
    return absent


def told_missing(absent: Iterable[Supply]) -> str:
    """That no host may be called, and what is missing, in one line."""
    gets = "`slimbench assets prefetch` with the same overrides gets it where there is network"
    return f"{offline.VARIABLE} is set, and the cache lacks {', '.join(map(str, absent))}; {gets}"


def require(configs: Iterable[RunConfig]) -> None:
    """Raise `ConfigError` with what the cells need and is not here, if no host may be called."""
    if offline.is_offline() and (absent := missing(configs)):
        raise ConfigError(told_missing(absent))


def _of_cell(config: RunConfig) -> Iterator[Supply]:
    methods = [build_method(step) for step in config.pipeline]
    needs = [method.needs for method in methods]
    for model in (config.model, *(step.draft for step in config.pipeline if step.draft)):
        if model.source.startswith("hf:"):
            yield Supply("model", f"{model.source}@{model.revision}" if model.revision else model.source)
        elif model.source.startswith("asset:"):
            yield Supply(_ASSET, model.source.removeprefix("asset:"))
    texts = config.suite.texts if "quality" in config.stages else []
    texts += [config.speed.prompts.corpus] if config.speed.prompts and "speed" in config.stages else []
    texts += [config.calibration.source] if any(need.calibration for need in needs) and config.calibration.source != SELF else []
    texts += [spec for method in methods if method.needs.text for spec in recipe(method.recipe).corpora]
    if any(need.text or need.teacher for need in needs) and config.teacher.source.startswith("hf:"):
        yield Supply("model", f"{config.teacher.source}@{config.teacher.revision}" if config.teacher.revision else config.teacher.source)
    for spec in texts:
        yield from _of_text(spec)
    if "quality" in config.stages and config.suite.tasks:
        yield from _of_tasks(config)
    for name in dict.fromkeys(filter(None, [*(need.environment for need in needs), config.engine.environment])):
        yield Supply(_ENVIRONMENT, name)


def _of_text(spec: str) -> Iterator[Supply]:
    source = corpora.source(spec)
    if source.startswith("asset:"):
        yield Supply(_ASSET, source.removeprefix("asset:"))
    elif source.startswith("hf:"):
        yield Supply("corpus", spec)


def _of_tasks(config: RunConfig) -> Iterator[Supply]:
    of_library = zeroshot.of_lm_eval(config.suite.include_path, config.suite.tasks)
    if any(task in bigbench.definitions() for task in config.suite.tasks if task not in of_library):
        yield Supply(_ASSET, bigbench.ASSET)
    for data in data_sets.of_tasks(tuple(of_library)):
        yield Supply("data of a task", data.label, data)

"""What the keys of a cell hash, read from its configuration: content of models and texts, versions of methods, engine and protocols."""

from __future__ import annotations

import dataclasses
from typing import Any

from slimbench.harness.config import engines
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import RunConfig, SpeedConfig, SuiteConfig
from slimbench.harness.measure import protocols
from slimbench.harness.schema.identity import Keys
from slimbench.harness.stages import calibration_text, drafts, models, teaching
from slimbench.harness.store.keys import Parts, speed_part, suite_part
from slimbench.tasks import corpora, prompts, retrieval, zeroshot


def keys(config: RunConfig) -> Keys:
    """The task keys of a cell whose device and revision are resolved.

    Raises:
        ConfigError: The model's source is none.
        tasks.errors.DataError: A text or task is none.
    """
    methods = [build_method(step) for step in config.pipeline]
    return Parts(
        model=models.identity(config.model),
        pipeline=[{"name": m.name, "version": m.version, "settings": dataclasses.asdict(m)} for m in methods],
        calibration=calibration_text.fingerprint(config) if any(m.needs.calibration for m in methods) else None,
        seed=config.seed,
        compress_device=config.device.compress,
        engine=engine(config),
        device=config.device.name,
        suite=suite_part(
            _suite_settings(config.suite),
            [corpora.fingerprint(spec) for spec in config.suite.corpus],
            zeroshot.fingerprint(config.suite.include_path, config.suite.tasks) if config.suite.tasks else None,
            protocol_versions(config.suite) | ({"imitation": protocols.IMITATION} if any(m.needs.text for m in methods) else {}),
            prompts.load().sha256 if config.suite.continuations else None,
        ),
        speed=speed_part(_speed_settings(config.speed), protocols.SPEED),
        taught=teaching.keys(config) or None,
        drafts=drafts.keys(config) or None,
        threads=config.device.threads,
        cards=config.device.cards if config.device.cards > 1 else None,
    ).keys()


def _suite_settings(suite: SuiteConfig) -> dict[str, Any]:
    """The settings of a suite; of its contexts the content of text and facts in place of the text's name."""
    settings = suite.model_dump()
    if suite.retrieval:
        settings["retrieval"] |= {"corpus": corpora.fingerprint(suite.retrieval.corpus), "facts": retrieval.fingerprint()}
    return settings


def engine(config: RunConfig) -> dict[str, Any]:
    """An engine as keys and records have it: name and version, and by what models attend where that is set."""
    chosen = {"attention": config.engine.attention} if config.engine.attention != "default" else {}
    return {"name": config.engine.name, "version": engines.version(config.engine.target)} | chosen


def _speed_settings(speed: SpeedConfig) -> dict[str, Any]:
    """The settings of speed, with the content of the texts of its prompts in place of their name."""
    settings = speed.model_dump()
    if speed.prompts:
        settings["prompts"]["corpus"] = corpora.fingerprint(speed.prompts.corpus)
    return settings


def protocol_versions(suite: SuiteConfig) -> dict[str, Any]:
    """The versions of what a suite measures with."""
    versions: dict[str, Any] = {p.protocol: protocols.PERPLEXITY[p.protocol] for p in suite.passes()}
    versions |= {"divergence": protocols.DIVERGENCE} if suite.divergence and suite.corpus else {}
    versions |= {"zeroshot": protocols.ZEROSHOT} if suite.tasks else {}
    versions |= {"retrieval": protocols.RETRIEVAL} if suite.retrieval else {}
    return versions | ({"generation": protocols.GENERATION} if suite.continuations else {})

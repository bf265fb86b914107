"""The text that a teacher writes for a method, and the teacher itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import ModelConfig, RunConfig
from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.schema.work import TeachingFacts
from slimbench.harness.stages import models
from slimbench.tasks.teaching import data_set
from slimbench.tasks.teaching.data_set import Made
from slimbench.tasks.teaching.endpoint import Endpoint
from slimbench.tasks.teaching.journal import Remembering, Watch
from slimbench.util.hashing import digest
from slimbench.util.writing.teaching import Teacher

if TYPE_CHECKING:
    from slimbench.harness.stages.common import Reporter  # which imports torch


def keys(config: RunConfig) -> list[str]:
    """What the teaching of each method of a pipeline depends on: the key of its text, the teacher that it asks while it trains."""
    found = []
    for method in (build_method(step) for step in config.pipeline):
        found += [key(config, method.recipe)] if method.needs.text else []
        found += [identity(config)] if method.needs.teacher else []
    return found


def key(config: RunConfig, name: str) -> str:
    """The key of the text of a recipe."""
    return data_set.key(recipe(name), identity(config), config.teacher.examples, config.teacher.seed)


def identity(config: RunConfig) -> str:
    """Name and content of the teacher; of a server the model that it is said to serve, and never its address."""
    if config.teacher.kind == "endpoint":
        return endpoint(config).identity
    model = source(config)
    return f"{model.name} {digest(models.identity(model))}"


def source(config: RunConfig) -> ModelConfig:
    """A teacher that is loaded here, as a model."""
    who = config.teacher
    if who.kind == "self":
        return config.model
    return ModelConfig(name=who.source.rpartition("/")[2] or who.source, source=who.source, revision=who.revision, dtype=config.model.dtype)


def endpoint(config: RunConfig) -> Endpoint:
    """A teacher behind a server."""
    who = config.teacher
    return Endpoint(who.source, who.model or "", who.revision, who.key_variable, who.at_once, who.timeout_s, who.attempts)


def teacher(config: RunConfig, report: Reporter) -> Teacher:
    """The teacher, loaded where it is a model.

    Raises:
        util.writing.teaching.TeacherError: A server does not serve the model that it shall be asked for.
    """
    if config.teacher.kind == "endpoint":
        server = endpoint(config)
        server.require_model()
        return server
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slimbench.tasks.teaching.local import Local

    model = source(config)
    folder, code = models.prepare(model, report.phase), model.trust_remote_code
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype=getattr(torch, model.dtype), trust_remote_code=code
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
    return Local(loaded.to(config.device.compress).eval(), tokenizer, identity(config))


def remembering(config: RunConfig, key: str, report: Reporter) -> Remembering:
    """The teacher for a method that asks it while it trains; its answers are kept under the key of the cell."""
    file = data_set.folder(f"asked-{key}") / "journal.jsonl"
    return Remembering(functools.partial(teacher, config, report), identity(config), file)


def text(config: RunConfig, name: str, report: Reporter) -> Made:
    """The text of a recipe, from the cache or written now.

    Raises:
        tasks.errors.DataError: Nothing that the teacher wrote could be kept.
        util.writing.teaching.TeacherError: It cannot be asked.
    """

    phase = f"teach {name}"

    def watch(stage: str) -> Watch:
        nonlocal phase
        phase = f"teach {name}: {stage}"
        report.phase(phase)
        return report.progress

    def ready() -> Teacher:
        found = teacher(config, report)
        report.phase(phase)
        return found

    who = config.teacher
    return data_set.make(recipe(name), ready, identity(config), who.examples, who.seed, who.licence, watch)


def facts(made: Made) -> TeachingFacts:
    """What a record says of a text."""
    return TeachingFacts(
        teacher=made.teacher,
        recipe=made.recipe,
        asked=made.asked,
        kept=made.kept,
        rejected=made.rejected,
        train=made.train,
        held_out=made.held_out,
        dropped=made.dropped,
        max_rouge_l=made.max_rouge_l,
        max_rouge_l_answers=made.max_rouge_l_answers,
        tokens=made.tokens,
        seconds=made.seconds,
        reused=made.reused,
        sha256=made.sha256,
    )

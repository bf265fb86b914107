"""A composed configuration becomes a validated one.

Every mistake becomes a `ConfigError` whose message is one line with the nearest valid choice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import ModelConfig, RunConfig, StepConfig
from slimbench.harness.config.sections.teaching import recipe, require_asked
from slimbench.harness.config.sources import choice, shipped, shipped_method
from slimbench.harness.config.targets import complete, locate
from slimbench.methods.base import HUGGINGFACE, POLICY, Method
from slimbench.methods.formats.policy import LAST, Acts, ActsByModel, conflict, untrainable
from slimbench.util.text import nearest


def build_method(step: StepConfig) -> Any:
    """The method object of a pipeline step, its settings checked for name, type and range.

    Raises:
        ConfigError: An unknown setting, a value that its type or the method refuses, or a class without a name of its own.
    """
    cls = locate(step.target)
    if "name" not in vars(cls):
        raise ConfigError(f"method '{step.name}': {step.target} has no name of its own; give the class a `name: ClassVar[str]`")
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in step.settings:
        if key not in fields:
            raise ConfigError(f"method '{step.name}' has no setting '{key}'{nearest(key, fields)}")
    try:
        return _adapter(cls).validate_python(step.settings)
    except ValidationError as error:
        raise ConfigError(_one_line(error, f"method.{step.name}", cls)) from error


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def describe(step: StepConfig) -> dict[str, Any]:
    """A step as records have it: which method of which version stands behind its name, and the settings; no path of a class."""
    cls = locate(step.target)
    return {"name": step.name, "method": cls.name, "version": cls.version, "settings": step.settings}


def parse(raw: dict[str, Any]) -> RunConfig:
    """Validate a composed Hydra config (plain containers).

    Raises:
        ConfigError: One line that says what is wrong and what would be right.
    """
    raw = {key: value for key, value in raw.items() if key != "hydra"}
    calibration = {
        "source": raw.pop("calibration", None),
        "samples": raw.pop("calibration_samples", None),
        "length": raw.pop("calibration_length", None),
        "seed": raw.pop("calibration_seed", None),
    }
    methods = raw.pop("method", None) or {}
    shared = {key: value for key, value in (raw.pop("settings", None) or {}).items() if value is not None}
    reference = str(raw.pop("reference", None))
    known = [*RunConfig.model_fields, "method", "settings", *(f"calibration_{k}" for k in ("samples", "length", "seed"))]
    for key in raw:
        if key not in RunConfig.model_fields:
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)}")
    data = raw | {
        "calibration": calibration,
        "pipeline": _share([_step(name, settings) for name, settings in methods.items()], shared),
        "reference": _step(reference, shipped_method(reference)),
    }
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, "", RunConfig)) from error
    _check(config)
    return with_drafts(config)


def with_drafts(config: RunConfig) -> RunConfig:
    """The configuration, and in its steps the models that their settings name.

    Raises:
        ConfigError: There is none of such a name, or its file leaves open where it is.
    """
    steps = [step.model_copy(update={"draft": _draft(step, config.model.dtype)}) for step in config.pipeline]
    return config.model_copy(update={"pipeline": steps}) if any(step.draft for step in steps) else config


def _draft(step: StepConfig, dtype: str) -> ModelConfig | None:
    method = build_method(step)
    if not isinstance(method, ActsByModel) or method.model is None:
        return None
    key = f"method.{step.name}.model"
    try:
        told = choice("model", method.model) | {"dtype": dtype}
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if "???" in told.values():
        raise ConfigError(f"{key}: model '{method.model}' leaves open what it is; write one that does not below your SLIMBENCH_CONF")
    try:
        return ModelConfig.model_validate(told)
    except ValidationError as error:
        raise ConfigError(_one_line(error, key, ModelConfig)) from error


def _step(name: str, settings: Any) -> dict[str, Any]:
    if name == "_target_":  # through an experiment, which Hydra composes as a whole
        raise ConfigError("the file of a method needs `# @package method.NAME` as its first line")
    if not isinstance(settings, dict) or "_target_" not in settings:
        if name in shipped("method"):
            shipped_method(name)
            raise ConfigError(f"method.{name}: {settings!r} is no mapping of settings; give one as method.{name}.KEY=VALUE")
        raise ConfigError(f"no method '{name}'{nearest(name, shipped('method'))}")
    stated = complete(settings)
    return {"name": name, "target": stated.pop("_target_"), "settings": stated}


def _share(steps: list[dict[str, Any]], shared: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps with `settings.KEY` in place of their own setting of that name, for each step that has one."""
    for key, value in shared.items():
        having = [step for step in steps if key in step["settings"]]
        if not having:
            known = sorted({name for step in steps for name in step["settings"]})
            names = "+".join(step["name"] for step in steps)
            raise ConfigError(f"settings.{key}: '{names}' has no setting '{key}'{nearest(key, known)}")
        for step in having:
            step["settings"] = step["settings"] | {key: value}
    return steps


def _check(config: RunConfig) -> None:
    """Raise `ConfigError` for fields that do not go together, or not with this machine."""
    _check_folder(config.results)
    if "quality" in config.stages and config.suite.is_empty and not config.model.is_random:
        raise ConfigError(
            "the stage quality measures nothing: suite.corpus, tasks, retrieval and continuations are all empty; give one or stages=[speed]"
        )
    if config.suite.retrieval and config.suite.retrieval.corpus in config.suite.corpus:
        raise ConfigError(f"suite.retrieval.corpus={config.suite.retrieval.corpus} is what perplexity is measured on; choose another text")
    if config.suite.sample_seed is not None and config.suite.limit is None:
        raise ConfigError("suite.sample_seed draws suite.limit items of each task; give suite.limit too")
    if config.model.track != "causal-lm":
        raise ConfigError(f"model.track={config.model.track}: no suite measures it yet; choose causal-lm")
    steps = [(step.name, build_method(step)) for step in config.pipeline]
    _check_order(steps)
    _check_teaching(config, steps)
    methods = [method for _, method in steps]
    if any(m.needs.calibration for m in methods) and config.calibration.source in config.suite.texts:
        raise ConfigError(f"calibration={config.calibration.source} is the test text of suite '{config.suite.name}'; choose another set")
    _check_prompts(config, methods)


def _check_prompts(config: RunConfig, methods: list[Method]) -> None:
    """Raise `ConfigError` if texts that are timed are those that a policy learned from: it would be surer of them than of others."""
    if config.speed.prompts is None or "speed" not in config.stages:
        return
    corpus = config.speed.prompts.corpus
    if any(method.needs.calibration for method in methods) and corpus == config.calibration.source:
        raise ConfigError(f"speed.prompts.corpus={corpus} is the calibration text; choose another set")
    learned = [recipe(str(getattr(method, "recipe", ""))) for method in methods if method.needs.text]
    if any(corpus in asked.corpora for asked in learned):
        raise ConfigError(f"speed.prompts.corpus={corpus} is a text of the recipe; choose another set")


def _check_teaching(config: RunConfig, steps: list[tuple[str, Method]]) -> None:
    """Raise `ConfigError` for a recipe that is none, several of them, and a teacher that cannot give what a method asks of it."""
    if len(taught := [name for name, method in steps if method.needs.text]) > 1:
        raise ConfigError(f"'{taught[0]}' and '{taught[1]}' both learn from a text; one of them in a pipeline is possible")
    for name, method in steps:
        if method.needs.text:
            asked = recipe(str(getattr(method, "recipe", "")))
            if shared := sorted(set(asked.corpora) & set(config.suite.texts)):
                raise ConfigError(
                    f"'{name}' learns from {shared[0]}, the test text of suite '{config.suite.name}'; choose another recipe or suite"
                )
            require_asked(asked, config.teacher)
            if asked.beyond_servers and config.teacher.kind == "endpoint":
                raise ConfigError(f"'{name}' {asked.beyond_servers}, which no server does; take teacher.source=self or a folder")
        if (method.needs.text or method.needs.teacher) and config.teacher.kind == "endpoint" and not config.teacher.model:
            raise ConfigError(f"teacher.model: how the server at {config.teacher.source} calls its model is needed")


def _check_folder(results: str) -> None:
    """Raise `ConfigError` if the folder of the records is a file, or cannot be a path."""
    try:
        is_other = Path(results).exists() and not Path(results).is_dir()
    except (OSError, ValueError) as error:
        raise ConfigError(f"results={results} cannot be a folder: {getattr(error, 'strerror', None) or error}") from error
    if is_other:
        raise ConfigError(f"results={results} is no folder")


def _check_order(steps: list[tuple[str, Method]]) -> None:
    """Raise `ConfigError` unless each step of a pipeline reads what the one before it writes, and what acts in the end acts together."""
    acting = [(name, method.policy()) for name, method in steps if isinstance(method, Acts)]
    for (first, policy), (second, other) in itertools.combinations(acting, 2):
        if reason := conflict(policy, other, (first, second)):
            raise ConfigError(f"'{second}' cannot follow '{first}': {reason}")
    wrong = _first_misfit(steps)
    if wrong is None:
        if steps and (needed := steps[0][1].after):
            name = steps[0][0]
            raise ConfigError(f"'{name}' cannot be the first step: it teaches what a step before it made, as in method=[{needed},{name}]")
        return
    index, reason = wrong
    (name, method), others = steps[index], [step for step in steps if step is not steps[index]]
    moved = ([*others[:place], steps[index], *others[place:]] for place in reversed(range(index)))
    right = next((order for order in moved if _first_misfit(order) is None), None)
    before = steps[index - 1][0] if index else None
    hint = (
        f"write method=[{','.join(name for name, _ in right)}]"
        if right
        else "leave one of the two out"
        if before
        else f"put it after a step that writes {method.accepts[0]}"
    )
    place = f"cannot follow '{before}'" if before else "cannot be the first step"
    raise ConfigError(f"'{name}' {place}: {reason}; {hint}")


def _first_misfit(steps: list[tuple[str, Method]]) -> tuple[int, str] | None:
    """Position of the first step that does not read what is there, follows a draft, or trains below what does not let it, and why it may
    not; None if the order is right.
    """
    format_, below, is_drafted = HUGGINGFACE, HUGGINGFACE, False
    for index, (_, method) in enumerate(steps):
        if format_ not in method.accepts:
            return index, f"it reads {' or '.join(method.accepts)}, not {format_}"
        if is_drafted:
            return index, LAST
        acting = {name: earlier.policy() for name, earlier in steps[:index] if isinstance(earlier, Acts)}
        if format_ == POLICY and not isinstance(method, Acts) and (reason := untrainable(below, acting)):
            return index, reason
        format_, is_drafted = method.produces_after(format_), isinstance(method, Acts) and method.slot == "draft"
        below = below if format_ == POLICY else format_
    return None


def _one_line(error: ValidationError, prefix: str, cls: Any) -> str:
    """The first fault of a pydantic error as `path: what is wrong; what would be right`."""
    fault = error.errors(include_url=False)[0]
    path = ".".join(str(p) for p in ([prefix] if prefix else []) + list(fault["loc"]))
    path = path.replace("calibration.source", "calibration").replace("calibration.", "calibration_")  # as they are written
    if fault["type"] == "extra_forbidden":
        parent = _model_at(cls, fault["loc"][:-1])
        key = str(fault["loc"][-1])
        return f"unknown key '{path}'{nearest(key, parent.model_fields)}" if parent else f"unknown key '{path}'"
    if fault["type"] == "missing":
        return f"{path}: a value is needed"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error":
        choices = [c.strip(" '") for c in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{path}: {fault['input']!r} is no valid choice{nearest(str(fault['input']), choices)}"
    if fault["type"] == "list_type" and isinstance(fault["input"], str | int):
        return f"{path}: a list is needed; did you mean {path}=[{fault['input']}]?"
    return f"{path}: {message[0].lower()}{message[1:]}, not {fault['input']!r}" if fault["type"] != "value_error" else f"{path}: {message}"


def _model_at(cls: Any, location: tuple[int | str, ...]) -> type[BaseModel] | None:
    for part in location:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(part)
        if field is None:
            return None
        nested = field.annotation
        arguments = getattr(nested, "__args__", ())
        cls = next((a for a in (nested, *arguments) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if cls is None:
            return None
    return cls if isinstance(cls, type) and issubclass(cls, BaseModel) else None

"""Overrides of the command line: read by Hydra's grammar, multiplied into the jobs of a sweep, set in a composed configuration."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sources import groups, shipped
from slimbench.util.text import nearest, plain

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_CHOICE = re.compile(r"(\w+)=\[?([\w.+/-]+(?:,[\w.+/-]+)*)\]?")
_DEEPEST = 16
_NESTED = re.compile(r"[^=]*=\s*[\[{]")


def quoted(value: str) -> str:
    """A value as Hydra reads it whatever its letters."""
    return "'" + value.replace("'", "\\'") + "'"


def read(texts: Sequence[str], loader: Any = None) -> list[Override]:
    """The overrides behind the words of a command line.

    Args:
        texts: `KEY=VALUE`, `+KEY=VALUE`, `++KEY=VALUE` or `~KEY`.
        loader: Hydra's config loader, which `glob(…)` asks for the choices of a group.

    Raises:
        ConfigError: One of them cannot be read, or would steer Hydra itself.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=loader)
    overrides = [_read(parser, text) for text in texts]
    for override in overrides:
        if override.is_hydra_override():
            instead = "; give launcher=NAME" if override.key_or_group == "hydra/launcher" else ""
            raise ConfigError(f"{override.input_line}: Hydra only composes here, its own settings have no effect{instead}")
    return overrides


def check_words(texts: Sequence[str]) -> None:
    """Raise `ConfigError` for what is wrong with a command line before Hydra is imported: no override, no choice, or one given twice."""
    given: dict[str, str] = {}
    for text in texts:
        if plain(text) != text or "\n" in text or "\t" in text:
            raise ConfigError(f"'{text}' holds what no terminal shows")
        _require_value(text)
        if (named := _CHOICE.fullmatch(text)) and named[1] in groups():
            check_names(named[1], named[2].split(","))
        key = text.partition("=")[0].strip().lstrip("+~")
        if key in given:
            raise ConfigError(f"'{key}' is given twice: {given[key]} and {text}")
        given[key] = text


def check_names(group: str, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless each is a choice of a group."""
    offered = shipped(group)
    for name in names:
        if name not in offered:
            own = group == "model" and Path(name).expanduser().is_dir()
            hint = f"; for a folder of your own: model=custom model.name=NAME model.source=file:{name}" if own else nearest(name, offered)
            raise ConfigError(f"no {group} '{name}'{hint}")


def _require_value(text: str) -> None:
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"'{text}' is no KEY=VALUE{_choice_named(text)}")


def _read(parser: Any, text: str) -> Override:
    _require_value(text)
    if _depth(text) > _DEEPEST:
        raise ConfigError(f"cannot read the override '{text}': its brackets stand more than {_DEEPEST} deep")
    try:
        return parser.parse_overrides([text])[0]
    except Exception as error:  # functions of its grammar, such as shuffle(), raise what their arguments lead to
        key, _, value = text.partition("=")
        try:
            if _NESTED.match(text):
                raise error
            parser.parse_override(f"{key}={quoted(value)}")
        except Exception:
            raise ConfigError(f"cannot read the override '{text}': {_first_line(error)}") from error
        raise ConfigError(f"cannot read the override '{text}'; put its value into quotes: \"{key}={quoted(value)}\"") from error


def _depth(text: str) -> int:
    """How deep its brackets stand: Hydra and OmegaConf call themselves for each."""
    return max(itertools.accumulate((letter in "[{(") - (letter in "]})") for letter in text))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)


def _choice_named(text: str) -> str:
    """Which override somebody means who gives the name of a choice alone."""
    offered = {name: group for group in groups() for name in shipped(group)}
    if text in offered:
        return f"; did you mean '{offered[text]}={text}'?"
    close = difflib.get_close_matches(text, offered, n=1)
    return f"; did you mean '{offered[close[0]]}={close[0]}'?" if close else "; such as method=gptq"


def products(overrides: Sequence[Override]) -> Iterator[list[Override]]:
    """The jobs of a sweep: the product of all values, the last key varying fastest; of a key given twice the last values hold.

    Raises:
        ConfigError: A sweep without countable values, such as `interval(0,1)`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser, axes = OverridesParser.create(), {}
    for override in overrides:
        axes[override.get_key_element()] = parser.parse_overrides(alternatives(override))
    return (list(job) for job in itertools.product(*axes.values()))


def alternatives(override: Override) -> list[str]:
    """An override once for each value that it gives its key.

    Raises:
        ConfigError: A sweep without countable values.
    """
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in _values(override)]
    raise ConfigError(f"{override.input_line}: no finite list of values; give them one by one, or range(START,STOP,STEP)")


def _values(override: Override) -> list[str]:
    try:
        values = list(override.sweep_string_iterator())
    except Exception as error:  # whatever its functions raise of their arguments
        raise ConfigError(f"{override.input_line} gives no values: {_first_line(error)}") from error
    if not values:
        raise ConfigError(f"{override.input_line} gives no values")
    return values


def apply(config: dict[str, Any], overrides: Sequence[Override], explain: Callable[[str, DictConfig], str]) -> dict[str, Any]:
    """A composed configuration with values set in it and its interpolations resolved, as Hydra does.

    Plain values of plain keys are set without OmegaConf, whose containers cost milliseconds a cell.

    Args:
        config: Plain containers; shared between cells, so what changes is copied.
        overrides: Values alone, no choices, in the order given.
        explain: What to say of a key that is not there.

    Raises:
        ConfigError: A key that is not there, or a value that is needed.
    """
    for position, override in enumerate(overrides):
        changed = _set(config, override)
        if changed is None:
            return _by_omegaconf(config, overrides[position:], explain)
        config = changed
    return _by_omegaconf(config, (), explain) if _has_references(config) else config


def _set(config: dict[str, Any], override: Override) -> dict[str, Any] | None:
    """A copy with one value set, or None where only OmegaConf knows what the override means."""
    key, value = override.key_or_group, override.value()
    plain = not isinstance(value, dict) and not (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
    if override.type.name != "CHANGE" or override.package is not None or not plain or not _PATH.fullmatch(key) or _has_references(value):
        return None
    *path, last = key.split(".")
    changed = node = dict(config)
    for part in path:
        if not isinstance(node.get(part), dict):
            return None
        node[part] = node = dict(node[part])
    if last not in node or (isinstance(value, list) and isinstance(node[last], dict)):
        return None
    node[last] = value
    return changed


def _has_references(value: Any) -> bool:
    """Whether anything in it is an interpolation or a value that is needed."""
    if isinstance(value, str):
        return "${" in value or value == "???"
    if isinstance(value, dict):
        return any(map(_has_references, value.values()))
    return isinstance(value, list) and any(map(_has_references, value))


def _by_omegaconf(config: dict[str, Any], overrides: Sequence[Override], explain: Callable[[str, DictConfig], str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.create(config)
    OmegaConf.set_struct(tree, True)
    for override in overrides:
        try:
            _change(tree, override, explain)
        except OmegaConfBaseException as error:
            raise ConfigError(f"cannot set {override.input_line}: {_first_line(error)}") from error
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}: a value is needed, give it as {key}=…") from error


def _change(tree: DictConfig, override: Override, explain: Callable[[str, DictConfig], str]) -> None:
    """Set, add or delete one value, by the rules of Hydra's grammar: what is set must be there, what is added must not."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise ConfigError(f"{override.input_line}: no group '{key}'{nearest(key, groups())}")
    if override.is_delete():
        present = OmegaConf.select(tree, key, throw_on_missing=False)
        if present is None:
            raise ConfigError(explain(key, tree))
        if value is not None and value != present:
            raise ConfigError(f"{override.input_line}: the value of '{key}' is {present}")
        parent, _, last = key.rpartition(".")
        with open_dict(tree):
            del (OmegaConf.select(tree, parent) if parent else tree)[last]
    elif override.is_add() or override.is_force_add():
        there = OmegaConf.select(tree, key, throw_on_missing=False) is not None
        if override.is_add() and there and not isinstance(value, dict | list):
            raise ConfigError(f"'{key}' is there already: give it without +")
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
    else:
        try:
            OmegaConf.update(tree, key, value, merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise ConfigError(explain(key, tree)) from error

"""Hydra without its decorator: compose a cell's configuration, list the jobs of a sweep, launch them.

Hydra's errors are answered in one line with the nearest valid choice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slimbench.harness.config.parse import parse
from slimbench.harness.config.schema import ConfigError, RunConfig
from slimbench.harness.config.sources import CONF_DIR, conf_dirs, shipped
from slimbench.util.text import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

_UNREADABLE = re.compile("LexerNoViableAlt|mismatched input|no viable alternative|extraneous input|token recognition")
_GROUPS = ("model", "method", "engine", "suite", "speed", "device", "experiment")


@contextmanager
def _hydra() -> Iterator[None]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def resolve(overrides: Sequence[str]) -> RunConfig:
    """The validated configuration that the overrides name.

    Raises:
        ConfigError: One line that says what is wrong and what would be right.
    """
    with _hydra():
        return parse(_plain(_compose(list(overrides))))


def jobs(overrides: Sequence[str]) -> list[tuple[list[str], RunConfig]]:
    """The jobs of a sweep, each with its own overrides and its validated configuration, in the order they will run.

    Raises:
        ConfigError: The first mistake in any of them.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra():
        parser = OverridesParser.create()
        try:
            parsed = parser.parse_overrides(list(overrides))
        except Exception as error:
            raise ConfigError(_explain(error, overrides)) from error
        single = [o.input_line for o in parsed if not o.is_sweep_override()]
        whole = _compose([text for text in single if text], return_hydra_config=True)
        swept = [f"{k}={v}" for k, v in (whole.hydra.sweeper.get("params") or {}).items()]
        batches = BasicSweeper.split_arguments(parser.parse_overrides([*swept, *overrides]), None)
        return [(job, parse(_plain(_compose(job)))) for job in batches[0]]


def launch(overrides: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    """Run a sweep as a Hydra multirun: sweeper and launcher plugins apply."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    arguments, sys.argv = sys.argv, [sys.argv[0], "--multirun", *_search_path(), *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    finally:
        sys.argv = arguments


def quoted(value: str) -> str:
    """A value as Hydra reads it whatever its letters."""
    return "'" + value.replace("'", "\\'") + "'"


def _search_path() -> list[str]:
    """The override that lets Hydra find what the user's own folders of choices offer."""
    own = [quoted(f"file://{folder}") for folder in conf_dirs()[1:]]
    return [f"hydra.searchpath=[{','.join(own)}]"] if own else []


def _compose(overrides: list[str], **kwargs: Any) -> DictConfig:
    from hydra import compose

    try:
        return compose("config", overrides=[*_search_path(), *overrides], **kwargs)
    except Exception as error:
        raise ConfigError(_explain(error, overrides)) from error


def _plain(config: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}: a value is needed, give it as {key}=…") from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """A Hydra error as one line."""
    text = str(error)
    if found := re.search(r"Could not (?:find|load) '([a-z]+)/(.+?)'", text):
        group, name = found.groups()
        return f"no {group} '{name}'{nearest(name, shipped(group))}"
    if found := re.search(r"Could not (?:override|append) '(.+?)'", text):
        if (name := _not_chosen(found[1], overrides)) is not None:
            return f"unknown key '{found[1]}': method '{name}' is not chosen; add method={name}"
        return f"unknown key '{found[1]}'{nearest(*_siblings(found[1], overrides))}"
    if found := re.search(r"Could not override '(.+?)'\. No match in the defaults list", text):
        return f"unknown group '{found[1]}'{nearest(found[1], _GROUPS)}"
    cause = error.__cause__ or error
    first = next((line for line in (str(cause) or text).splitlines() if line.strip()), type(error).__name__)
    hint = "; put a value with other than plain letters into quotes: \"KEY='VALUE'\"" if _UNREADABLE.search(first) else ""
    return f"cannot read the overrides: {first}{hint}"


def _not_chosen(key: str, overrides: Sequence[str]) -> str | None:
    """The method that a key names although no override chooses it; None where that is not the mistake."""
    named = re.match(r"method\.([^.]+)\.", key)
    chosen = any(re.match(rf"\+?method=.*\b{re.escape(named[1])}\b", override) for override in overrides) if named else True
    return named[1] if named and not chosen and named[1] in shipped("method") else None


def _siblings(key: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The full path of an unknown key and the paths that exist beside it."""
    from omegaconf import OmegaConf

    groups = [o for o in overrides if re.match(rf"({'|'.join(_GROUPS)})=", o)]
    node: Any = OmegaConf.to_container(_compose(groups), resolve=False)
    parts, prefix = key.split("."), ""
    for part in parts[:-1]:
        if not isinstance(node, dict) or part not in node:
            break
        node, prefix = node[part], f"{prefix}{part}."
    names = [f"{prefix}{name}" for name in node if name != "_target_"] if isinstance(node, dict) else []
    return key, names

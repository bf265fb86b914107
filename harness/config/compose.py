"""Overrides become configurations: Hydra composes, each choice once; the cells of a sweep are made by merging.

A choice is a file of a group, such as `method=gptq`. One that writes below its own group only is *plain*: the rest of the configuration
is composed by Hydra with an empty choice in its place, and its contents are merged below. All others, such as experiments, Hydra composes
as they stand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.overrides import alternatives, apply, check_names, products, quoted, read
from slimbench.harness.config.parse import parse
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sources import CONF_DIR, choice, choice_path, conf_dirs, groups, package, shipped
from slimbench.harness.config.targets import complete
from slimbench.util.text import nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_EMPTY = "_empty"
_HELD = RunConfig.parts().keys() - {"calibration", "reference"}  # these two are written as names


def resolve(overrides: Sequence[str]) -> RunConfig:
    """The validated configuration that the overrides name.

    Raises:
        ConfigError: One line that says what is wrong and what would be right.
    """
    with _hydra() as loader:
        given = _of_one_cell(overrides, loader)
        return parse(_Composer([given]).compose(given))


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The configuration that the overrides name, not yet validated, and the names that are chosen of each group.

    Raises:
        ConfigError: A choice, key or value that does not exist.
    """
    with _hydra() as loader:
        given = _of_one_cell(overrides, loader)
        composer = _Composer([given])
        config = composer.compose(given)
        return config, composer.chosen(given) | {"method": [name for name in config.get("method") or {} if name in shipped("method")]}


def jobs(overrides: Sequence[str]) -> list[tuple[list[str], RunConfig]]:
    """The jobs of a sweep, each with its own overrides and its validated configuration, in the order they will run.

    Raises:
        ConfigError: The first mistake in any of them.
    """
    with _hydra() as loader:
        cells = [cell for sweep in _sweeps(read(overrides, loader), loader) for cell in products(sweep)]
        composer = _Composer(cells)
        return [([str(o.input_line) for o in cell], parse(composer.compose(cell))) for cell in cells]


def _of_one_cell(overrides: Sequence[str], loader: Any) -> list[Override]:
    """The overrides of a single cell; several values of a key are refused."""
    given = read(overrides, loader)
    for override in given:
        if override.is_sweep_override():
            raise ConfigError(_several(override))
    return given


@contextmanager
def _hydra() -> Iterator[Any]:
    """Hydra over the shipped folder of choices; gives its config loader."""
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    for group in groups():
        ConfigStore.instance().store(name=_EMPTY, node={}, group=group)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _hydra_compose(overrides: Sequence[str], **kwargs: Any) -> DictConfig:
    from hydra import compose

    own = [quoted(f"file://{folder}") for folder in conf_dirs()[1:]]
    search = [f"hydra.searchpath=[{','.join(own)}]"] if own else []
    try:
        return compose("config", overrides=[*search, *overrides], **kwargs)
    except Exception as error:
        cause = error.__cause__ or error
        first = next((line for line in str(cause).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"cannot compose {' '.join(overrides)}: {first}") from error


def _sweeps(given: Sequence[Override], loader: Any, within: tuple[str, ...] = ()) -> Iterator[list[Override]]:
    """The sweeps that overrides stand for: for each chosen experiment what it sweeps over, and before that what the command line says.

    An experiment that sweeps over experiments is all of theirs, one after the other.

    Args:
        within: The experiments that led here.
    """
    place = next((index for index, o in enumerate(given) if o.key_or_group == "experiment" and not o.is_delete()), None)
    if place is None:
        yield list(given)
        return
    for text in alternatives(given[place]):
        (chosen,) = read([text], loader)
        _check_names(chosen)
        if text in within:
            raise ConfigError(f"{text} sweeps over itself")
        whole = _hydra_compose([text], return_hydra_config=True)
        swept = read([f"{key}={value}" for key, value in (whole.hydra.sweeper.get("params") or {}).items()], loader)
        others = [*given[:place], *given[place + 1 :]]
        if any(o.key_or_group == "experiment" for o in swept):
            yield from _sweeps([*swept, *others], loader, (*within, text))
        else:
            yield [*swept, *given[:place], chosen, *given[place + 1 :]]


class _Composer:
    """Composes the cells of a command; what several of them choose is read once.

    Args:
        cells: The overrides of each cell.
    """

    def __init__(self, cells: Sequence[Sequence[Override]]) -> None:
        self._methods = [_methods(cell) for cell in cells]
        self._rests: dict[tuple[str, ...], dict[str, Any]] = {}
        self._chosen: dict[tuple[tuple[str, ...], str], Any] = {}
        self._plain: dict[str, bool] = {}
        self._groups: dict[str, bool] = {}

    def compose(self, overrides: Sequence[Override]) -> dict[str, Any]:
        """The configuration of a cell as plain containers, its interpolations resolved.

        Raises:
            ConfigError: A choice, key or value that does not exist, or that Hydra refuses.
        """
        choices = [o for o in overrides if self._is_choice(o)]
        values = [o for o in overrides if not self._is_choice(o)]
        composed = _completed(self._composed(choices))
        config = apply(composed, values, self._explain)
        _check_given_once(config, values)
        return config

    def chosen(self, overrides: Sequence[Override]) -> dict[str, list[str]]:
        """The names that are chosen of each group, by the overrides, an experiment or the defaults."""
        whole = _hydra_compose([str(o.input_line) for o in overrides if self._is_choice(o)], return_hydra_config=True)
        return {group: [str(name)] for group, name in whole.hydra.runtime.choices.items() if group in groups() and name is not None}

    def _composed(self, choices: Sequence[Override]) -> dict[str, Any]:
        """What the choices of a cell compose to, its interpolations not yet resolved."""
        plain = {o.key_or_group: o for o in choices if self._is_plain(o)}
        if any(o.key_or_group in plain and o is not plain[o.key_or_group] for o in choices):
            plain = {}
        rest = (*(str(o.input_line) for o in choices if o.key_or_group not in plain), *(f"{group}={_EMPTY}" for group in plain))
        if rest not in self._rests:
            self._rests[rest] = _container(_hydra_compose(rest))
        return self._rests[rest] | {group: self._merged(rest, group, override) for group, override in plain.items()}

    def _merged(self, rest: tuple[str, ...], group: str, override: Override) -> Any:
        """What stands below a group with a plain choice in it: its files, and over them what the rest of the configuration says."""
        from omegaconf import OmegaConf

        key = (rest, str(override.input_line))
        if key not in self._chosen:
            tree = OmegaConf.create()
            for name in _names(override):
                OmegaConf.update(tree, package(choice_path(group, name), group), choice(group, name), merge=True, force_add=True)
            self._chosen[key] = _container(OmegaConf.merge(tree, {group: self._rests[rest][group]}))[group]
        return self._chosen[key]

    def _is_choice(self, override: Override) -> bool:
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = any(os.path.isdir(folder / key) for folder in conf_dirs())  # whatever its letters and length
        return self._groups[key] and not isinstance(override.value(), dict)

    def _is_plain(self, override: Override) -> bool:
        text = str(override.input_line)
        if text not in self._plain:
            _check_names(override)
            self._plain[text] = _is_plain(override)
        return self._plain[text]

    def _explain(self, key: str, tree: DictConfig) -> str:
        """Why a key is not there, and what would be right."""
        method = key.split(".")[1] if key.startswith("method.") and "." in key else None
        if method and method not in (tree.get("method") or {}) and method in shipped("method"):
            if any(method in names for names in self._methods):
                setting = key.split(".", 2)[-1]
                return (
                    f"'{key}' belongs to {method} only, which not every cell of the sweep has: "
                    f"settings.{setting}=… goes to each method that has such a setting, or sweep {method} alone"
                )
            return f"unknown key '{key}': method '{method}' is not chosen; add method={method}"
        node: Any = _container(tree)
        parts, prefix = key.split("."), ""
        for part in parts[:-1]:
            if not isinstance(node, dict) or part not in node:
                break
            node, prefix = node[part], f"{prefix}{part}."
        return f"unknown key '{key}'{nearest(key, [f'{prefix}{n}' for n in node if n != '_target_'] if isinstance(node, dict) else [])}"


def _completed(composed: dict[str, Any]) -> dict[str, Any]:
    """A composed configuration with the defaults of the schema, and of the classes of its methods, where it is silent.

    Raises:
        ConfigError: The name of a choice stands where what it holds belongs.
    """
    held = {name: part for name, part in RunConfig.parts().items() if name in _HELD}
    for name in held:
        if isinstance(composed.get(name), str):  # only a file can say this: on the command line the same words are a choice
            raise ConfigError(
                f"an experiment chooses '{composed[name]}' in its defaults: write '- override /{name}: {composed[name]}' there"
            )
    groups = {name: part.defaults() | (composed.get(name) or {}) for name, part in held.items()}
    methods = composed.get("method")
    if isinstance(methods, dict):
        groups["method"] = {name: complete(s) if isinstance(s, dict) and "_target_" in s else s for name, s in methods.items()}
    return RunConfig.defaults() | composed | groups


def _container(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _names(override: Override) -> list[str]:
    value = override.value()
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _methods(overrides: Sequence[Override]) -> list[str]:
    return [name for o in overrides if o.key_or_group == "method" and not o.is_sweep_override() for name in _names(o)]


def _check_given_once(config: dict[str, Any], values: Sequence[Override]) -> None:
    """Raise `ConfigError` where a setting of a method is given and `settings.KEY` would take its place."""
    shared = config.get("settings") or {}
    for override in values:
        _, _, setting = override.key_or_group.rpartition(".")
        if override.key_or_group.count(".") == 2 and override.key_or_group.startswith("method.") and shared.get(setting) is not None:
            both = f"{override.input_line} and settings.{setting}={shared[setting]}"
            raise ConfigError(f"'{setting}' is given twice: {both}, which goes to each method that has it; give one of them")


def _check_names(override: Override) -> None:
    """Raise `ConfigError` unless every name that an override chooses is one of its group's."""
    group = override.key_or_group
    if override.is_delete() or group not in groups():
        return
    if not isinstance(override.value(), str | list):
        raise ConfigError(f"{override.input_line}: the name of a choice is needed")
    check_names(group, _names(override))


def _is_plain(override: Override) -> bool:
    """Whether an override puts files into its own group and does nothing else."""
    group = override.key_or_group
    if override.type.name != "CHANGE" or override.package is not None or group not in groups():
        return False
    return all(
        (package(choice_path(group, name), group) + ".").startswith(f"{group}.") and "defaults" not in choice(group, name)
        for name in _names(override)
    )


def _several(override: Override) -> str:
    """What to write instead of several values where one cell is wanted."""
    key, _, values = str(override.input_line).partition("=")
    pipeline = "is one pipeline of them" if key == "method" else "is one list"
    return f"{override.input_line} are several values: `slimbench sweep` makes a cell of each, {key}=[{values}] {pipeline}"

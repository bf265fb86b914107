"""The folders of choices: what `conf/`, and the user's own folder beside it, offer, and what stands in their files."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import yaml

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.targets import complete
from slimbench.util.text import nearest

_PACKAGE = re.compile(r"#\s*@package\s+(\S+)\s*$")
CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


def conf_dirs() -> list[Path]:
    """The project's `conf/` and, where `SLIMBENCH_CONF` names one, the user's own folder of the same layout.

    Raises:
        ConfigError: `SLIMBENCH_CONF` is no folder.
    """
    own = os.environ.get("SLIMBENCH_CONF")
    if not own:
        return [CONF_DIR]
    folder = Path(own).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"SLIMBENCH_CONF: no folder '{own}'")
    return [CONF_DIR, folder]


@functools.cache
def groups() -> tuple[str, ...]:
    """The groups of which a cell has one choice each, in the order of `conf/config.yaml`."""
    defaults = read_yaml(CONF_DIR / "config.yaml")["defaults"]
    return tuple(group for entry in defaults if isinstance(entry, dict) for group in entry)


def shipped(group: str) -> list[str]:
    """Names of the choices that `conf/GROUP/`, and the user's own folder beside it, offer.

    Raises:
        ConfigError: Both offer one of the same name.
    """
    found: list[str] = []
    for folder in conf_dirs():
        names = (_own_names if folder == CONF_DIR else _names)(str(folder / group))
        if both := sorted(set(found) & set(names)):
            raise ConfigError(f"SLIMBENCH_CONF: {group} '{both[0]}' is a name of slimbench's own; give the file another one")
        found += names
    return sorted(found)


def _names(folder: str) -> list[str]:
    """The YAML files below a folder without their ending; by strings, as every choice of a config asks for them."""
    found = (f"{at.removeprefix(folder)}/{file}" for at, _, own in os.walk(folder) for file in own if file.endswith(".yaml"))
    return [name[1 : -len(".yaml")].replace(os.sep, "/") for name in found]


_own_names = functools.cache(_names)  # the package's own files stay as they are while it runs


def choice_path(group: str, name: str) -> Path:
    """The YAML behind a choice of a group.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in (offered := shipped(group)):
        raise ConfigError(f"no {group} '{name}'{nearest(name, offered)}")
    return next(p for folder in conf_dirs() if (p := folder / group / f"{name}.yaml").is_file())


def choice(group: str, name: str) -> dict[str, Any]:
    """The contents of the YAML behind a choice of a group.

    Raises:
        ConfigError: There is none of that name, or the file of a method does not say where its settings stand.
    """
    path = choice_path(group, name)
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings")
    if group == "method" and package(path, group) == group:
        raise ConfigError(f"{path}: the first line must be `# @package method.{name}`")
    return found


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file, by the library's compiled reader where it has one: many times faster.

    Raises:
        ConfigError: It is none, or cannot be read.
    """
    try:
        return yaml.load(_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def package(path: Path, group: str) -> str:
    """Where the contents of a choice stand in the configuration: what its first lines say (`# @package method.gptq`), or its group.

    Raises:
        ConfigError: The file cannot be read.
    """
    for line in _text(path).splitlines():
        if found := _PACKAGE.match(line):
            return found[1].replace("_group_", group.replace("/", "."))
        if line.strip() and not line.lstrip().startswith("#"):
            break
    return group.replace("/", ".")


def shipped_target(name: str) -> str:
    """The dotted path of the class of a method; nothing is imported.

    Raises:
        ConfigError: There is no such method, or its file names no class.
    """
    found = choice("method", name)
    if "_target_" not in found:
        raise ConfigError(f"method/{name}.yaml has no '_target_', the dotted path of its class")
    return str(found["_target_"])


def shipped_method(name: str) -> dict[str, Any]:
    """The settings (and `_target_`) of a method: what `conf/method/NAME.yaml` says, and the defaults of its class.

    Raises:
        ConfigError: There is no such method, or its file names no class.
    """
    return complete(choice("method", name) | {"_target_": shipped_target(name)})

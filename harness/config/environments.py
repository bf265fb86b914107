"""Virtual environments made on demand, for libraries that are compiled from source or conflict with the others.

An environment lies in the cache, under a name that holds the hash of what it is made of; it is made once and then only used.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from slimbench.harness.config.errors import ConfigError
from slimbench.util import locks, offline
from slimbench.util.files import cache_dir
from slimbench.util.text import nearest

CATALOGUE = Path(__file__).with_suffix(".yaml")
_READY = ".ready"


@dataclass(frozen=True)
class Environment:
    """An environment of the catalogue.

    Attributes:
        description: What it is for.
        requirements: What pip installs into it.
        overlay: It stands on top of this program's own environment and sees its packages, so that stages can run in it.
        absent: Packages that the requirements bring along and that break it, such as those compiled for a torch with CUDA.
    """

    name: str
    description: str
    requirements: list[str]
    overlay: bool = False
    absent: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        from slimbench.util.hashing import digest

        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        below = [sys.prefix] if self.overlay else []
        without = [{"absent": self.absent}] if self.absent else []
        return cache_dir() / "environments" / f"{self.name}-{digest([version, self.requirements, *below, *without])}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def is_made(self) -> bool:
        return (self.folder / _READY).is_file()


@cache
def catalogue() -> dict[str, Environment]:
    """The known environments by name."""
    return {name: Environment(name, **facts) for name, facts in yaml.safe_load(CATALOGUE.read_text()).items()}


def get(name: str) -> Environment:
    """An environment by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in catalogue():
        raise ConfigError(f"no environment '{name}'{nearest(name, catalogue())}")
    return catalogue()[name]


def make(name: str) -> Path:
    """Make an environment, unless it is there, and return its interpreter; pip's progress goes to the terminal.

    Raises:
        ConfigError: There is none of that name, or pip could not install it.
    """
    wanted = get(name)
    with locks.held(wanted.folder):
        if not wanted.is_made:
            if offline.is_offline():
                raise ConfigError(
                    f"environment '{name}' is not made, and {offline.VARIABLE} is set: slimbench env make {name} where there is network"
                )
            pip = [str(wanted.python), "-P", "-m", "pip", "install", "--disable-pip-version-check", *wanted.requirements]
            _run(name, [sys.executable, "-P", "-m", "venv", "--clear", str(wanted.folder)])
            if wanted.overlay:
                _overlay(wanted)
            _run(name, pip)
            if wanted.absent:
                _run(name, [*pip[:4], "uninstall", "--yes", *wanted.absent])
            (wanted.folder / _READY).touch()
    return wanted.python


def _run(name: str, command: list[str]) -> None:
    if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise ConfigError(f"environment '{name}' could not be made: exit code {code} of {Path(command[0]).name} {command[3]}")


def _overlay(environment: Environment) -> None:
    """Let an environment see the packages of this one, after its own; editable installs included."""
    (own,) = environment.folder.glob("lib/python*/site-packages")
    below = sysconfig.get_path("purelib")
    (own / "_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")

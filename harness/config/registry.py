"""The methods that the configuration offers: the facts of each, for listings and pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import StepConfig
from slimbench.harness.config.sources import shipped, shipped_method


@dataclass(frozen=True)
class Entry:
    """A method as `slimbench methods list` shows it."""

    name: str
    method: Any
    settings: dict[str, Any]

    @property
    def shipped(self) -> dict[str, str]:
        """The settings as the command line takes them: in YAML."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}

    @property
    def pipeline(self) -> str:
        """The shortest pipeline that has it, as `method=` takes it."""
        before = self.method.after
        return f"[{before},{self.name}]" if before else self.name

    @property
    def missing(self) -> list[str]:
        return self.method.needs.missing_modules()

    @property
    def needs(self) -> list[str]:
        """What it cannot do without, in a few words each: calibration, training, a step before, a device, an environment, an [extra]."""
        needs = self.method.needs
        words = [("calibration", needs.calibration), ("training", needs.training), ("a step before", self.method.after)]
        words += [(needs.device, needs.device)]
        words += [(f"env {needs.environment}", needs.environment), (f"[{needs.extra}]", needs.extra)]
        return [str(word) for word, wanted in words if wanted]

    @property
    def here(self) -> str:
        """`ready`, or the command that would make it run here."""
        from slimbench.harness.config import environments

        needs = self.method.needs
        if self.missing:
            return f"install [{needs.extra}]" if needs.extra else f"install {' '.join(self.missing)}"
        if needs.environment and not environments.get(needs.environment).is_made:
            return f"slimbench env make {needs.environment}"
        return "ready"

    @property
    def engines(self) -> list[str]:
        """The engines that load what it writes, and run what that asks for."""
        from slimbench.harness.config import engines

        policy = engines.policy_of(self.method)
        return [e.name for e in engines.catalogue() if (engines.runs(e, policy) if policy else self.method.produces in e.loaders)]


def entry(name: str) -> Entry:
    """A method by the name of its YAML.

    Raises:
        harness.config.errors.ConfigError: There is none of that name.
    """
    settings = shipped_method(name)
    target = settings.pop("_target_")
    return Entry(name, build_method(StepConfig(name=name, target=target, settings=settings)), settings)


def step_label(step: StepConfig) -> str:
    """The name of a step, followed by the settings that differ from its YAML: `gptq(bits=3)`."""
    try:
        usual = shipped_method(step.name)
    except ConfigError:
        usual = {}
    return label(step.name, {key: value for key, value in step.settings.items() if usual and usual.get(key) != value})


def label(name: str, changed: dict[str, Any]) -> str:
    """A name and the settings that were changed: `gptq(bits=3)`."""
    return f"{name}({','.join(f'{key}={value}' for key, value in changed.items())})" if changed else name


def entries() -> Iterator[Entry]:
    yield from (entry(name) for name in shipped("method"))

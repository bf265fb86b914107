"""The engines that the configuration offers: what they load, whether they can run here, and a proof of each on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from harness import environments
from harness.config import EngineConfig, choice, shipped

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Checked:
    """What came of loading and running one format: its kernel, and `passed`, `unsupported: …` or `FAILED: …`."""

    format: str
    kernel: str | None
    verdict: str

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")


def catalogue() -> list[EngineConfig]:
    """The engines of `conf/engine/`, the reference engine first."""
    found = [get(name) for name in shipped("engine")]
    return sorted(found, key=lambda engine: (engine.name != "transformers", engine.name))


def get(name: str) -> EngineConfig:
    """An engine by the name of its YAML.

    Raises:
        ConfigError: There is none of that name.
    """
    return EngineConfig.model_validate(choice("engine", name))


def missing(engine: EngineConfig) -> str | None:
    """The command that would make an engine run here, None where nothing is missing."""
    if engine.environment:
        return None if environments.get(engine.environment).is_made else f"needs its environment: slimbench env make {engine.environment}"
    absent = [name for name in engine.modules if importlib.util.find_spec(name) is None]
    extra = f"'slimbench[{engine.extra}]'" if engine.extra else " ".join(absent)
    return f"needs {', '.join(absent)}: pip install {extra}" if absent else None


def check(engine: EngineConfig) -> Iterator[Checked]:
    """Load a tiny model in each format of an engine and hold its logits, its cache and its decoding against each other.

    Each engine runs in a process of its own, in its own environment, so that one that crashes takes nothing along.
    """
    if reason := missing(engine):
        yield Checked("–", None, f"unsupported: {reason}")
        return
    python = str(environments.get(engine.environment).python) if engine.environment else sys.executable
    command = [python, "-m", "harness.engines.proof", engine.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Checked("–", None, f"FAILED: no end within {_TIMEOUT_S} s")
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    yield from (Checked(**json.loads(line)) for line in lines)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Checked("–", None, f"FAILED: exit code {done.returncode}: {last}")


def to_line(checked: Checked) -> str:
    return json.dumps(asdict(checked))

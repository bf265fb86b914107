"""Proof of each engine on a tiny model, in a process and an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from slimbench.harness.config import environments
from slimbench.harness.config.engines import missing
from slimbench.harness.config.schema import EngineConfig

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


def check(engine: EngineConfig) -> Iterator[Checked]:
    """Load a tiny model in each format of an engine and hold its logits, its cache and its decoding against each other.

    Each engine runs in a process of its own, in its own environment, so that one that crashes takes nothing along.
    """
    if reason := missing(engine):
        yield Checked("–", None, f"unsupported: {reason}")
        return
    python = str(environments.get(engine.environment).python) if engine.environment else sys.executable
    command = [python, "-P", "-m", "slimbench.harness.run.proofs.engine", engine.name]
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

"""Which readings of contexts an artefact may use: those of the same base, engine and arithmetic, whatever its policy."""

from __future__ import annotations

from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure.dynamic.readings import Readings
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import common
from slimbench.methods.formats import policy
from slimbench.util.hashing import digest


def of(config: RunConfig, key: str) -> Readings:
    """Those of the base of an artefact: its files but the policy's own, engine, code of engine and formats, libraries, dtype, hardware."""
    depends, device = common.identity(Stage.QUALITY, config, key, None), config.device
    files = {name: sha256 for name, sha256 in depends["artefacts"][key].items() if name not in (policy.DESCRIPTION, policy.TENSORS)}
    code = {label: fingerprint for label, fingerprint in depends["code"].items() if label.startswith(("engine ", "format "))}
    configured = {name: depends["config"][name] for name in ("model", "engine")}
    where = hardware().identity(device.name, device.index, device.threads, device.cards).fingerprint
    return Readings(digest([files, code, configured, depends["versions"], where, device.threads]))

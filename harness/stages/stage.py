"""What one stage does, inside the worker's child process. Everything heavy is imported here, nothing is written to the store."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from slimbench.harness.config.schema import RunConfig
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import compress, quality, speed
from slimbench.harness.stages.common import Reporter, identity
from slimbench.harness.store.partial import Journal


def run(stage: Stage, config: RunConfig, keys: dict[str, Any], reference_key: str | None, report: Reporter) -> Any:
    """Run a stage and return its result.

    Args:
        keys: Content keys of the three stages of the cell; `prefixes`: compress keys of the pipelines that its own begins with;
            `partial`: name of the stage's journal (see `harness.store.partial`), if one is to be kept; `since`: what it holds from
            before is not used.
        reference_key: Compress key of the reference; None where the reference itself did not run.
    """
    torch.set_num_threads(config.device.threads or torch.get_num_threads())
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if "cuda" in (config.device.compress if stage is Stage.COMPRESS else config.device.name):
        torch.cuda.set_device(config.device.index)
    journal = Journal()
    if "partial" in keys:
        journal = Journal(keys["partial"], identity(stage, config, keys["compress"], reference_key) | {"since": keys["since"]})
    if stage is Stage.COMPRESS:
        return compress.run(config, keys["compress"], report, keys.get("prefixes", ()), journal)
    if stage is Stage.QUALITY:
        return quality.run(config, keys["compress"], reference_key, report, journal)
    return speed.run(config, keys["compress"], reference_key, report, journal)

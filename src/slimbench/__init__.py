"""Benchmark and leaderboard harness for LLM compression: quality and speed of the same artefact, with evidence."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__version__ = "0.1.0"


def load(results: str | Path = "runs") -> pd.DataFrame:
    """The table of a results folder: one row for each cell, with the columns of `slimbench board table --format json`.

    Rows of records that another results folder made are there too: column `foreign` is true for them.

    Args:
        results: Folder of records.

    Raises:
        slimbench.harness.store.store.StoreError: There is no such folder.
    """
    frame: pd.DataFrame = import_module("slimbench.leaderboard.tables.frame").load(results)
    return frame


def load_model(folder: str | Path, device: str = "cpu") -> nn.Module:
    """The compressed model of an artefact folder, as engine `transformers` runs it.

    Args:
        folder: What `slimbench artefact path` prints, or what `slimbench artefact export --format slimbench` wrote.
        device: `cpu`, or `cuda:0` and the like.

    Raises:
        slimbench.harness.store.artefact.Damaged: Its files are not those that were written.
        slimbench.methods.base.Unsupported: The engine does not load the artefact's format.
    """
    from slimbench.harness.config import engines
    from slimbench.harness.config.targets import locate
    from slimbench.harness.store import artefact

    if problem := artefact.damage(Path(folder)):
        raise artefact.Damaged(f"the artefact is not to be used: {problem}")
    engine = engines.get("transformers")
    return locate(engine.target)(loaders=engine.loaders).load(Path(folder), device).module

"""Versions of the protocols by which a cell is measured. They stand in its task keys.

A version is raised where the same artefact, engine and settings give other numbers than before: old records then belong to
another row. This module imports nothing, so that a configuration has its keys without torch.
"""

from __future__ import annotations

PERPLEXITY = {
    "window": "window-1",
    "incremental": "incremental-1",
    "llamacpp": "llamacpp-1",
    "suffix": "suffix-1",
    "stream": "stream-2",
    "recomputed": "recomputed-1",
    "document": "document-1",
}
"""Scoring of a corpus, by the name that `suite.protocols` gives it."""

ZEROSHOT = 1
"""How items of zero-shot tasks are asked and judged."""

DIVERGENCE = 1
"""Distance of next-token distributions from the reference's."""

WRITTEN = 1
"""How a model writes its own calibration text."""

GENERATION = 1
"""Greedy continuations of prompts."""

RETRIEVAL = 1
"""Facts asked for behind long contexts."""

IMITATION = 1
"""Students held against what their teacher wrote."""

SPEED = 2
"""Prefill, decode, memory and what else the stage `speed` measures."""

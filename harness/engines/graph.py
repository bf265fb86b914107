"""What the engines that run a graph share: the loop around it, and evidence of weights. Inputs and outputs
of the graph are those of `methods.formats.decoder_graph`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimbench.harness.measure.loaded import LoadedModel, Step
from slimbench.harness.measure.zeros import Zeros
from slimbench.harness.schema.evidence import Evidence, LayerEvidence

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Cached:
    """The state between calls: what the engine keeps of the sequence, and how many tokens that is."""

    memory: Any
    length: int = 0


class GraphModel(LoadedModel):
    """A decoder graph on a CPU, whatever executes it.

    Args:
        config: The contents of the artefact's `config.json`.
    """

    shares_vectors = True

    def __init__(self, config: dict[str, Any]) -> None:
        self.vocab_size = config["vocab_size"]
        self.max_length = config.get("max_position_embeddings", 2048)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @abstractmethod
    def fresh(self, batch: int) -> Any:
        """An empty KV cache for `batch` sequences."""

    @abstractmethod
    def run(self, feeds: dict[str, Array], memory: Any) -> tuple[Array, Any]:
        """One call of the graph.

        Args:
            feeds: The first four inputs by name.
            memory: The KV cache; it may be changed in place.

        Returns:
            Logits, float32 [B, K, V], valid until the next call, and the cache that holds the new tokens too.
        """

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        found, _ = self._call(ids.numpy(), Cached(self.fresh(len(ids))), start)
        return torch.from_numpy(found.copy())

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        found, state = self._call(ids.numpy(), state or Cached(self.fresh(len(ids))), 0)
        return torch.from_numpy(found.copy()), state

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        return self._greedy(ids.numpy(), Cached(self.fresh(len(ids))))

    def decode_step(self, step: Step) -> Step:
        return self._greedy(step.token.numpy(), step.state)

    def synchronize(self) -> None:
        pass

    def _greedy(self, ids: Array, state: Cached) -> Step:
        found, state = self._call(ids, state, ids.shape[1] - 1)
        return Step(torch.from_numpy(found.argmax(-1)), state)

    def _call(self, ids: Array, state: Cached, start: int) -> tuple[Array, Cached]:
        new, end = ids.shape[1], state.length + ids.shape[1]
        feeds = {"ids": ids, "positions": np.arange(state.length, end), "keys": np.arange(end), "keep": np.arange(start, new)}
        found, memory = self.run(feeds, state.memory)
        return found, Cached(memory, end)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of an artefact's `config.json`."""
    return json.loads((folder / "config.json").read_text())


@dataclass
class Weight:
    """A constant of a graph that is a layer's weight, with what belongs to it.

    Attributes:
        name: Of the node that uses it.
        layer: Operator of that node.
        role: `linear`, `head`, `embedding` or `other`, as in `harness.schema.evidence.LayerEvidence`.
        parameters: Numbers that it stands for.
        dtypes: Bytes by storage dtype, scales and zero points included.
        operator: What the engine multiplies with; None for a layer that multiplies nothing.
        compute: Dtype of the product.
        expanded: The engine makes a dense weight of it before the product.
    """

    name: str
    layer: str
    role: str
    parameters: int
    dtypes: Counter[str]
    zeros: Zeros | None = None
    operator: str | None = None
    compute: str | None = None
    expanded: bool = False


def evidence_of(weights: list[Weight], blocks: int | None = None) -> Evidence:
    """The evidence of a graph: its weights by operator and role, and what they are multiplied with in a step.

    Args:
        blocks: Decoder blocks that it has; None where the engine does not show them.
    """
    groups: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    for weight in weights:
        groups[weight.layer, weight.role].append(weight)
    linear = [w for w in weights if w.role == "linear"]
    parameters = sum(w.parameters for w in linear)
    return Evidence(
        weight_bytes=sum(w.dtypes.total() for w in weights),
        parameters=sum(w.parameters for w in weights),
        blocks=blocks,
        effective_bits=8 * sum(w.dtypes.total() for w in linear) / parameters if parameters else None,
        sparsity=_zeros(linear),
        layers=[_class(layer, role, members) for (layer, role), members in groups.items()],
        kernel=_kernel(linear),
        operators=dict(Counter(w.operator for w in weights if w.operator)),
    )


def _zeros(weights: list[Weight]) -> float | None:
    """Fraction of zeros of the weights that were probed."""
    probed = [(w.zeros.fraction, w.parameters) for w in weights if w.zeros is not None]
    total = sum(count for _, count in probed)
    return sum(fraction * count for fraction, count in probed) / total if total else None


def _kernel(weights: list[Weight]) -> str | None:
    """What at least a fifth of the weights inside the blocks are multiplied with, the heaviest first."""
    counted: Counter[str] = Counter()
    for weight in weights:
        if weight.operator:
            counted[weight.operator] += weight.parameters
    return " + ".join(name for name, count in counted.most_common() if count >= counted.total() / 5) or None


def _class(layer: str, role: str, weights: list[Weight]) -> LayerEvidence:
    parameters = sum(w.parameters for w in weights)
    dtypes: Counter[str] = sum((w.dtypes for w in weights), Counter())
    patterns = Counter(w.zeros.pattern for w in weights if w.zeros is not None)
    return LayerEvidence(
        layer=layer,
        role=role,
        count=len(weights),
        parameters=parameters,
        bytes=dtypes.total(),
        dtypes=dict(dtypes),
        bits_per_weight=8 * dtypes.total() / parameters if parameters else 0.0,
        zeros=_zeros(weights),
        pattern=next(iter(patterns)) if len(patterns) == 1 else None,
        patterns={pattern: count for pattern, count in patterns.most_common() if pattern},
        compute=dict(Counter(w.compute for w in weights if w.compute)),
        operators=dict(Counter(w.operator for w in weights if w.operator)),
        fallback_layers=sum(w.expanded for w in weights),
    )

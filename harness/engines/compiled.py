"""transformers compiled: decode steps through `torch.compile` with a static KV cache, as CUDA graphs on a card.

Prompts are processed eagerly into the cache, since their lengths vary; so prefill times are those of the eager engine. Only where all
blocks are packed, on a CPU, prompts and single tokens go through them in one call (`packed_decoder`), with nothing to compile. Whole
windows, by which quality is measured, run through compiled code too: what fusion does to the numbers is seen. Compilation happens
in the first call at a shape and stands in the record as `first_call_ms`. On a CPU one token attends by `decode_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch

from slimbench.harness.engines import decode_attention, packed_decoder
from slimbench.harness.engines.packed_decoder import PackedDecoder
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel
from slimbench.harness.measure.loaded import Draws, LoadedModel, Step
from slimbench.methods.base import Unsupported
from slimbench.methods.kernels.cpu import blocks
from slimbench.util.compat import inductor

_ROUND = 32
_MOST_OPERATIONS_TWICE = 8  # fused into a loop that repeats them; with torch's 30, rotary embeddings are computed again for each key


@dataclass
class _Static:
    """A static KV cache and the step that is compiled for its shape."""

    cache: Any
    decode: Callable[[torch.Tensor, Any], torch.Tensor]


class CompiledModel(TransformersModel):
    """A transformers model with a static cache.

    Caches are kept by batch and length and used again, since compiled code and CUDA graphs are bound to their memory: a `Step` is valid
    until the next prompt of the same shape. Each has a compiled step of its own without guards, since whenever it runs the module's
    layers and the shape are those of its first run: checking them costs up to milliseconds. A loader may leave a pass over the compiled
    graph in the module's `graph_pass`.
    """

    keeps_cache = True

    def __init__(self, module: Any, device: str) -> None:
        super().__init__(module, device)
        self._states: dict[tuple[int, int], _Static] = {}
        self._options = inductor.pass_options(getattr(module, "graph_pass", None))
        self._window = torch.compile(_with_own_code(self._logits), fullgraph=True, options=self._options or None)
        self._packed = PackedDecoder(module) if self._device.type == "cpu" and packed_decoder.fits(module) else None
        if self._device.type == "cpu":
            decode_attention.use(module)

    def build(self) -> str:
        compiled = f"decoding by compiled code for {inductor.instructions()}"
        return f"{super().build()}; {f'prompts and decoding by {blocks.NAME} for all blocks' if self._packed else compiled}"

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self._window(ids.to(self._device))[:, start:]

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        batch, length = ids.shape
        capacity = -(-(length + room) // _ROUND) * _ROUND
        if (batch, capacity) not in self._states:
            self._states[batch, capacity] = self._static(capacity)
        state = self._states[batch, capacity]
        state.cache.reset()
        return Step((self._packed or self._next)(ids.to(self._device), state.cache), state)

    @torch.inference_mode()
    def decode_step(self, step: Step) -> Step:
        return Step(step.state.decode(step.token, step.state.cache).clone(), step.state)

    def branch(self, state: Any) -> Any:
        """Compiled steps are bound to the memory of their cache."""
        raise Unsupported(f"this engine does not {self.ability}")

    def draw(self, temperature: float) -> None:
        """What is compiled chooses the likeliest token."""
        raise Unsupported(f"this engine does not {Draws.ability}")

    def cache_bytes(self, state: Any) -> int | None:
        return super().cache_bytes(getattr(state, "cache", state))

    def forget(self) -> None:
        self._states.clear()

    def _static(self, capacity: int) -> _Static:
        from transformers import StaticCache

        cache = StaticCache(config=self.module.config, max_cache_len=capacity)
        return _Static(cache, self._packed or self._compiled_step())

    def _compiled_step(self) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        options = self._options | inductor.step_options(_MOST_OPERATIONS_TWICE, cuda_graphs=self._device.type == "cuda")
        return torch.compile(_with_own_code(self._next), fullgraph=True, options=options)

    def _next(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.module(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module(ids, use_cache=False).logits

    @torch.inference_mode()
    def _evidence_step(self, step: Step) -> Step:
        """Uncompiled, so that the operators can be attributed to layers; the compiled code calls the same ones for packed weights."""
        return Step(self._next(step.token, step.state.cache), step.state)


def _with_own_code(method: Any) -> Any:
    """The method with a copy of its code: what is compiled is kept by code object, and guards of tensors tell no two models apart."""
    function = method.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(own, method.__self__)


class CompiledEngine(TransformersEngine):
    """The loaders of the eager engine, compiled."""

    version: ClassVar[int] = 3

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        return CompiledModel(loader(artefact, device, trust_remote_code), device)

"""OpenVINO GenAI on a CPU: its scheduler drives a graph with a paged KV cache, one step after the other, and guesses by itself.

The graph and its numbers are those of the engine `openvino` (`harness.engines.openvino`): the same weights, float32 activations and cache.
What the pipeline does not show comes from that engine on the same graph: logits, and by what its layers multiply.

A step of the pipeline is a pass of the model. How many tokens it gave is seen, how many were guessed and thrown away is not.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimbench.harness.engines.drafts import DraftingEngine
from slimbench.harness.engines.graph import read_config
from slimbench.harness.engines.openvino import OpenVINOModel, properties
from slimbench.harness.measure.loaded import CountsPasses, LoadedModel, Step
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Unsupported
from slimbench.methods.formats import openvino as graphs
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.policy import Policy
from slimbench.util import files

_CACHE_GIGABYTES = 2
_MOST_TOKENS = 1 << 16
"""Of all sequences in one pass: prompts are never cut."""


class Generation:
    """Sequences that a pipeline continues greedily.

    Args:
        ids: Prompts, int64 [B, T].
        room: Tokens of each at most.
        draft: Guesses that are asked for.

    Attributes:
        passes: Tokens that each pass gave, since that of the prompts.
        stop: Takes the sequences out of the pipeline and its cache, which otherwise happens when nobody knows them any more.
    """

    def __init__(self, pipeline: Any, ids: torch.Tensor, room: int, draft: Lookup | None) -> None:
        import openvino

        self.passes: list[int] = []
        self._pipeline, config = pipeline, _greedy(room, draft)
        self._handles = [pipeline.add_request(number, openvino.Tensor(row[None].numpy()), config) for number, row in enumerate(ids)]
        self._tokens: list[deque[int]] = [deque() for _ in self._handles]
        self.stop = weakref.finalize(self, _cancel, pipeline, self._handles)
        self._step()
        self.passes.clear()

    def next(self) -> torch.Tensor:
        """The next token of each sequence, int64 [B, 1].

        Raises:
            RuntimeError: As many tokens as there is room for were asked for already.
        """
        while not all(self._tokens):
            self._step()
        return torch.tensor([[tokens.popleft()] for tokens in self._tokens])

    def _step(self) -> None:
        if not self.stop.alive or not self._pipeline.has_non_finished_requests():
            raise RuntimeError("this text has ended: no more tokens were asked for, or another prompt came after it")
        self._pipeline.step()
        given = 0
        for handle, tokens in zip(self._handles, self._tokens, strict=True):
            if handle.can_read():
                (found,) = handle.read().values()
                tokens.extend(found.generated_ids)
                given = len(found.generated_ids)
        self.passes.append(given)


class GenAIModel(LoadedModel):
    """A graph in a pipeline. One generation runs at a time: a new prompt ends the one before it.

    Args:
        graph: As of `methods.formats.openvino`.
        config: The contents of the artefact's `config.json`.
        draft: What is guessed before each pass; None: nothing.
    """

    shares_vectors = True
    keeps_cache = True
    times_passes = False
    computes_narrower = True
    cache_dtype = "float32"

    def __init__(self, graph: Any, config: dict[str, Any], draft: Lookup | None = None) -> None:
        self.vocab_size = config["vocab_size"]
        self.max_length = config.get("max_position_embeddings", 2048)
        self._config, self._draft = config, draft
        self._scratch = files.scratch("openvino-genai")
        self._folder = Path(self._scratch.name)
        graphs.save(graph, self._folder / "plain")
        graphs.save(graphs.served(graph), self._folder / "served")
        self._pipeline = self._start(guesses=draft is not None)
        self._running: Generation | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to do: the tokens of a step are on the host."""

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self._plain.logits(ids, start)

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return self._plain.extend(ids, state)

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if self._running:
            self._running.stop()
        self._running = Generation(self._pipeline, ids, room + 1, self._draft)
        return Step(self._running.next(), self._running)

    def decode_step(self, step: Step) -> Step:
        return Step(step.state.next(), step.state)

    def cache_bytes(self, state: Any) -> int | None:
        found = self._pipeline.get_metrics()
        return round(found.cache_usage / 100 * found.cache_size_in_bytes)

    def evidence(self) -> Evidence:
        return self._plain.evidence()

    @cached_property
    def _plain(self) -> OpenVINOModel:
        return OpenVINOModel(graphs.load_ir(self._folder / "plain"), self._config)

    def _start(self, guesses: bool) -> Any:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GIGABYTES
        scheduler.max_num_batched_tokens = _MOST_TOKENS
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        asked = properties() | ({"prompt_lookup": True} if guesses else {})
        try:
            return genai.ContinuousBatchingPipeline(str(self._folder / "served"), scheduler, "CPU", asked)
        except RuntimeError as error:
            raise Unsupported(f"OpenVINO GenAI does not run this model: {' '.join(str(error).split())[-200:]}") from error


class DraftingModel(GenAIModel, CountsPasses):
    """A model whose next tokens the pipeline guesses, and checks in one pass. One text at a time; scores are those without guesses."""

    slots = ("draft",)
    max_batch = 1
    shows_guesses = False

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if len(ids) != 1:
            raise Unsupported(f"drafts are for one text at a time, not {len(ids)}")
        return super().prefill(ids, room)

    def passes(self, state: Any) -> Sequence[int]:
        found: list[int] = state.passes
        return found

    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        text = Generation(self._without, ids, count, None)
        tokens = torch.cat([text.next() for _ in range(count)], 1)
        text.stop()
        return tokens

    @cached_property
    def _without(self) -> Any:
        return self._start(guesses=False)


class OpenVINOGenAIEngine(DraftingEngine):
    """Loads what the engine `openvino` loads, and guesses where a policy asks for it."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        return GenAIModel(loader(artefact, device, trust_remote_code), read_config(artefact))

    def open_drafting(self, artefact: Path, loader: Any, draft: Policy, device: str, trust_remote_code: bool) -> LoadedModel:
        """As `open`, with guesses as a policy asks.

        Raises:
            methods.base.Unsupported: GenAI does not guess so.
        """
        if not isinstance(draft, Lookup):
            raise Unsupported(f"OpenVINO GenAI guesses by lookup here, not by {draft.kind}")
        return DraftingModel(loader(artefact, device, trust_remote_code), read_config(artefact), draft)


def _cancel(pipeline: Any, handles: list[Any]) -> None:
    for handle in handles:
        handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()


def _greedy(room: int, draft: Lookup | None) -> Any:
    """What a request asks for; the end of a text does not end it."""
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = room, False
    config.ignore_eos, config.eos_token_id, config.stop_token_ids = True, 0, {0}
    if draft is not None:
        config.num_assistant_tokens, config.max_ngram_size = draft.tokens, draft.ngram
    return config

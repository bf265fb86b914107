"""OpenVINO GenAI on a CPU: its scheduler drives a graph with a paged KV cache, one step after the other, and guesses by itself.

The graph and its numbers are those of the engine `openvino` (`harness.engines.openvino`): the same weights, float32 activations and cache.
What the pipeline does not show comes from that engine on the same graph: logits, and by what its layers multiply.

Guesses come from the text (lookup) or from a second graph, a packed model that an artefact brings, with a cache of its own. A step of the
pipeline is a pass of the model. How many tokens it gave is seen, how many were guessed and thrown away is not.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimbench.harness.engines.drafts import DraftingEngine, with_draft
from slimbench.harness.engines.graph import read_config
from slimbench.harness.engines.openvino import OpenVINOModel, properties
from slimbench.harness.measure.loaded import CountsPasses, LoadedModel, Step
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Unsupported
from slimbench.methods.formats import openvino as graphs
from slimbench.methods.formats.draft.policy import Lookup, Model, check_vocabulary
from slimbench.methods.formats.policy import Policy
from slimbench.util import files

_CACHE_GIGABYTES = 2
_MOST_TOKENS = 1 << 16
"""Of all sequences in one pass: prompts are never cut."""


Draft = Lookup | Model


class Generation:
    """Sequences that a pipeline continues greedily.

    Args:
        ids: Prompts, int64 [B, T].
        room: Tokens of each at most.
        draft: Guesses that are asked for; None: none.

    Attributes:
        passes: Tokens that each pass gave, since that of the prompts.
        stop: Takes the sequences out of the pipeline and its cache, which otherwise happens when nobody knows them any more.
    """

    def __init__(self, pipeline: Any, ids: torch.Tensor, room: int, draft: Draft | None) -> None:
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
        draft: How the next tokens are guessed before each pass; None: they are not.
        guesser: The graph that guesses, where a model does.
    """

    shares_vectors = True
    keeps_cache = True
    times_passes = False
    computes_narrower = True
    cache_dtype = "float32"

    def __init__(self, graph: Any, config: dict[str, Any], draft: Draft | None = None, guesser: Any = None) -> None:
        self.vocab_size = config["vocab_size"]
        self.max_length = config.get("max_position_embeddings", 2048)
        self._config, self._draft = config, draft
        self._scratch = files.scratch("openvino-genai")
        self._folder = Path(self._scratch.name)
        self._caches = 1 + (_kept(guesser) / _kept(graph) if guesser else 0)
        write = graphs.save_served if guesser else graphs.save
        for name, made in {"model": graph, "guesser": guesser}.items():
            if made:
                graphs.save(made, self._folder / name)
                write(graphs.served(made), self._folder / f"served {name}")
        self._pipeline = self._start(draft)
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
        """Of both caches where a model guesses: of as many tokens, though the pipeline shows that of the model alone."""
        found = self._pipeline.get_metrics()
        return round(self._caches * found.cache_usage / 100 * found.cache_size_in_bytes)

    def evidence(self) -> Evidence:
        return self._plain.evidence()

    @cached_property
    def _plain(self) -> OpenVINOModel:
        return OpenVINOModel(graphs.load_ir(self._folder / "model"), self._config)

    def _start(self, draft: Draft | None) -> Any:
        import openvino_genai as genai

        asked: dict[str, Any] = {}
        if isinstance(draft, Lookup):
            asked["prompt_lookup"] = True
        elif draft:
            folder = str(self._folder / "served guesser")
            asked["draft_model"] = genai.draft_model(folder, "CPU", scheduler_config=_scheduler(), **properties())
        try:
            return genai.ContinuousBatchingPipeline(str(self._folder / "served model"), _scheduler(), "CPU", properties() | asked)
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

    def evidence(self) -> Evidence:
        found = super().evidence()
        if isinstance(self._draft, Model):
            found = with_draft(found, OpenVINOModel(graphs.load_ir(self._folder / "guesser"), self._config).evidence())
        return found

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
        return self._start(None)


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
        if not isinstance(draft, Draft):
            raise Unsupported(f"OpenVINO GenAI guesses by lookup and by a model here, not by {draft.kind}")
        graph, config, guesser = loader(artefact, device, trust_remote_code), read_config(artefact), None
        if isinstance(draft, Model):
            assert draft.model is not None
            check_vocabulary(read_config(draft.model)["vocab_size"], config["vocab_size"])
            guesser = graphs.load_packed(draft.model, device, trust_remote_code)
        return DraftingModel(graph, config, draft, guesser)


def _cancel(pipeline: Any, handles: list[Any]) -> None:
    for handle in handles:
        handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()


def _kept(graph: Any) -> int:
    """Numbers of a token in the cache of a graph."""
    shapes = [sink.get_output_partial_shape(0) for sink in graph.get_sinks()]
    return sum(shape[1].get_length() * shape[3].get_length() for shape in shapes)


def _scheduler() -> Any:
    import openvino_genai as genai

    made = genai.SchedulerConfig()
    made.cache_size = _CACHE_GIGABYTES
    made.max_num_batched_tokens = _MOST_TOKENS
    made.dynamic_split_fuse = False
    made.enable_prefix_caching = False
    return made


def _greedy(room: int, draft: Draft | None) -> Any:
    """What a request asks for; the end of a text does not end it."""
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = room, False
    config.ignore_eos, config.eos_token_id, config.stop_token_ids = True, 0, {0}
    if draft is not None:
        config.num_assistant_tokens = draft.tokens
    if isinstance(draft, Lookup):
        config.max_ngram_size = draft.ngram
    return config

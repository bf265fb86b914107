"""vLLM: a paged KV cache and kernels of its own choice, driven in this process, one scheduler step after the other.

What its interface does not let the harness do:

- Tokens cannot be added to sequences that are in the cache, so the protocol `incremental` is unsupported.
- Logits of a prompt are given out as Python dictionaries only. The harness looks at the hidden states before the head instead and
  asks the model itself for their logits: those that vLLM samples from, at all positions.

The cache is reserved when the model is loaded: what `cache_bytes` tells is the part of it that sequences hold.

Over several cards it is tensor parallel, each card a process of vLLM's own. The model's hidden states are out of reach there, so quality is
unsupported, while speed, memory and the names of kernels are read as on one card.
"""

from __future__ import annotations

import functools
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimbench.harness.engines.drafts import DraftingEngine
from slimbench.harness.engines.graph import Weight, evidence_of, read_config
from slimbench.harness.measure.loaded import CountsPasses, LoadedModel, Step
from slimbench.harness.measure.zeros import zeros
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.policy import Policy
from slimbench.util import files

_LONGEST = 32_768
_CPU_CACHE_BYTES = 2 << 30
_CARD_SHARE = 0.45  # of the card's memory for each model: candidate and reference are loaded side by side
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_HEAD, _EMBEDDING = "lm_head", "embed_tokens"
_WEIGHTS = ("weight", "weight_packed")


class Generation:
    """Sequences that vLLM continues greedily, a token each in a step.

    Args:
        ids: Prompts, int64 [B, T].
        room: Tokens of each at most.
    """

    def __init__(self, engine: Any, ids: torch.Tensor, room: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine = engine
        greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "output_kind": RequestOutputKind.DELTA}
        self._tokens: dict[str, deque[int]] = {str(row): deque() for row in range(len(ids))}
        for name, prompt in zip(self._tokens, ids.tolist(), strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=room, **greedy))

    def next(self) -> torch.Tensor:
        """The next token of each sequence, int64 [B, 1].

        Raises:
            RuntimeError: As many tokens as there is room for were asked for already.
        """
        while not all(self._tokens.values()):
            if not self._engine.has_unfinished_requests():
                raise RuntimeError("no more tokens were asked for when the prompt was given")
            for output in self._engine.step():
                self._tokens[output.request_id].extend(output.outputs[0].token_ids)
        return torch.tensor([[tokens.popleft()] for tokens in self._tokens.values()])

    def stop(self) -> None:
        """Take the sequences out of the engine and its cache."""
        self._engine.abort_request(list(self._tokens))


class VllmModel(LoadedModel):
    """A model in vLLM. One generation runs at a time: a new prompt, or a call of `logits`, ends the one before it.

    Args:
        artefact: Gives the config.
        loader: Called with the artefact and a scratch folder; returns the folder that vLLM loads.
        guesses: What vLLM is asked for as its `speculative_config`; None: no guesses.

    Raises:
        methods.base.Unsupported: The loader or vLLM refuses the artefact.
    """

    keeps_cache = True
    times_passes = False
    uncounted = "vLLM counts the time of requests, not of the parts of a step"

    def __init__(
        self, artefact: Path, loader: Any, device: str, trust_remote_code: bool, cards: int = 1, guesses: dict[str, Any] | None = None
    ) -> None:
        config = read_config(artefact)
        self.vocab_size = config["vocab_size"]
        self.max_length = min(config.get("max_position_embeddings", 2048), _LONGEST)
        self._scratch = files.scratch("vllm")
        self._checkpoint = loader(artefact, Path(self._scratch.name))
        self._device = torch.device(device)
        self._cards = cards
        self._engine = _start(self._checkpoint, self._device, self.max_length, trust_remote_code, cards, guesses)
        self._kernels = self._engine.apply_model(_kernels)[0]
        self._module = self._engine.apply_model(_itself)[0] if cards == 1 else None
        self._running: Generation | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def devices(self) -> list[torch.device]:
        return [torch.device(self._device.type, card) for card in range(self._cards)] if self._cards > 1 else [self._device]

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        return torch.stack([self._window(row.unsqueeze(0), start) for row in ids])

    def _window(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits [T - start, V] of one sequence."""
        if self._module is None:
            raise Unsupported(f"vLLM over {self._cards} cards gives no logits of a prompt: quality is measured by engine=transformers")
        self._stop()
        seen: list[torch.Tensor] = []
        hook = self._module.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden.clone()))
        try:
            Generation(self._engine, ids, room=1).next()
        finally:
            hook.remove()
        (hidden,) = seen
        return self._module.compute_logits(hidden[start : ids.shape[1]])

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        raise Unsupported("vLLM adds no tokens to sequences in its cache: no protocol that goes through the cache can be measured")

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        self._stop()
        self._running = Generation(self._engine, ids, room + 1)
        return Step(self._running.next(), self._running)

    def decode_step(self, step: Step) -> Step:
        return Step(step.state.next(), step.state)

    def synchronize(self) -> None:
        """Nothing to do: the tokens of a step are on the host."""

    def cache_bytes(self, state: Any) -> int | None:
        scheduler = self._engine.engine_core.engine_core.scheduler
        layout, pool = scheduler.kv_cache_config, scheduler.kv_cache_manager.block_pool
        used = layout.num_blocks - 1 - pool.get_num_free_blocks()  # one block is vLLM's own
        return self._cards * used * sum(tensor.size for tensor in layout.kv_cache_tensors) // layout.num_blocks

    def evidence(self) -> Evidence:
        return evidence_of(list(_weights(self._checkpoint, self._kernels)))

    def _stop(self) -> None:
        if self._running:
            self._running.stop()
            self._running = None


class DraftingModel(VllmModel, CountsPasses):
    """A model whose next tokens vLLM guesses by its own lookup, and checks in one pass. One text at a time.

    Scores are those without guesses. How many tokens a pass has is what vLLM's scheduler gives out.

    Args:
        draft: Guesses that are asked for: what followed where the last tokens, as many as possible, stood for the first time before.
    """

    slots = ("draft",)
    max_batch = 1

    def __init__(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool, draft: Lookup) -> None:
        lengths = {"prompt_lookup_min": 1, "prompt_lookup_max": draft.ngram}
        asked = {"method": "ngram", "num_speculative_tokens": draft.tokens, **lengths}
        super().__init__(artefact, loader, device, trust_remote_code, guesses=asked)
        core = self._engine.engine_core.engine_core
        drafter = core.model_executor.driver_worker.worker.model_runner.drafter
        self._schedule, self._propose = core.scheduler.schedule, drafter.propose
        core.scheduler.schedule, drafter.propose = self._scheduled, self._proposed
        self._rows: list[int] = []
        self._is_silent = False

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if len(ids) != 1:
            raise Unsupported(f"drafts are for one text at a time, not {len(ids)}")
        step = super().prefill(ids, room)
        self._rows.clear()
        return step

    def passes(self, state: Any) -> Sequence[int]:
        return self._rows

    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        self._is_silent = True
        try:
            step = self.prefill(ids, count)
            tokens = [step.token]
            while len(tokens) < count:
                step = self.decode_step(step)
                tokens.append(step.token)
        finally:
            self._is_silent = False
        return torch.cat(tokens, 1)

    def _scheduled(self, *given: Any, **named: Any) -> Any:
        found = self._schedule(*given, **named)
        self._rows += [found.total_num_scheduled_tokens] * (found.total_num_scheduled_tokens > 0)
        return found

    def _proposed(self, most: int, sampled: list[list[int]], *given: Any, **named: Any) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in sampled] if self._is_silent else self._propose(most, sampled, *given, **named)
        return found


class VllmEngine(DraftingEngine):
    """Loads dense sources, and packed ones as `compressed-tensors`; guesses by its own lookup where a policy asks for it."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        return VllmModel(artefact, loader, device, trust_remote_code, self.cards)

    def open_drafting(self, artefact: Path, loader: Any, draft: Policy, device: str, trust_remote_code: bool) -> LoadedModel:
        """As `open`, with guesses as a policy asks.

        Raises:
            methods.base.Unsupported: vLLM does not guess so, or its passes are out of reach.
        """
        if not isinstance(draft, Lookup):
            raise Unsupported(f"vLLM guesses by lookup here, not by {draft.kind}")
        if self.cards > 1:
            raise Unsupported(f"vLLM over {self.cards} cards runs in processes of its own, where no passes can be counted")
        return DraftingModel(artefact, loader, device, trust_remote_code, draft)


def _start(
    checkpoint: Path, device: torch.device, longest: int, trust_remote_code: bool, cards: int = 1, guesses: dict[str, Any] | None = None
) -> Any:
    threads = torch.get_num_threads()
    functions = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if cards > 1 else {}  # sent to its processes: `apply_model` asks for kernels
    os.environ.update(_SETTINGS | functions, OMP_NUM_THREADS=str(threads))
    from vllm import EngineArgs, LLMEngine

    if device.index:
        raise Unsupported("vLLM takes the first visible cards; choose others by CUDA_VISIBLE_DEVICES")
    cache = {"kv_cache_memory_bytes": _CPU_CACHE_BYTES} if device.type == "cpu" else {"gpu_memory_utilization": _CARD_SHARE}
    arguments = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        enable_prefix_caching=False,
        async_scheduling=False,
        load_format="safetensors",
        tensor_parallel_size=cards,
        speculative_config=guesses,
        **cache,
    )
    if device.type == "cpu":
        _replace_kernels_once()
    try:
        return LLMEngine.from_engine_args(arguments)
    except (ValueError, NotImplementedError) as error:
        raise Unsupported(f"vLLM does not load this model: {' '.join(str(error).split())[:200]}") from error


@functools.cache
def _replace_kernels_once() -> None:
    """Let vLLM put its kernels for CPUs in place of Triton's with the first engine of a process alone.

    It looks for them through the attributes of all modules, and breaks off at one of numba's, which the first lookup of guesses imports;
    by then they are in place.
    """
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = staticmethod(functools.cache(CpuPlatform.register_triton_kernel_overrides))


def _itself(module: Any) -> Any:
    return module


def _weights(checkpoint: Path, kernels: dict[str, tuple[str, str]]) -> Iterator[Weight]:
    """The layers of what vLLM loaded, from the files; the kernels from its modules."""
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            layers: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 - no mapping
                layers.setdefault(key.rpartition(".")[0], []).append(key)
            for name, keys in layers.items():
                yield _weight(name, {key.rpartition(".")[2]: file.get_tensor(key) for key in keys}, kernels.get(name))


def _weight(name: str, parts: dict[str, torch.Tensor], kernel: tuple[str, str] | None) -> Weight:
    dtypes: Counter[str] = Counter()
    for part, tensor in parts.items():
        if part != "weight_shape":
            dtypes[_name(tensor.dtype)] += tensor.nbytes
    numbers = next(_numbers(parts[part], parts) for part in _WEIGHTS if part in parts)
    leaf = name.rpartition(".")[2]
    role = "other" if numbers.ndim < 2 else "embedding" if leaf == _EMBEDDING else "head" if leaf == _HEAD else "linear"
    found = Weight(name, kernel[0] if kernel else "tensor", role, numbers.numel(), dtypes)
    if role != "other":
        found.zeros = zeros(numbers)
    if role in ("linear", "head") and kernel:
        inputs = parts["weight_scale"] if "weight_packed" in parts else numbers
        found.operator, found.compute = f"vllm {kernel[1]}", _name(inputs.dtype)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in], or its codes around zero."""
    if "weight_packed" not in parts:
        return weight
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(parts["weight_shape"].tolist())
    return unpack_from_int32(weight, 32 * weight.shape[1] // shape[1], shape)


def _kernels(module: Any) -> dict[str, tuple[str, str]]:
    """Names of layers in the files, with the class of the module that stands for each and what it multiplies with."""
    fused, found = getattr(module, "packed_modules_mapping", {}), {}
    for name, layer in module.named_modules():
        method = getattr(layer, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(layer, "scheme", None)
        kernel = type(getattr(scheme, "kernel", None) or scheme or method).__name__
        parent, dot, leaf = name.rpartition(".")
        for part in fused.get(leaf, [leaf]):
            found[f"{parent}{dot}{part}"] = type(layer).__name__, kernel
    return found

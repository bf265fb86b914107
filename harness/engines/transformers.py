"""The reference engine: transformers in eager mode, with a dynamic KV cache and tokens that are the likeliest, or drawn."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional

from slimbench.harness.engines import attention, spread
from slimbench.harness.engines.base import Engine
from slimbench.harness.measure.evidence import collect, linear_bits
from slimbench.harness.measure.loaded import Branches, Draws, LoadedModel, RunsLayers, Step
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Unsupported
from slimbench.methods.formats import huggingface
from slimbench.methods.formats.attention.operators import reading as readings
from slimbench.methods.formats.draft import speculation
from slimbench.methods.formats.draft.sampling import Sampling
from slimbench.methods.kernels.packed_linear import PackedLinear

_CHUNK = 64


load_pretrained = huggingface.load


class TransformersModel(Branches, Draws, RunsLayers):
    """A transformers causal language model.

    A loader may leave in the module's `new_cache` what makes an empty KV cache. Then every token goes through such a cache, whole
    windows too, in pieces that end where a multiple of the cache's `chunk` tokens does: what the cache does to the numbers is seen by
    every protocol. A `drafter` guesses what the module then checks (`methods.formats.draft`), so that some steps cost no pass. `slots`,
    `scoring`, `max_batch`, `exact_keys` and `reach` of the module are those of its policy. A recurrent model (`cache_params`) goes on
    from a state token by token: of several at once the library forgets it.
    """

    def __init__(self, module: Any, device: str) -> None:
        self.module = module
        self._new_cache: Callable[[], Any] = getattr(module, "new_cache", None) or _library_default
        self._drafter = getattr(module, "drafter", None)
        self._sampling: Sampling | None = None
        self._state = "cache_params" if "cache_params" in inspect.signature(module.forward).parameters else "past_key_values"
        self._device = torch.device(device)
        self._devices = [self._device, *sorted({p.device for p in module.parameters() if p.is_cuda} - {self._device}, key=str)]
        self.scoring, self.max_batch = getattr(module, "scoring", "exact"), getattr(module, "max_batch", None)
        self.exact_keys, self.slots = getattr(module, "exact_keys", None), getattr(module, "slots", ())
        self.reach = getattr(module, "reach", None)
        self.vocab_size = module.config.vocab_size
        self.max_length = getattr(module.config, "max_position_embeddings", 2048)
        head = module.get_output_embeddings()
        if head and _contiguous not in vars(head)["_forward_pre_hooks"].values():
            head.register_forward_pre_hook(_contiguous)

    def anew(self) -> Self:
        made = type(self)(self.module, str(self._device))
        if self.temperature:
            made.draw(self.temperature)
        return made

    @property
    def device(self) -> torch.device:
        return self._device

    def build(self) -> str:
        kernels = sorted({text for layer in self.module.modules() if isinstance(layer, PackedLinear) and (text := layer.build())})
        return "; ".join([f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}", *kernels])

    @property
    def devices(self) -> list[torch.device]:
        return self._devices

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        if self._new_cache is not _library_default:
            return self._through_cache(ids.to(self._device), start)
        keep = ids.shape[1] - start if start else 0
        return self.module(ids.to(self._device), use_cache=False, logits_to_keep=keep).logits

    def _through_cache(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """The head sees no positions before `start` but the last of a chunk, since it must see one."""
        parts, cache, end = [], self._new_cache(), 0
        for chunk in ids.split(getattr(cache, "chunk", _CHUNK), 1):
            end += chunk.shape[1]
            keep = min(chunk.shape[1], max(1, end - start))
            out = self.module(chunk, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            if end > start:
                parts.append(out.logits)
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        cache = self._new_cache() if state is None else state
        parts = []
        pieces = ids.split(1, 1) if state is not None and self._state == "cache_params" else _pieces(ids, cache)
        for piece in pieces:
            out = self.module(piece.to(self._device), **{self._state: cache}, use_cache=True)
            parts.append(out.logits)
            cache = getattr(out, self._state)
        return torch.cat(parts, 1), cache

    @torch.inference_mode()
    def behind(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        cache: Any = self._new_cache()
        for piece in _pieces(ids, cache):
            out = self.module(piece.to(self._device), **{self._state: cache}, use_cache=True, logits_to_keep=1)
            cache = getattr(out, self._state)
        return out.logits[:, -1:].clone(), cache

    @torch.inference_mode()
    def in_passes(self, prompt: torch.Tensor, written: torch.Tensor, passes: Sequence[tuple[int, int]]) -> torch.Tensor:
        text, place = torch.cat([prompt.cpu(), written.cpu()], 1).to(self._device), prompt.shape[1]
        logits, cache = self.behind(text[:, :place])
        if not speculation.croppable(cache):
            raise Unsupported("the cache cannot let go of tokens")
        found = [logits[0]]
        for tokens, given in passes:
            piece = functional.pad(text[:, place : place + tokens], (0, max(0, place + tokens - text.shape[1])))
            with speculation.watched(cache):
                out = self.module(piece, **{self._state: cache}, use_cache=True)
                if tokens > given:
                    cache.crop(given - tokens)
            found.append(out.logits[0, :given])
            place += given
        return torch.cat(found)[: written.shape[1]]

    def draw(self, temperature: float) -> None:
        self.temperature, self._sampling = temperature, Sampling(temperature, self._device)
        if self._drafter:
            self._drafter.sampling = self._sampling

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if self._sampling:
            self._sampling.begin(ids)
        if self._drafter:
            text = self._drafter.begin(ids.to(self._device), room, self._new_cache())
            return Step(text.next(), text)
        return self._step(ids.to(self._device), self._new_cache())

    @torch.inference_mode()
    def decode_step(self, step: Step) -> Step:
        return Step(step.state.next(), step.state) if self._drafter else self._step(step.token, step.state)

    @torch.inference_mode()
    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        if self._sampling:
            self._sampling.begin(ids)
        step = self._step(ids.to(self._device), self._new_cache())
        tokens = [step.token]
        while len(tokens) < count:
            step = self._step(step.token, step.state)
            tokens.append(step.token)
        return torch.cat(tokens, 1).cpu()

    @torch.inference_mode()
    def branch(self, state: Any) -> Any:
        if self._drafter:
            raise Unsupported("guesses leave the answers as they are without them")
        return copy.deepcopy(state)

    @property
    def decides_after(self) -> bool:
        alone = self._drafter is None and len(self.slots) <= 1 and len(self._devices) == 1
        return alone and bool(readings.operators(self.module))

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> tuple[Step, dict[str, torch.Tensor]]:
        cache: Any = self._new_cache()
        if self._sampling:
            self._sampling.begin(ids)
        readings.ask(cache)
        step = self._step(ids.to(self._device), cache)
        return step, readings.take(cache)

    @torch.inference_mode()
    def decide(self, reading: dict[str, torch.Tensor], tokens: int) -> Any:
        cache: Any = self._new_cache()
        readings.decide(self.module, cache, reading, tokens)
        return cache

    def _step(self, ids: torch.Tensor, cache: Any) -> Step:
        out = self.module(ids, **{self._state: cache}, use_cache=True, logits_to_keep=1)
        last = out.logits[:, -1]
        token = self._sampling.drawn(last) if self._sampling else last.argmax(-1)
        return Step(token[:, None], getattr(out, self._state))

    def synchronize(self) -> None:
        for device in self._devices if self._device.type == "cuda" else ():
            torch.cuda.synchronize(device)

    def cache_bytes(self, state: Any) -> int | None:
        if hasattr(state, "stored_bytes"):
            return state.stored_bytes()
        tensors = [t for layer in getattr(state, "layers", []) for t in _kept(layer) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) if tensors else None

    def loaded_bits(self) -> float | None:
        return linear_bits(self.module)

    def evidence(self) -> Evidence:
        prompt = torch.zeros(1, 8, dtype=torch.int64)
        return collect(self.module, lambda: self._evidence_step(self._prefilled(prompt)))

    def _prefilled(self, prompt: torch.Tensor) -> Step:
        if not hasattr(self, "_probe"):
            self._probe = self._whole_pass(prompt, self._new_cache()) if self._drafter else self.prefill(prompt)
        return self._probe

    def _evidence_step(self, step: Step) -> Step:
        return self._whole_pass(step.token, step.state) if self._drafter else self.decode_step(step)

    @torch.inference_mode()
    def _whole_pass(self, ids: torch.Tensor, cache: Any) -> Step:
        """One call of the module, where a step may have none."""
        return self._step(ids, cache)


def _kept(layer: Any) -> list[torch.Tensor | None]:
    """What a layer of a cache of transformers keeps: keys and values, or the states of a recurrent layer."""
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [getattr(layer, "keys", None), getattr(layer, "values", None), *states]


def _library_default() -> None:
    """No cache: the library makes one that keeps everything."""


def _pieces(ids: torch.Tensor, cache: Any) -> list[torch.Tensor]:
    """Tokens [B, T] as they go through a cache after those that it holds: those of a cache with a `chunk` end where one of these does."""
    chunk = getattr(cache, "chunk", None)
    if chunk is None:
        return [ids]
    first = min(ids.shape[1], chunk - cache.get_seq_length() % chunk)
    return [ids[:, :first], *(ids[:, first:].split(chunk, 1) if first < ids.shape[1] else ())]


def _contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head's inputs in one piece: for a slice of positions torch would copy a frozen weight once for each sequence."""
    return (inputs[0].contiguous(), *inputs[1:])


class TransformersEngine(Engine):
    """Loads every format that ends as a module with the call of a transformers model; over several cards whole blocks on each of them.

    Args:
        attention: By what models attend (`engines.attention`); `default`: as they come.
    """

    version: ClassVar[int] = 1

    def __init__(self, loaders: dict[str, str], cards: int = 1, attention: str = attention.DEFAULT) -> None:
        super().__init__(loaders, cards)
        self.attention = attention

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        placed = {}
        if self.cards > 1:
            first = torch.device(device).index or 0
            placed["device_map"] = spread.device_map(artefact, range(first, first + self.cards), trust_remote_code)
        module = loader(artefact, device, trust_remote_code, **placed)
        attention.use(module, self.attention)
        return TransformersModel(module, device)

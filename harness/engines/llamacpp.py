"""llama.cpp: its own kernels on blocks of quantized weights, its own KV cache in float16, greedy decoding.

It is driven through its C interface, below llama-cpp-python's own classes, which copy every logit to Python. The GGUF file of an
artefact of another format is written when the artefact is loaded, and thrown away once llama.cpp has read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from slimbench.harness.engines import gguf_evidence
from slimbench.harness.engines.drafts import DraftedText, DraftingEngine, Guess
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.loaded import CountsPasses, CountsTime, LoadedModel, Step
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.store.artefact import read_manifest, staging
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from slimbench.harness.engines.llamacpp_context import Context, Weights

Loader = Callable[[Path, Path], Path]
"""Called with the folder of an artefact and a folder for what it writes; returns the GGUF file."""


@dataclass(frozen=True)
class Cached:
    """The tokens that a step has in the KV cache. They live until the next sequences are begun.

    Attributes:
        begun: How often sequences had been begun when these were.
        sequences: Their number.
        length: Tokens of each.
    """

    begun: int
    sequences: int
    length: int


class LlamaCppModel(LoadedModel, CountsTime):
    """A model in llama.cpp.

    It has one KV cache, so a state holds no numbers, only how far its sequences have come: it lives until `logits`, `prefill`, or
    `extend` without a state begin others, and using it later is an error. Going back to an earlier state of the same sequences
    is allowed; what came after it is forgotten.

    Args:
        weights: What was loaded.
        evidence: Reads the evidence; asked for it only when it is wanted.
    """

    keeps_cache = True
    computes_narrower = True
    cache_dtype = "float16"
    uncounted = "llama.cpp counts the time of a batch of tokens, not of its operators"

    def __init__(self, weights: Weights, evidence: Callable[[], Evidence]) -> None:
        self._calls = 0
        self._weights, self._evidence = weights, evidence
        self.vocab_size, self.max_length = weights.vocab_size, weights.max_length
        self._context: Context | None = None
        self._begun, self._length = 0, 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        """As of the base class, in float32; sequences are processed one after the other, each alone in the cache."""
        batch, length = ids.shape
        found = torch.empty(batch, length - start, self.vocab_size)
        for row in range(batch):
            state = self._begin(1, length)
            for where, scores in self._feed(ids[row : row + 1], state, start):
                found[row, where[0] - start : where[-1] + 1 - start] = torch.from_numpy(scores)
        return found

    def extend(self, ids: torch.Tensor, state: Cached | None = None) -> tuple[torch.Tensor, Cached]:
        batch, length = ids.shape
        state = self._resume(state, length) if state else self._begin(batch, length)
        found = torch.empty(batch * length, self.vocab_size)
        for where, scores in self._feed(ids, state):
            found[where[0] : where[-1] + 1] = torch.from_numpy(scores)
        return found.view(batch, length, -1), self._after(state, length)

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        batch, length = ids.shape
        return self._greedy(ids, self._begin(batch, length + room))

    def decode_step(self, step: Step) -> Step:
        return self._greedy(step.token, self._resume(step.state, 1))

    def synchronize(self) -> None:
        """Nothing to do: what reads the logits has waited for them."""

    def cache_bytes(self, state: Cached) -> int:
        """Bytes of the keys and values of the tokens in the cache; llama.cpp reserves more, see `Context`."""
        return state.sequences * state.length * self._weights.cache_bytes_per_token

    def evidence(self) -> Evidence:
        return self._evidence()

    def build(self) -> str:
        return self._weights.build

    def counting(self) -> LlamaCppModel:
        return self

    def counted(self) -> Mapping[Place, tuple[int, float]]:
        calls, self._calls = self._calls, 0
        return {Place("engine"): (calls, self._context.spent() if self._context else 0.0)}

    def _greedy(self, ids: torch.Tensor, state: Cached) -> Step:
        batch, length = ids.shape
        token = np.empty(batch, np.int64)
        for where, scores in self._feed(ids, state, length - 1):
            token[where // length] = scores.argmax(-1)
        return Step(torch.from_numpy(token)[:, None], self._after(state, length))

    def _feed(self, ids: torch.Tensor, state: Cached, first: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Process tokens [B, T] after those of a state.

        Args:
            first: First of the T positions whose logits are wanted.

        Yields:
            Indices into the flattened tokens, and the logits there, which are llama.cpp's memory and soon overwritten.
        """
        assert self._context is not None
        batch, length = ids.shape
        token = ids.to(torch.int32).numpy().reshape(-1)
        column = np.tile(np.arange(length), batch)
        sequence = np.repeat(np.arange(batch), length)
        self._length = state.length + length
        for begin in range(0, len(token), self._context.most_tokens):
            piece = slice(begin, begin + self._context.most_tokens)
            wanted = column[piece] >= first
            self._calls += 1
            scores = self._context.decode(token[piece], state.length + column[piece], sequence[piece], wanted)
            if len(scores):
                yield begin + np.flatnonzero(wanted), scores

    def _begin(self, sequences: int, tokens: int) -> Cached:
        """Empty the cache for other sequences, of `tokens` tokens at most unless they are extended."""
        if self._context is None or self._context.sequences != sequences or self._context.room < tokens:
            self._context = None
            self._context = self._weights.context(sequences, tokens, torch.get_num_threads())
        self._context.clear()
        self._begun, self._length = self._begun + 1, 0
        return Cached(self._begun, sequences, 0)

    def _resume(self, state: Cached, tokens: int) -> Cached:
        """Make the cache hold what a state says and have room for `tokens` more of each sequence."""
        if state.begun != self._begun or state.length > self._length or self._context is None:
            raise RuntimeError("this state is gone: the KV cache of llama.cpp holds other sequences by now")
        if state.length < self._length:
            self._context.forget(state.length)
            self._length = state.length
        if state.length + tokens > self._context.room:
            self._context = self._context.moved(max(state.length + tokens, 2 * self._context.room))
        return state

    @staticmethod
    def _after(state: Cached, tokens: int) -> Cached:
        return Cached(state.begun, state.sequences, state.length + tokens)


class DraftingModel(LlamaCppModel, CountsPasses):
    """A model in llama.cpp whose next tokens are guessed and checked in one batch. One text at a time; scores are those without guesses.

    Args:
        weights: What was loaded.
        evidence: Reads the evidence.
        guess: Guesses the tokens.
    """

    slots = ("draft",)
    max_batch = 1

    def __init__(self, weights: Weights, evidence: Callable[[], Evidence], guess: Guess) -> None:
        super().__init__(weights, evidence)
        self._guess = guess

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        if len(ids) != 1:
            raise Unsupported(f"drafts are for one text at a time, not {len(ids)}")
        step = super().prefill(ids, room)
        return Step(step.token, DraftedText(ids[0].tolist(), int(step.token), room, self._guess, partial(self._chosen, step.state)))

    def decode_step(self, step: Step) -> Step:
        return Step(step.state.next(), step.state)

    def passes(self, state: DraftedText) -> Sequence[int]:
        return state.passes

    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        step = super().prefill(ids, count)
        tokens = [step.token]
        while len(tokens) < count:
            step = super().decode_step(step)
            tokens.append(step.token)
        return torch.cat(tokens, 1)

    def cache_bytes(self, state: Cached | DraftedText) -> int:
        """Bytes of the keys and values of the tokens of a text; guesses that were wrong are overwritten by the next pass."""
        return super().cache_bytes(Cached(self._begun, 1, state.held) if isinstance(state, DraftedText) else state)

    def _chosen(self, prompt: Cached, held: int, tokens: list[int]) -> list[int]:
        """What the model chooses behind each of some tokens of a text, of which the cache keeps the first `held`."""
        state = self._resume(replace(prompt, length=held), len(tokens))
        chosen = np.empty(len(tokens), np.int64)
        for where, scores in self._feed(torch.tensor([tokens]), state):
            chosen[where] = scores.argmax(-1)
        found: list[int] = chosen.tolist()
        return found


def guess_of(draft: Policy) -> Guess:
    """What guesses as a policy asks: llama-cpp-python's own lookup.

    The library takes guesses in its class `Llama`, which copies every logit to Python and computes those of a whole prompt. Here they are
    taken below that class, as all that this engine does, so that dense decodes by the same calls and a speed-up is that of the guesses.

    Raises:
        methods.base.Unsupported: The library does not guess so.
    """
    if not isinstance(draft, Lookup):
        raise Unsupported(f"llama-cpp-python guesses by lookup, not by {draft.kind}")
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    library = LlamaPromptLookupDecoding(max_ngram_size=draft.ngram, num_pred_tokens=draft.tokens)

    def guess(text: Sequence[int], most: int) -> list[int]:
        found: list[int] = library(np.array(text, np.intc))[:most].tolist()
        return found

    return guess


class LlamaCppEngine(DraftingEngine):
    """Loads what a loader can give as a GGUF file, and guesses tokens where a policy asks for it."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Loader, device: str, trust_remote_code: bool) -> LoadedModel:
        """Load an artefact.

        Raises:
            methods.base.Unsupported: Its format or its numbers have no counterpart in a GGUF file.
            RuntimeError: llama.cpp refuses the file.
        """
        from slimbench.harness.engines.llamacpp_context import Weights

        with _file(artefact, loader) as file:
            weights = Weights(file)
        return LlamaCppModel(weights, lambda: _evidence(artefact, loader, weights.resident_bytes))

    def open_drafting(self, artefact: Path, loader: Loader, draft: Policy, device: str, trust_remote_code: bool) -> LoadedModel:
        """As `open`, with guesses as a policy asks; it raises the same."""
        from slimbench.harness.engines.llamacpp_context import Weights

        guess = guess_of(draft)
        with _file(artefact, loader) as file:
            weights = Weights(file)
        return DraftingModel(weights, lambda: _evidence(artefact, loader, weights.resident_bytes), guess)


def _evidence(artefact: Path, loader: Loader, resident_bytes: int) -> Evidence:
    """The evidence of the file that was loaded; it is written again, which gives the same bytes."""
    with _file(artefact, loader) as file:
        return gguf_evidence.read(file, resident_bytes)


@contextmanager
def _file(artefact: Path, loader: Loader) -> Iterator[Path]:
    """The GGUF file of an artefact, for as long as it is needed."""
    with staging(read_manifest(artefact).key) as scratch:
        yield loader(artefact, scratch)

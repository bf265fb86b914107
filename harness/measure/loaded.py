"""What every measurement asks of an artefact in memory, whichever engine loaded it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.policy import Scoring

_PIECE_BYTES = (1 << 23, 1 << 28)  # of float32 logits, on a CPU and elsewhere


Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with float32 logits [n, V], their log normalisers [n] and the log-probabilities of the labels [n]."""


@dataclass
class Step:
    """A step: the next token of each sequence, int64 [B, 1], and the engine's own state (its KV cache)."""

    token: torch.Tensor
    state: Any


class Loaded(ABC):
    """An artefact in memory. What it can do is told by the capabilities among its bases: `Scores`, `Generates`, `Encodes`.

    Attributes:
        vocab_size: Token ids that it knows; the width of its logits.
        max_length: Positions that the model was made for.
        max_batch: Sequences that its policy runs at once at most; None without a limit.
        slots: Parts of the run that a policy decides on (`methods.formats.policy`).
        shares_vectors: The engine makes one of equal norms and biases, so that its evidence counts fewer parameters; it may count some
            constants of its graph.
        cache_dtype: Name of the dtype of keys and values, where the engine chooses it and not the artefact.
    """

    vocab_size: int
    max_length: int
    max_batch: int | None = None
    slots: Sequence[str] = ()
    shares_vectors: bool = False
    cache_dtype: str | None = None

    def batch(self, wanted: int) -> int:
        """So many sequences, or as many of them as run at once."""
        return min(wanted, self.max_batch or wanted)

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished; nothing to do where execution is synchronous."""

    def forget(self) -> None:  # noqa: B027
        """Let go of what runs at other shapes left in memory, as far as it can be made anew; steps of earlier runs end here."""

    def loaded_bits(self) -> float | None:
        """Bits per weight of the linear layers as they lie in memory now: some libraries repack in the first call. None where not shown."""
        return None

    def build(self) -> str | None:
        """What the engine's code is compiled for here, and its version, in one line; None where it does not say."""
        return None

    @abstractmethod
    def evidence(self) -> Evidence:
        """What was loaded: layers, bytes, bits, zeros, operators."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lives; of several devices the one that its inputs go to."""

    @property
    def devices(self) -> list[torch.device]:
        """All devices that it lives on, `device` first."""
        return [self.device]


class Capability(Loaded):
    """Base of what a measurement can ask for; `ability` says it in a word or two."""

    ability: ClassVar[str]

    @classmethod
    def of(cls, model: Loaded) -> Self:
        """A loaded artefact as one that can do this.

        Raises:
            methods.base.Unsupported: It cannot.
        """
        if not isinstance(model, cls):
            raise Unsupported(f"this engine does not {cls.ability}")
        return model


class Scores(Capability):
    """It gives the logits of every position of a text.

    Attributes:
        scoring: By which passes its policy allows a text to be scored.
        exact_keys: Pairs of a token and one that it attends to as without its policy, of a text of so many tokens of which so many are a
            prompt (`methods.formats.attention.policy`, `methods.formats.kv.cache`); None where no policy decides on keys.
        times_passes: `extend` runs as decoding does, so that passes of several tokens can be timed by it.
        computes_narrower: Its logits are of a wider type than what it computes in.
        reach: Positions from a token back to the farthest that it attends to, under its policy (`methods.formats.policy`); None: all.
    """

    ability = "score tokens"
    scoring: Scoring = "exact"
    exact_keys: Callable[[int, int], int] | None = None
    reach: int | None = None
    times_passes = True
    computes_narrower = False

    def check_scoring(self, *passes: Scoring) -> None:
        """Raise `Unsupported` unless its policy allows one of these."""
        if self.scoring not in passes:
            raise Unsupported(f"this protocol scores texts by {' or '.join(passes)}; the policy allows {self.scoring}")

    def exact_share(self, texts: Iterable[tuple[int, int]], prompt: int = 0) -> float | None:
        """Share of the pairs of a scored token and one that it attends to, itself included, whose key is exact: 1 where no key is rounded.

        Args:
            texts: Of each the first position whose logits are scored, and its length.
            prompt: Tokens of each that went through the model at once, before the others.

        Returns:
            None where no policy decides on keys, or there are no texts.
        """
        if self.exact_keys is None:
            return None
        exact = pairs = 0
        for start, length in texts:
            exact += self.exact_keys(length, prompt) - self.exact_keys(start, prompt)
            pairs += (length * (length + 1) - start * (start + 1)) // 2
        return exact / pairs if pairs else None

    @abstractmethod
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Next-token logits [B, T - start, V] of the positions from `start`, in the model's dtype.

        Args:
            ids: Token ids, int64 [B, T]; shorter sequences padded on the right (causal, so padding changes nothing before it).
            start: First position whose logits are wanted.
        """

    @abstractmethod
    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Process tokens [B, T] through the KV cache, after those that `state` holds (None: nothing yet).

        Returns:
            Next-token logits [B, T, V] in the model's dtype, and the state that holds these tokens too.
        """

    def behind(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Process a prompt [B, T]: logits [B, 1, V] of its last position alone, and the state as of `extend`."""
        logits, state = self.extend(ids)
        return logits[:, -1:].clone(), state

    def in_passes(self, prompt: torch.Tensor, written: torch.Tensor, passes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Logits [n, V] before each of the tokens behind a prompt, by passes of as many tokens as they were written by.

        Args:
            prompt: Token ids, int64 [1, T].
            written: What came behind it, int64 [1, n].
            passes: Behind the prompt's; of each the tokens that go through it, the last of the text first, and how many tokens it gave.

        Raises:
            methods.base.Unsupported: Its cache cannot let go of tokens.
        """
        raise Unsupported("passes of as many tokens cannot be made again on this engine")

    def token_logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the tokens 1..T-1 given those before, float32 [B, T-1]."""
        return label_logprobs(self.logits(ids)[:, :-1], ids[:, 1:]).cpu()


class Generates(Capability):
    """It writes a text after a prompt, token by token, the likeliest ones where it is not told to draw (`Draws`).

    Attributes:
        keeps_cache: The memory of a run's KV cache stays with the model for later runs.
        uncounted: What it does not tell of where the time of a step goes.
    """

    ability = "generate"
    keeps_cache = False
    uncounted: ClassVar[str] = "the engine does not show what runs in a step"

    @abstractmethod
    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        """Process a prompt [B, T] and choose the first token.

        Args:
            ids: Token ids, int64 [B, T].
            room: Tokens that will follow at most, for engines whose KV cache does not grow.
        """

    @abstractmethod
    def decode_step(self, step: Step) -> Step:
        """Process one token of each sequence through the cache and choose the next one."""

    @abstractmethod
    def cache_bytes(self, state: Any) -> int | None:
        """Bytes of a KV cache, None where the engine does not show it."""

    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """What it writes behind prompts [B, T] without guesses, a pass for each token: int64 [B, count]; of models that guess alone."""
        raise NotImplementedError

    def generate(self, ids: torch.Tensor, max_new: int, stop: Collection[int] = ()) -> list[list[int]]:
        """The continuation of each prompt [B, T]: at most `max_new` tokens, up to and with the first that is in `stop`."""
        step = self.prefill(ids, max_new)
        written: list[list[int]] = [[] for _ in ids]
        for last in range(max_new - 1, -1, -1):
            for text, token in zip(written, step.token[:, 0].tolist(), strict=True):
                if not (text and text[-1] in stop):
                    text.append(token)
            if not last or all(text[-1] in stop for text in written):
                break
            step = self.decode_step(step)
        return written


class Draws(Generates):
    """It writes tokens that are drawn at a temperature too.

    Attributes:
        temperature: At which they are drawn; 0: the likeliest one is written.
    """

    ability = "draw tokens at a temperature"
    temperature = 0.0

    @abstractmethod
    def draw(self, temperature: float) -> None:
        """From the next prompt on draw, the same for the same prompt; guesses leave the distribution as it is.

        Args:
            temperature: What logits are divided by; above 0.
        """


class CountsPasses(Generates):
    """It counts the passes of a text itself, where no module shows them.

    Attributes:
        shows_guesses: It tells how many tokens a pass had; otherwise only how many it gave.
    """

    ability = "count its passes"
    shows_guesses = True

    @abstractmethod
    def passes(self, state: Any) -> Sequence[int]:
        """Tokens of each pass of the whole model since that of the prompt, in order, guesses included where they are shown."""

    @abstractmethod
    def unguessed(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """As of `Generates`."""


class Encodes(Capability):
    """It turns texts into vectors."""

    ability = "encode texts"

    @abstractmethod
    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A vector for each text, [B, D].

        Args:
            ids: Token ids, int64 [B, T].
            mask: 1 for the tokens of a text, 0 for padding, int64 [B, T].
        """


class CountsTime(Generates):
    """It shows no operators, and has counters of its own of what they take."""

    ability = "count what its steps spend their time on"

    @abstractmethod
    def counting(self) -> CountsTime:
        """The same model with its counters on, which may slow it; itself where they are always on."""

    @abstractmethod
    def counted(self) -> Mapping[Place, tuple[int, float]]:
        """Operators and milliseconds of each part since this was asked last, or since the counters are on."""


class RunsLayers(Generates):
    """It runs the layers of a torch module, in whose places others of the same shapes can be put.

    Attributes:
        module: What it runs.
    """

    ability = "run the layers of a module"
    module: Any

    @abstractmethod
    def anew(self) -> Self:
        """A model over the same module with the layers that it holds now; it works while these are in their places."""


class LoadedModel(Scores, Generates):
    """A causal language model in memory: it scores and it generates."""


class Branches(LoadedModel):
    """It goes on from one text in several ways."""

    ability = "go on from one text in several ways"

    @abstractmethod
    def branch(self, state: Any) -> Any:
        """A copy of the state of a text: what goes on from one of them is not seen by the other.

        Raises:
            methods.base.Unsupported: It cannot be copied.
        """

    @property
    def decides_after(self) -> bool:
        """Whether prompts go through it as without its policy, which decides only then what of them stays: `read` and `decide` work."""
        return False

    def read(self, ids: torch.Tensor) -> tuple[Step, dict[str, torch.Tensor]]:
        """`prefill` of a prompt [1, T], and what it left before the policy decided, by name."""
        raise NotImplementedError

    def decide(self, reading: dict[str, torch.Tensor], tokens: int) -> Any:
        """The state after a prompt of so many tokens that left this in the same model under whichever policy, to the bit."""
        raise NotImplementedError


def label_logprobs(logits: torch.Tensor, labels: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """Log-probabilities of the labels, float32 [B, T], on the device of the logits.

    The softmax is taken in float32 whatever the model's dtype, a few positions at a time: on a CPU the piece stays in
    the cache (eight times faster than one that does not), on a GPU memory stays bounded.

    Args:
        logits: [B, T, V] in the model's dtype.
        labels: int64 [B, T].
        observe: Sees each piece before it is gone: positions in the order of `labels.flatten()`.
    """
    rows = max(1, _PIECE_BYTES[logits.device.type != "cpu"] // (4 * logits.shape[2]))
    flat, targets = logits.flatten(0, 1), labels.to(logits.device).flatten()
    found = []
    for piece, target in zip(flat.split(rows), targets.split(rows), strict=True):
        scores = piece.float()
        norm = torch.logsumexp(scores, -1)
        found.append(scores.gather(1, target[:, None])[:, 0] - norm)
        if observe:
            observe(scores, norm, found[-1])
    return torch.cat(found).view(labels.shape)

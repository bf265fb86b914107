"""Generation of one text, greedy or drawn, whose next tokens are guessed first (`methods.formats.draft.policy`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.depth.rows import check
from slimbench.methods.formats.draft.sampling import Sampling
from slimbench.methods.formats.kv.quantized import layer_bytes

Call = tuple[str, int, Callable[[], Any]]
"""A call of a part of what runs: its name, its rows, and what makes it."""


class Speculation:
    """One text that is gone on with.

    Args:
        drafter: Guesses, and checks its guesses.
        ids: The prompt, int64 [1, T].
        room: Tokens that are wanted.
        cache: An empty cache; None for that of transformers.

    Attributes:
        text: Token ids so far, those included that were not asked for yet.
        cache: Keys and values of all tokens of the text but the last.
        drafted: Tokens that were guessed.
        accepted: Of these, taken.

    Raises:
        Unsupported: The prompt is not one text, weights do not lie where they compute, or the cache cannot let go of tokens that were
            guessed wrongly.
    """

    def __init__(self, drafter: Drafter, ids: Tensor, room: int, cache: Any = None) -> None:
        if len(ids) != 1:
            raise Unsupported(f"drafts are for one text at a time, not {len(ids)}")
        if drafter.model.device.type == "meta":
            raise Unsupported("drafts do not run where each layer brings in its weights for the time of its call")
        out = drafter.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.drafter, self.cache, self.room = drafter, out.past_key_values, room
        if not croppable(self.cache):
            raise Unsupported("the cache cannot take back tokens that were guessed wrongly")
        self.text: list[int] = ids[0].tolist()
        self.drafted = self.accepted = 0
        self._waiting: deque[int] = deque()
        self._take(drafter.picked(out.logits[0, -1:]))

    def next(self) -> Tensor:
        """The next token, int64 [1, 1]."""
        if not self._waiting:
            self._pass()
        return torch.tensor([[self._waiting.popleft()]])

    def _take(self, tokens: list[int]) -> None:
        self.text += tokens
        self.room -= len(tokens)
        self._waiting.extend(tokens)

    def _pass(self) -> None:
        with watched(self.cache):
            guesses, chosen = self.drafter.guess_and_check(self.text, self.cache, max(0, self.room - 1))
            agreed = next((place for place, guess in enumerate(guesses) if chosen[place] != guess), len(guesses))
            if wrong := len(guesses) - agreed:
                self.cache.crop(-wrong)
        self.drafted += len(guesses)
        self.accepted += agreed
        self._take([*guesses[:agreed], chosen[agreed]])

    def stored_bytes(self) -> int:
        """Bytes of the cache, and of that of what guesses."""
        return bytes_of(self.cache) + self.drafter.stored_bytes()


class Drafter(ABC):
    """Guesses for one loaded model.

    Args:
        model: A causal language model of transformers.
        tokens: γ, guesses at most.

    Attributes:
        sampling: Draws the tokens; None: the likeliest ones come.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.sampling: Sampling | None = None

    def begin(self, ids: Tensor, room: int, cache: Any = None) -> Speculation:
        """Go on with a prompt; arguments as of `Speculation`."""
        return Speculation(self, ids, room, cache)

    def stored_bytes(self) -> int:
        """Bytes that it keeps of a text beside the cache of the model."""
        return 0

    @abstractmethod
    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        """Guess, and let the model choose behind the last token of a text and behind each guess.

        Args:
            text: Token ids.
            cache: Holds all of them but the last; afterwards the last and the guesses too.
            most: Guesses at most.

        Returns:
            The guesses, and the model's choices at their places, up to the first other one at least; one more where all are right.
        """

    def picked(self, logits: Tensor) -> list[int]:
        """A token for each of logits [n, V]: the likeliest, or one that is drawn."""
        tokens: list[int] = (self.sampling.drawn(logits) if self.sampling else logits.argmax(-1)).tolist()
        return tokens

    def settled(self, guesses: list[int], drafted: Sequence[Tensor] | None, logits: Tensor) -> list[int]:
        """The model's choices.

        Args:
            drafted: Logits [V] by which each guess was picked; None where they were looked up.
            logits: The model's, [γ + 1, V].
        """
        if self.sampling is None:
            return self.picked(logits)
        return self.sampling.settled(guesses, torch.stack([*drafted]) if drafted else None, logits)

    def parts(self) -> Mapping[str, Sequence[Any]]:
        """Modules whose calls take other times than their share of a pass of the whole model, by part; none where all is in such passes."""
        return {}

    def rehearse(self, ids: Tensor, rows: Sequence[int]) -> Iterator[Call]:
        """Calls of the parts, as guessing and checking makes them behind a prompt; each is to be made before the next is asked for.

        Args:
            ids: The prompt, int64 [1, T]; its tokens come again behind it.
            rows: Numbers of tokens that are checked at once.
        """
        yield from ()

    def chosen(self, text: list[int], guesses: list[int], cache: Any, drafted: Sequence[Tensor] | None = None) -> list[int]:
        """The model's choices behind the last token of a text and behind each guess, in one pass; the last argument as of `settled`."""
        ids = torch.tensor([[text[-1], *guesses]], device=self.model.device)
        return self.settled(guesses, drafted, self.model(ids, past_key_values=cache, use_cache=True).logits[0])


class LookupDrafter(Drafter):
    """Guesses from the text itself."""

    def __init__(self, model: Any, tokens: int, ngram: int) -> None:
        super().__init__(model, tokens)
        self.ngram = ngram

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        guesses = looked_up(text, self.ngram, min(self.tokens, most))
        return guesses, self.chosen(text, guesses, cache)


def looked_up(text: list[int], ngram: int, tokens: int) -> list[int]:
    """What followed the last tokens of a text where they stood first, the longest of them that stood there; at most so many tokens."""
    for size in range(min(ngram, len(text) - 1), 0, -1):
        last = text[-size:]
        for place in range(len(text) - size):
            if text[place : place + size] == last:
                return text[place + size : place + size + tokens]
    return []


class ExitDrafter(Drafter):
    """Guesses of the first blocks of the model itself."""

    def __init__(self, model: Any, tokens: int, blocks: int) -> None:
        super().__init__(model, tokens)
        self.base, self.head, self.all = model.base_model, model.get_output_embeddings(), list(blocks_of(model).values())
        self.early = blocks
        check(model)

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        first, count = cache.get_seq_length(), min(self.tokens, most)
        token, states, guesses, drafted = text[-1], [], list[int](), list[Tensor]()
        for place in range(count + 1):
            states.append(self._begun(token, cache, first + place))
            if place < count:
                drafted.append(self._logits(states[-1])[0])
                (token,) = self.picked(drafted[-1][None])
                guesses.append(token)
        return guesses, self.settled(guesses, drafted, self._logits(self._ended(states, cache, first)))

    def parts(self) -> Mapping[str, Sequence[Any]]:
        return {"early": self.all[: self.early], "late": self.all[self.early :], "head": [self.head]}

    def rehearse(self, ids: Tensor, rows: Sequence[int]) -> Iterator[Call]:
        cache, tokens = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values, ids[0].tolist()
        for count in rows:
            yield from self._rehearsed([tokens[place % len(tokens)] for place in range(count)], cache)

    def _rehearsed(self, tokens: list[int], cache: Any) -> Iterator[Call]:
        """The calls of one pass over some tokens, all of which stay in the cache."""
        first, states = cache.get_seq_length(), list[Tensor]()

        def begin(token: int, place: int) -> None:
            states.append(self._begun(token, cache, place))

        def end() -> None:
            states.append(self._ended(states, cache, first))

        for place, token in enumerate(tokens):
            yield "early", 1, partial(begin, token, first + place)
            yield "head", 1, partial(self._picked_behind, states[-1])
        yield "late", len(tokens), end
        yield "head", len(tokens), partial(self._picked_behind, states[-1])

    def _begun(self, token: int, cache: Any, place: int) -> Tensor:
        """State [1, 1, d] of a token behind the first blocks."""
        return self._run(self.all[: self.early], self.base.embed_tokens(torch.tensor([[token]], device=self.model.device)), cache, place)

    def _ended(self, states: list[Tensor], cache: Any, first: int) -> Tensor:
        """States [1, T, d] behind all blocks, of tokens from the place `first` on whose states behind the first ones are given."""
        return self._run(self.all[self.early :], torch.cat(states, 1), cache, first)

    def _logits(self, states: Tensor) -> Tensor:
        """Logits [T, V] behind states [1, T, d]."""
        logits: Tensor = self.head(self.base.norm(states))[0]
        return logits

    def _picked_behind(self, states: Tensor) -> list[int]:
        return self.picked(self._logits(states))

    def _run(self, blocks: list[Any], hidden: Tensor, cache: Any, first: int) -> Tensor:
        """States [1, T, d] of tokens at first, first + 1, … behind some blocks, whose layers of the cache hold all tokens before."""
        tokens = hidden.shape[1]
        places = torch.arange(first, first + tokens, device=hidden.device)[None]
        rotations = self.base.rotary_emb(hidden, position_ids=places)
        mask = None
        if tokens > 1:
            later = torch.arange(first + tokens, device=hidden.device)[None] > places[0][:, None]
            mask = hidden.new_zeros(later.shape).masked_fill(later, torch.finfo(hidden.dtype).min)[None, None]
        for block in blocks:
            hidden = block(
                hidden, attention_mask=mask, position_ids=places, position_embeddings=rotations, past_key_values=cache, use_cache=True
            )
        return hidden


class ModelDrafter(Drafter):
    """Guesses of another model; each text has a drafter of its own, with a cache.

    Args:
        draft: The other model.

    Attributes:
        cache: Its keys and values; None before a text begins.
        held: Tokens in it.
    """

    def __init__(self, model: Any, tokens: int, draft: Any) -> None:
        super().__init__(model, tokens)
        self.draft, self.held = draft, 0
        self.cache: Any = None

    def _own(self) -> ModelDrafter:
        """One for a text."""
        own = ModelDrafter(self.model, self.tokens, self.draft)
        own.sampling = self.sampling
        return own

    def begin(self, ids: Tensor, room: int, cache: Any = None) -> Speculation:
        """As of `Drafter`; the prompt goes through the draft too.

        Raises:
            Unsupported: As of `Speculation`, or the draft's cache cannot let go of tokens.
        """
        own = self._own()
        text = Speculation(own, ids, room, cache)
        if own.tokens:
            own.read(ids[0].tolist())
            if not croppable(own.cache):
                raise Unsupported("the cache of the draft cannot take back tokens that were guessed wrongly")
        return text

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        guesses, drafted = self.guess(text, min(self.tokens, most))
        return guesses, self.chosen(text, guesses, cache, drafted)

    def parts(self) -> Mapping[str, Sequence[Any]]:
        return {"draft": [self.draft]}

    def rehearse(self, ids: Tensor, rows: Sequence[int]) -> Iterator[Call]:
        """A guess takes in its last token, and the first one of a pass the model's own too where all guesses were right."""
        own = self._own()
        own.read(ids[0].tolist())

        def guess(tokens: list[int]) -> list[int]:
            return own.picked(own.read(tokens)[None])

        for count in (1, 2):
            yield "draft", count, partial(guess, ids[0, :count].tolist())

    def guess(self, text: list[int], count: int) -> tuple[list[int], list[Tensor]]:
        """The draft's own continuation of a text, so many tokens, and the logits [V] by which each was picked.

        What the cache holds is the text up to the place of its last token, where the last guesses ended or the first wrong one stood.
        """
        guesses, drafted = list[int](), list[Tensor]()
        if not count:
            return guesses, drafted
        if (beyond := self.held - (len(text) - 1)) > 0:
            self.held -= beyond
            self.cache.crop(-beyond)
        unread = text[self.held :]
        while len(guesses) < count:
            drafted.append(self.read(unread))
            unread = self.picked(drafted[-1][None])
            guesses += unread
        return guesses, drafted

    def read(self, tokens: list[int]) -> Tensor:
        """Take tokens into the cache, and give the draft's logits [V] behind them."""
        ids = torch.tensor([tokens], device=self.draft.device)
        out = self.draft(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.held += len(tokens)
        logits: Tensor = out.logits[0, -1]
        return logits

    def stored_bytes(self) -> int:
        return 0 if self.cache is None else bytes_of(self.cache)


@contextmanager
def watched(cache: Any) -> Iterator[None]:
    """A cache of a policy notes meanwhile what comes, so that it can let go of it."""
    if not hasattr(cache, "watch"):
        yield
        return
    cache.watch()
    try:
        yield
    finally:
        cache.settle()


def croppable(cache: Any) -> bool:
    """Whether a cache can let go of its last tokens: one of transformers, or that of a policy."""
    if hasattr(cache, "rolls_back"):
        return bool(cache.rolls_back)
    return all(getattr(layer, "is_croppable", False) for layer in cache.layers)


def bytes_of(cache: Any) -> int:
    """Bytes of a cache of transformers."""
    return sum(layer_bytes(layer) for layer in cache.layers)

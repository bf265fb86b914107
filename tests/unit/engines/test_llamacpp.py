"""The llama.cpp engine over a made-up context that adds tokens up: which tokens go where, and what a state stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slimbench.harness.engines.llamacpp import LlamaCppModel
from slimbench.harness.schema.evidence import Evidence

VOCABULARY, MOST = 64, 10
IDS = torch.arange(2 * 7).view(2, 7) * 5 % VOCABULARY


class Sums:
    """Stands for a context: the next token of a sequence is the sum of its tokens. Positions must follow each other."""

    def __init__(self, sequences: int, tokens: int) -> None:
        self.sequences, self.room, self.most_tokens = sequences, -(-tokens // 8) * 8, MOST
        self.held: list[list[int]] = [[] for _ in range(sequences)]

    def decode(self, token: NDArray[Any], position: NDArray[Any], sequence: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        assert len(token) <= self.most_tokens
        rows = []
        for one, where, which, flag in zip(token.tolist(), position.tolist(), sequence.tolist(), wanted.tolist(), strict=True):
            assert where == len(self.held[which]) < self.room
            self.held[which].append(one)
            if flag:
                rows.append(np.eye(VOCABULARY, dtype=np.float32)[sum(self.held[which]) % VOCABULARY])
        return np.array(rows, np.float32).reshape(-1, VOCABULARY)

    def clear(self) -> None:
        self.held = [[] for _ in range(self.sequences)]

    def forget(self, length: int) -> None:
        self.held = [tokens[:length] for tokens in self.held]

    def moved(self, tokens: int) -> Sums:
        larger = Sums(self.sequences, tokens)
        larger.held = self.held
        return larger


class Adder:
    vocab_size, max_length, cache_bytes_per_token = VOCABULARY, 100, 6

    def __init__(self) -> None:
        self.made: list[Sums] = []

    def context(self, sequences: int, tokens: int, threads: int) -> Sums:
        self.made.append(Sums(sequences, tokens))
        return self.made[-1]


@pytest.fixture
def weights() -> Adder:
    return Adder()


@pytest.fixture
def model(weights: Adder) -> LlamaCppModel:
    return LlamaCppModel(weights, lambda: Evidence(weight_bytes=0, parameters=0, layers=[]))  # type: ignore[arg-type]


def sums(ids: torch.Tensor) -> torch.Tensor:
    return ids.cumsum(1) % VOCABULARY


def test_logits_of_every_position_and_of_the_last_ones(model: LlamaCppModel) -> None:
    assert model.logits(IDS).argmax(-1).equal(sums(IDS)) and model.logits(IDS).dtype == torch.float32
    assert model.logits(IDS, 3).argmax(-1).equal(sums(IDS)[:, 3:])


def test_more_tokens_than_go_through_at_once(model: LlamaCppModel) -> None:
    ids = torch.arange(35)[None] * 3 % VOCABULARY
    assert model.logits(ids).argmax(-1).equal(sums(ids))
    assert model.logits(ids, 25).argmax(-1).equal(sums(ids)[:, 25:])
    assert model.prefill(ids).token.equal(sums(ids)[:, -1:])


def test_extending_gives_the_logits_of_the_whole(model: LlamaCppModel) -> None:
    first, state = model.extend(IDS[:, :4])
    second, state = model.extend(IDS[:, 4:], state)
    assert torch.cat([first, second], 1).argmax(-1).equal(sums(IDS))
    assert model.cache_bytes(state) == 2 * 7 * 6


def test_greedy_tokens_of_several_sequences(model: LlamaCppModel) -> None:
    step, ids = model.prefill(IDS), IDS
    for _ in range(5):
        assert step.token.equal(sums(ids)[:, -1:])
        ids = torch.cat([ids, step.token], 1)
        step = model.decode_step(step)


def test_the_cache_grows_beyond_its_room(model: LlamaCppModel, weights: Adder) -> None:
    step, ids = model.prefill(IDS, room=0), IDS
    for _ in range(30):
        ids = torch.cat([ids, step.token], 1)
        step = model.decode_step(step)
    assert step.token.equal(sums(ids)[:, -1:]) and len(weights.made) == 1
    state: Any = None
    for token in ids.split(1, 1):
        logits, state = model.extend(token, state)
    assert logits.argmax(-1).equal(sums(ids)[:, -1:])


def test_a_context_serves_again_where_it_fits(model: LlamaCppModel, weights: Adder) -> None:
    for ids in (IDS[:1], IDS[:1, :3], IDS[:1]):
        model.prefill(ids, room=1)
    assert len(weights.made) == 1
    model.prefill(IDS, room=1)
    model.prefill(IDS[:1], room=1)
    assert [context.sequences for context in weights.made] == [1, 2, 1]


def test_going_back_forgets_what_came_after(model: LlamaCppModel) -> None:
    first = model.prefill(IDS)
    second = model.decode_step(first)
    third = model.decode_step(second)
    assert model.decode_step(second).token.equal(third.token)
    assert model.decode_step(first).token.equal(second.token)


@pytest.mark.parametrize("begin", ["logits", "prefill", "extend"])
def test_a_state_dies_with_the_next_sequences(model: LlamaCppModel, begin: str) -> None:
    step = model.prefill(IDS)
    getattr(model, begin)(IDS)
    with pytest.raises(RuntimeError, match="this state is gone"):
        model.decode_step(step)


def test_a_state_that_was_gone_back_from_is_dead(model: LlamaCppModel) -> None:
    first = model.prefill(IDS)
    third = model.decode_step(model.decode_step(first))
    model.decode_step(first)
    with pytest.raises(RuntimeError, match="this state is gone"):
        model.decode_step(third)

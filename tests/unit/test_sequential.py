"""Walking the blocks of a decoder: the inputs are those of the whole model, and changes reach the next block."""

from __future__ import annotations

from pathlib import Path

import torch

from methods._sequential import blocks_of, walk
from tests.unit import tiny


def test_blocks_get_the_inputs_that_the_whole_model_gives_them(tmp_path: Path) -> None:
    model, ids = tiny.save_model(tmp_path, dtype="float32").load(), tiny.tokens(samples=5).ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    done: list[tuple[float, float]] = []
    walked = [(block.name, torch.cat(block.inputs)) for block in walk(model, ids, lambda *p: done.append(p))]
    assert [name for name, _ in walked] == list(blocks_of(model)) and done == [(1, 2), (2, 2)]
    for (_, inputs), expected in zip(walked, states, strict=False):
        assert torch.allclose(inputs, expected, atol=1e-5)


def test_a_changed_block_changes_the_compressed_stream_only(tmp_path: Path) -> None:
    model, ids = tiny.save_model(tmp_path, dtype="float32").load(), tiny.tokens().ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for index, block in enumerate(walk(model, ids, dense=True)):
        assert torch.allclose(torch.cat(block.dense_inputs), states[index], atol=1e-5)
        assert torch.allclose(torch.cat(block.inputs), states[index], atol=1e-5) == (index == 0)
        seen: dict[str, int] = {}
        block.observe(lambda name, x, seen=seen: seen.update({name: seen.get(name, 0) + len(x)}))
        assert set(seen) == set(block.linears()) and set(seen.values()) == {ids.numel()}
        for layer in block.linears().values():
            layer.weight.data.mul_(0.5)

"""Walking the blocks of a decoder: the inputs are those of the whole model, and changes reach the next block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from slimbench.methods.core.walk import walk
from slimbench.methods.formats.architecture.structure import blocks_of
from tests.support import tiny


def test_blocks_get_the_inputs_that_the_whole_model_gives_them(tmp_path: Path) -> None:
    model, ids = tiny.save_model(tmp_path, dtype="float32").load(), tiny.tokens(samples=5).ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    done: list[tuple[float, float]] = []
    walked = [(block.name, torch.cat(block.inputs)) for block in walk(model, ids, lambda *p: done.append(p))]
    assert [name for name, _ in walked] == list(blocks_of(model)) and done == [(1, 2), (2, 2)]
    for (_, inputs), expected in zip(walked, states, strict=False):
        assert torch.allclose(inputs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaConfig", {}),
        ("Gemma3TextConfig", {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8, "head_dim": 16}),
        ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8, "head_dim": 16}),
        ("FalconConfig", {"new_decoder_architecture": True}),
    ],
)
def test_blocks_make_what_they_make_in_the_model(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Blocks with a window or rotary positions of their own, and blocks whose outputs are a tuple."""
    config = getattr(transformers, architecture)(**(tiny.SHAPE | {"num_hidden_layers": 6} | settings))
    model, ids = tiny.save(config, tmp_path, "float32").load(), tiny.tokens(samples=80, length=32).ids
    made: list[list[Tensor]] = [[] for _ in range(6)]
    for index, block in enumerate(blocks_of(model).values()):
        block.register_forward_hook(lambda _, args, out, at=index: made[at].append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids, use_cache=False)
    wanted = [torch.cat(outputs) for outputs in made]
    for block, want in zip(walk(model, ids), wanted, strict=True):
        assert len(block.inputs) > 1 and not {type(x) for x in block.inputs} - {Tensor}
        torch.testing.assert_close(torch.cat([block.run(batch) for batch in range(len(block.inputs))]), want, rtol=1e-4, atol=1e-5)


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

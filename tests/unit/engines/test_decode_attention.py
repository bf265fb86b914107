"""Attention of one token, against softmax attention in float64 written out here and against transformers' own path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimbench.harness.engines import decode_attention
from tests.support import tiny


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Head by head; `mask` is added to the scores."""
    batch, heads, _, _ = query.shape
    share, found = heads // key.shape[1], []
    for b in range(batch):
        for h in range(heads):
            scores = key[b, h // share].double() @ query[b, h, 0].double() * scaling
            if mask is not None:
                scores = scores + mask[b, h % mask.shape[1], 0].double()
            found.append(torch.softmax(scores, 0) @ value[b, h // share].double())
    return torch.stack(found).view(batch, 1, heads, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["none", "seen", "added", "added by head"])
@pytest.mark.parametrize("shape", [(1, 9, 3, 5, 64), (3, 4, 4, 33, 16), (2, 6, 1, 1, 8)], ids=str)
def test_one_token_attends_as_in_float64(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, groups, length, width = shape
    query = torch.randn(batch, heads, 1, width).to(dtype)
    key, value = (torch.randn(batch, groups, length, width).to(dtype) for _ in range(2))
    mask = added = None
    if kind == "seen":
        mask = torch.rand(batch, 1, 1, length) < 0.7
        mask[..., 0] = True
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif kind != "none":
        mask = added = torch.randn(batch, heads if kind == "added by head" else 1, 1, length)
    got = decode_attention.attend(query, key, value, mask, 0.3)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact(query, key, value, added, 0.3), rtol=0, atol=8e-3 if dtype is torch.bfloat16 else 1e-5)


def test_a_model_decodes_the_same_with_it(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "dense", "float32")
    ids = tiny.tokens(2, 20).ids
    logits = []
    for replaced in (False, True):
        model = AutoModelForCausalLM.from_pretrained(source.path)
        if replaced:
            decode_attention.use(model)
            assert model.config._attn_implementation == decode_attention.NAME
        with torch.inference_mode():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            logits.append(model(ids[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


def test_a_model_with_other_attention_keeps_it(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    decode_attention.use(model)
    assert model.config._attn_implementation == "eager"

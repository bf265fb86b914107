"""The cache of transformers behind its adapters, with the libraries themselves. quanto compiles an extension at its first use: minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, QuantizedCache

from slimbench.harness.engines.transformers import TransformersEngine
from slimbench.harness.store import artefact
from slimbench.methods.quantization.cache.kv_cache import KVHqq, KVQuanto
from tests.support import tiny

pytestmark = pytest.mark.integration

WIDTH, LAYERS, BATCH = 32, 2, 2
IDS = tiny.tokens(samples=BATCH, length=96).ids


@pytest.mark.parametrize(
    ("method", "module", "arguments"),
    [
        (KVHqq(residual_length=64), "hqq", {"backend": "hqq", "axis_key": 1, "axis_value": 1}),
        pytest.param(KVQuanto(residual_length=64), "optimum.quanto", {"backend": "quanto"}, marks=pytest.mark.full),
    ],
    ids=["hqq", "quanto"],
)
def test_the_adapter_gives_what_the_library_gives(method: KVHqq | KVQuanto, module: str, arguments: dict, tmp_path: Path) -> None:
    pytest.importorskip(module)
    dense = tiny.save_model(tmp_path / "dense", "bfloat16", num_attention_heads=2, num_key_value_heads=1)
    (out := tmp_path / "out").mkdir()
    claim = method.compress(dense, None, out)
    artefact.write_manifest(out, artefact.Manifest(key="k", model="tiny", pipeline=[], claim=claim))
    model = TransformersEngine({"policy": "slimbench.methods.formats.policy.load"}).load(out, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.bfloat16).eval()
    cache = QuantizedCache(config=plain.config, nbits=4, q_group_size=32, residual_length=64, **arguments)
    with torch.inference_mode():
        want = torch.cat([plain(piece, past_key_values=cache, use_cache=True).logits for piece in IDS.split(64, 1)], 1)
        exact = plain(IDS).logits
    got = model.logits(IDS)
    assert torch.equal(got, want) and not torch.equal(got, exact)
    prefilled = model.prefill(IDS).state
    assert model.cache_bytes(prefilled) == 2 * LAYERS * BATCH * 96 * (WIDTH // 2 + 2 * 2), "4 bits, and scale and zero point in 16"
    assert claim.details["cache_bits"] == 5

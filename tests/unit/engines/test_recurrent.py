"""Models that are compact as they were trained: the same numbers in steps as at once, and bytes of a state or cache as their papers say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import ModelConfig, RunConfig
from slimbench.harness.config.sources import choice
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.planning import memory, obstacles
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import compress, models, quality, speed
from slimbench.methods.base import ModelShape
from tests.support.tiny import save_tokenizer, tiny_overrides
from tests.unit.measure.test_lies import Silent

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 257}
STATE = 2 * (64 * 4 + 64 * 8) * 4
"""Bytes of the states of a text: in each of two layers four inputs of each of 64 channels, and eight numbers of each; float32."""
RECURRENT = {
    "mamba": SMALL,
    "falcon_mamba": SMALL,
    "mamba2": SMALL | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
}


def shaped(model_type: str) -> ModelConfig:
    shape = RECURRENT[model_type] | {"model_type": model_type}
    if model_type == "mamba":
        shape = choice("model", "random-mamba-130m")["shape"] | SMALL
    return ModelConfig(name=model_type, source="random", dtype="float32", shape=shape)


def saved(config: ModelConfig, folder: Path) -> Path:
    models.generate(config, folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=RECURRENT)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TransformersModel(load_pretrained(saved(shaped(request.param), tmp_path_factory.mktemp("model"))), "cpu")


def trained(folder: Path, text: Path) -> Path:
    """The model of a folder after a second of training: with random weights it would be worse than chance."""
    from transformers import AutoTokenizer

    module, ids = load_pretrained(folder), torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(30):
        batch = ids[128 * step : 128 * (step + 1)].view(4, 32)
        module(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    module.save_pretrained(folder)
    return folder


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [10, 1, 5, 8]])
def test_a_text_gives_the_same_in_pieces(model: Any, sizes: list[int]) -> None:
    parts, state = [], None
    for piece in ids().split(sizes, 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    assert torch.allclose(torch.cat(parts, 1), model.logits(ids()), atol=1e-4)


def test_a_text_is_not_the_same_without_its_state(model: Any) -> None:
    """Else pieces would agree whatever is handed on."""
    apart = torch.cat([model.extend(piece)[0] for piece in ids().split(12, 1)], 1)
    assert (apart - model.logits(ids())).abs().max() > 1e-3


def test_its_steps_are_those_of_the_library(model: Any) -> None:
    wanted = model.module.generate(ids()[:1], max_new_tokens=8, do_sample=False)[0, 24:].tolist()
    assert model.generate(ids()[:1], 8)[0][: len(wanted)] == wanted


def test_the_state_does_not_grow(model: Any) -> None:
    states = [model.prefill(ids()[:, :tokens]).state for tokens in (8, 16, 24)]
    sizes = [model.cache_bytes(state) for state in states]
    assert sizes[0] and len(set(sizes)) == 1
    assert sizes == [sum(t.untyped_storage().nbytes() for layer in state.layers for t in tensors(vars(layer))) for state in states]


def tensors(held: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an object of the library holds."""
    if isinstance(held, torch.Tensor):
        yield held
    for part in held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ():
        yield from tensors(part)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, cache: Path, text: Path) -> tuple[RunConfig, Any, Any]:
    """The configuration of a small Mamba, and what its stages measure."""
    folder = trained(saved(shaped("mamba"), tmp_path_factory.mktemp("mamba")), text)
    more = [
        "suite.protocols=[window,incremental,stream@1024]",
        "speed.grid=[{batch: 1, prompt: [8, 64], new_tokens: 4}]",
        "speed.rows=[1,2]",
    ]
    config = resolve([*tiny_overrides(folder, text), *more])
    compress.run(config, "mamba", Silent())
    return config, quality.run(config, "mamba", "mamba", Silent()), speed.run(config, "mamba", "mamba", Silent())


def test_perplexity_through_its_state_is_that_of_whole_windows(recorded: tuple[RunConfig, Any, Any]) -> None:
    window, incremental, stream = recorded[1].perplexity
    assert [part.protocol.partition("-")[0] for part in (window, incremental, stream)] == ["window", "incremental", "stream"]
    assert incremental.window_nll == pytest.approx(window.window_nll, rel=1e-4)
    assert 1 < window.perplexity < 128 and 1 < stream.perplexity < 128


def test_its_record_of_speed_has_a_state_of_one_size(recorded: tuple[RunConfig, Any, Any]) -> None:
    result = recorded[2]
    assert [point.prompt for point in result.points] == [8, 64]
    assert [point.kv_cache_bytes for point in result.points] == [STATE, STATE] and result.memory.kv_cache_bytes == STATE
    assert all(point.candidate.decode_ms for point in result.points) and set(result.rows_ms) == {"1", "2"}
    whole = load_pretrained(Path(recorded[0].model.source.removeprefix("file:")))
    assert result.evidence.parameters == sum(p.numel() for p in whole.parameters())


def test_memory_is_estimated_without_keys_and_values(recorded: tuple[RunConfig, Any, Any]) -> None:
    """A fetched Mamba tells its sizes, and has no heads."""
    config = recorded[0].model_copy(update={"model": recorded[0].model.model_copy(update={"parameters": 10**6})})
    shape = models.known_shape(config.model)
    assert isinstance(shape, ModelShape) and (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (0, 0, 0)
    need = memory.estimate(config, (), Stage.SPEED, shape)
    assert need is not None and need.cache == 0 and need.weights == 4 * 10**6
    cell = make_cell(config)
    assert all(obstacles.obstacle(cell, stage) is None for stage in Stage)


@pytest.mark.parametrize("method", ["h2o", "kv-int8", "mqa", "rtn-4bit"])
def test_a_method_is_refused_in_one_line_or_goes_on(recorded: tuple[RunConfig, Any, Any], method: str, text: Path) -> None:
    folder = recorded[0].model.source.removeprefix("file:")
    cell = make_cell(resolve([*tiny_overrides(Path(folder), text), f"method={method}"]))
    assert "\n" not in (obstacles.obstacle(cell, Stage.COMPRESS) or "")


def test_latent_attention_keeps_one_vector_a_token(tmp_path: Path, text: Path) -> None:
    """DeepSeek-V2: a token is kept as `kv_lora_rank` numbers for all heads and `qk_rope_head_dim` rotated ones."""
    shape = {
        "model_type": "deepseek_v2",
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    config = ModelConfig(name="mla", source="random", dtype="float32", shape=shape)
    latent = TransformersModel(load_pretrained(saved(config, tmp_path)), "cpu")
    found, state = latent.extend(ids()[:, :20])
    rest, state = latent.extend(ids()[:, 20:], state)
    assert torch.allclose(torch.cat([found, rest], 1), latent.logits(ids()), atol=1e-4)
    assert latent.cache_bytes(state) == 2 * 2 * 24 * (16 + 4) * 4
    here = resolve([*tiny_overrides(tmp_path, text), "model.parameters=1000000"])
    need = memory.estimate(here, (), Stage.SPEED, models.known_shape(here.model))
    assert need is not None and need.cache == 2 * (8 + 4) * (16 + 4) * 4

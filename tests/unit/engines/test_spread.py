"""One model over several cards, as far as that can be seen without one: where each block goes, and that hooks change no number."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slimbench.harness.config.engines import get
from slimbench.harness.engines import spread
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel, load_pretrained
from slimbench.harness.measure.hardware import cuda_cards
from slimbench.methods.base import Unsupported
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight blocks."""
    return save_model(tmp_path_factory.mktemp("model"), dtype="float32", num_hidden_layers=8, tie_word_embeddings=False).path


@pytest.mark.parametrize("cards", [[0, 1], [2, 3, 4], list(range(8))])
def test_every_card_gets_whole_blocks_in_order_and_about_the_same(folder: Path, cards: list[int]) -> None:
    places = spread.device_map(folder, cards)
    blocks = [places[f"model.layers.{index}"] for index in range(8)]
    assert blocks == sorted(blocks) and set(places.values()) == set(cards)
    assert places["model.embed_tokens"] == cards[0] and places["lm_head"] == cards[-1]
    counts = [blocks.count(card) for card in cards]
    assert max(counts) - min(counts) <= 2


def test_an_embedding_that_is_the_head_lies_on_one_card(tmp_path: Path) -> None:
    tied = save_model(tmp_path, num_hidden_layers=4).path
    places = spread.device_map(tied, [0, 1])
    assert places["model.embed_tokens"] == places.get("lm_head", places["model.embed_tokens"])
    assert set(places.values()) == {0, 1}


def test_a_spread_model_computes_what_a_whole_one_does(folder: Path, tmp_path: Path) -> None:
    """Its second half lies elsewhere, here on disk; accelerate's hooks carry activations, cache and logits between the parts."""
    halves = {name: "cpu" if card == 0 else "disk" for name, card in spread.device_map(folder, [0, 1]).items()}
    parts = TransformersModel(load_pretrained(folder, "cpu", device_map=halves, offload_folder=tmp_path), "cpu")
    whole, ids = TransformersModel(load_pretrained(folder, "cpu"), "cpu"), torch.randint(0, 256, (2, 16))
    assert torch.equal(parts.logits(ids), whole.logits(ids)) and torch.equal(parts.logits(ids, 3), whole.logits(ids, 3))
    assert parts.generate(ids, 6) == whole.generate(ids, 6)
    assert parts.devices == whole.devices == [torch.device("cpu")]


def test_the_engine_asks_for_cards_from_its_device_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def loader(artefact: Path, device: str, trust_remote_code: bool, **more: Any) -> Any:
        asked.append(more)
        return load_pretrained(artefact, "cpu")

    TransformersEngine({}, cards=2).open(folder, loader, "cuda:1", False)
    TransformersEngine({}).open(folder, loader, "cpu", False)
    assert set(asked[0]["device_map"].values()) == {1, 2} and asked[1] == {}


class FakeEngine:
    """Stands for vLLM's `LLMEngine`: a model on each of its processes, asked through `apply_model`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> FakeEngine:
        return cls(arguments)

    def apply_model(self, function: Any) -> list[Any]:
        return [function(torch.nn.Linear(2, 2)) for _ in range(self.arguments["tensor_parallel_size"])]


def test_vllm_is_tensor_parallel_and_says_what_it_cannot_tell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vllm")
    fake.EngineArgs, fake.LLMEngine = dict, FakeEngine  # type: ignore[attr-defined]
    platforms = ModuleType("vllm.platforms.cpu")
    platforms.CpuPlatform = SimpleNamespace(register_triton_kernel_overrides=lambda: None)  # type: ignore[attr-defined]
    for module in (fake, ModuleType("vllm.platforms"), platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    from slimbench.harness.engines.vllm import VllmEngine

    engine = get("vllm")
    model: Any = VllmEngine(engine.loaders, cards=4).open(folder, lambda artefact, out: artefact, "cuda:0", False)
    assert model._engine.arguments["tensor_parallel_size"] == 4
    assert model.devices == [torch.device("cuda", card) for card in range(4)]
    with pytest.raises(Unsupported, match="vLLM over 4 cards gives no logits of a prompt"):
        model.logits(torch.zeros(1, 4, dtype=torch.int64))
    blocks = SimpleNamespace(num_blocks=11, kv_cache_tensors=[SimpleNamespace(size=110)])
    pool = SimpleNamespace(get_num_free_blocks=lambda: 5)
    scheduler = SimpleNamespace(kv_cache_config=blocks, kv_cache_manager=SimpleNamespace(block_pool=pool))
    model._engine.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    assert model.cache_bytes(None) == 4 * 50, "each card holds its share of every block"
    whole: Any = VllmEngine(engine.loaders).open(folder, lambda artefact, out: artefact, "cpu", False)
    assert whole._engine.arguments["tensor_parallel_size"] == 1 and whole.devices == [torch.device("cpu")]


@pytest.mark.skipif(len(cuda_cards()) > 0, reason="there is a card")
def test_no_card_is_asked_for_while_a_map_is_made(folder: Path) -> None:
    assert spread.device_map(folder, [0, 1]) and not torch.cuda.is_initialized()

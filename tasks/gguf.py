"""Turn a GGUF file into a folder that every library reads: safetensors in one dtype, configuration and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.util.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raise it when other weights, configuration or tokenizer come out of the same file; it stands in the keys of their model
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Dequantize a GGUF checkpoint and write it as a transformers folder; the folder appears whole or not at all.

    Args:
        gguf: The checkpoint, of an architecture that transformers reads.
        out: Folder to write; it is replaced if it exists.
        dtype: Name of the torch dtype of the written weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype))
    # The weights are dense by now, but transformers refuses to save while the model still calls itself quantized.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer = _tokenizer(gguf)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        _keep_rope_theta(folder / "config.json")


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with what transformers does not take over from it: special tokens and splitting rule."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    facts = _metadata(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False
    for role, attribute in SPECIAL_TOKENS.items():
        token_id = facts.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(token_id)))
    if facts.get("tokenizer.ggml.pre") == "smollm":
        digits_apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits_apart)
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _metadata(gguf: Path) -> dict[str, Any]:
    """The scalar fields of the header."""
    from gguf import GGUFReader, GGUFValueType

    fields = GGUFReader(gguf).fields.values()
    return {field.name: field.contents() for field in fields if GGUFValueType.ARRAY not in field.types}


def _keep_rope_theta(file: Path) -> None:
    """Repeat `rope_theta` where readers look for it that do not know `rope_parameters`, and would silently take 10,000."""
    config = json.loads(file.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.setdefault("rope_theta", theta)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

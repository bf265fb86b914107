"""The tokenizer of a model inside its GGUF file, so that llama.cpp and what stands on it can be handed text.

llama.cpp takes a byte-level BPE tokenizer as tokens, merges and the *name* of its rule for splitting text. The names below are those of
llama.cpp's `llama_vocab` (`tokenizer.ggml.pre`); a rule that has none there cannot be written down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimbench.methods.base import Unsupported

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_PATTERN = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf.TokenType


def add_tokenizer(file: Path, tokenizer: Path, out: Path) -> Path:
    """Write a copy of a GGUF file that has the tokenizer of a folder.

    Args:
        file: A GGUF file without a tokenizer.
        tokenizer: Folder with `tokenizer.json`.
        out: The file to write.

    Raises:
        Unsupported: It is no byte-level BPE tokenizer, or llama.cpp has no name for how it splits text.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
    from gguf.vocab import SpecialVocab

    described = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    splitting = splitting_rule(described)
    reader = GGUFReader(file)
    size = int(reader.fields["llama.vocab_size"].contents())
    tokens, types = _tokens(described, size)
    special = SpecialVocab(tokenizer, load_merges=True, n_vocab=size)
    text, flag, number, array = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.UINT32, GGUFValueType.ARRAY
    facts = {
        Keys.Tokenizer.MODEL: MetadataDetails(text, "gpt2"),
        Keys.Tokenizer.PRE: MetadataDetails(text, splitting),
        Keys.Tokenizer.LIST: MetadataDetails(array, tokens),
        Keys.Tokenizer.TOKEN_TYPE: MetadataDetails(array, types),
    }
    if special.merges:
        facts[Keys.Tokenizer.MERGES] = MetadataDetails(array, special.merges)
    facts |= {f"tokenizer.ggml.{role}_token_id": MetadataDetails(number, index) for role, index in special.special_token_ids.items()}
    facts |= {f"tokenizer.ggml.add_{role}_token": MetadataDetails(flag, given) for role, given in special.add_special_token.items()}
    if isinstance(special.chat_template, str):
        facts[Keys.Tokenizer.CHAT_TEMPLATE] = MetadataDetails(text, special.chat_template)
    writer = GGUFWriter(out, reader.fields[Keys.General.ARCHITECTURE].contents())
    copy_with_new_metadata(reader, writer, facts, [])
    return out


def splitting_rule(described: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a tokenizer splits text before it merges bytes.

    Args:
        described: The contents of `tokenizer.json`.

    Raises:
        Unsupported: It is no byte-level BPE tokenizer, or the rule has no name.
    """
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    kept = all(step == {"type": "NFC"} for step in _steps(described.get("normalizer"), "normalizers"))
    if described.get("model", {}).get("type") != "BPE" or "ByteLevel" not in kinds or not kept:
        raise Unsupported("the export to llama.cpp writes byte-level BPE tokenizers only")
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if len(patterns) == 1 and patterns[0] in _BY_PATTERN:
        return _BY_PATTERN[patterns[0]]
    whole = steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if whole and kinds == ["ByteLevel"]:
        return "gpt-2"
    if whole and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise Unsupported("llama.cpp has no name for how this tokenizer splits text")


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, which is None, one step or a sequence of them."""
    return part.get(name, [part]) if part else []


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token in the order of its id, and its type; ids that the tokenizer does not use are filled up."""
    by_id = {index: (token, _NORMAL) for token, index in described["model"]["vocab"].items()}
    for added in described.get("added_tokens", []):
        by_id[added["id"]] = (added["content"], _CONTROL if added.get("special") else _USER_DEFINED)
    every = [by_id.get(index, (f"[PAD{index}]", _USER_DEFINED)) for index in range(size)]
    return [token for token, _ in every], [kind for _, kind in every]

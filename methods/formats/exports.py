"""From an artefact to what other programs load: which formats can be written as which, and how to run the result."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from slimbench.methods.base import Unsupported
from slimbench.util.text import nearest

_FORMATS = "slimbench.methods.formats"
WRITERS = {
    "gguf": {
        "gguf": f"{_FORMATS}.gguf.existing",
        "huggingface": f"{_FORMATS}.gguf.from_huggingface",
        "packed": f"{_FORMATS}.gguf.from_packed",
    },
    "compressed-tensors": {"packed": f"{_FORMATS}.compressed_tensors.from_packed"},
    "gptq": {"packed": f"{_FORMATS}.gptq_checkpoint.write"},
}
"""What is written → format of the artefact → dotted path of the function `(artefact, folder)` that writes it."""

AS_IT_IS = "slimbench"
LOADS = {
    "gguf": "llama-cli -m {folder}/model.gguf -p 'Once upon a time'",
    "compressed-tensors": "vllm serve {folder}",
    "gptq": "python -c \"from gptqmodel import GPTQModel; GPTQModel.load('{folder}')\"",
    "huggingface": "python -c \"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('{folder}')\"",
    AS_IT_IS: "python -c \"import slimbench; slimbench.load_model('{folder}')\"",
}
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
    "generation_config.json",
)


def targets(format_: str) -> list[str]:
    """What an artefact of a format can be written as, the one that most programs load first."""
    dense = ["huggingface"] if format_ == "huggingface" else []
    return [*dense, *(target for target, sources in WRITERS.items() if format_ in sources), AS_IT_IS]


def export(artefact: Path, format_: str, tokenizer: Path, target: str, out: Path) -> Path:
    """Write an artefact, with its tokenizer, as what another program loads. No weight changes.

    Args:
        artefact: The folder of the artefact.
        format_: Its format.
        tokenizer: Folder of the dense source, whose tokenizer comes along.
        target: One of `targets(format_)`.
        out: Empty folder that receives the files.

    Returns:
        What the other program is to be given: the folder, or the file in it.

    Raises:
        Unsupported: The target cannot hold the artefact.
    """
    if target not in targets(format_):
        raise Unsupported(f"an artefact of format {format_} cannot be written as {target}{nearest(target, targets(format_))}")
    if target not in WRITERS:
        shutil.copytree(artefact, out, dirs_exist_ok=True)
        _copy_tokenizer(tokenizer, out)
        return out
    module, _, function = WRITERS[target][format_].rpartition(".")
    write = getattr(importlib.import_module(module), function)
    if target == "gguf":
        return _gguf(write(artefact, out), tokenizer, out)
    write(artefact, out)
    _copy_tokenizer(tokenizer, out)
    return out


def _gguf(bare: Path, tokenizer: Path, out: Path) -> Path:
    from slimbench.methods.formats.gguf.tokenizer import add_tokenizer

    whole = out / "whole.gguf"
    add_tokenizer(bare, tokenizer, whole)
    whole.replace(out / "model.gguf")
    return out / "model.gguf"


def _copy_tokenizer(source: Path, out: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)

"""A `file:` model's identity: the content of all its files, configuration, weights, index, tokenizer and code alike."""

from __future__ import annotations

from pathlib import Path

from slimbench.harness.config.errors import ConfigError
from slimbench.util import checksums
from slimbench.util.hashing import digest
from slimbench.util.text import closest

_UNREAD = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".md"}  # no pickles, no other library's weights, no prose


def identity(folder: Path) -> str:
    """Sixteen hex digits of the names and bytes of what is read of a model folder.

    Each file is hashed once and remembered by size and time, so that a second look costs no reading. Hidden files, sub-folders
    and what slimbench never loads (pickles, weights for other libraries, Markdown) are left out.

    Raises:
        ConfigError: There is no model in the folder, or it cannot be read.
    """
    if not (folder / "config.json").is_file():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir() and p.name != folder.name] if folder.parent.is_dir() else []
        raise ConfigError(f"model.source: no config.json in {folder}{closest(folder.name, siblings)}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.source: no safetensors in {folder}, and nothing else is loaded; "
            "convert it with AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.suffix not in _UNREAD)
    try:
        return digest(dict(zip((file.name for file in files), checksums.sha256s(files), strict=True)))
    except OSError as error:
        raise ConfigError(f"model.source: {error.filename} cannot be read: {error.strerror}") from error

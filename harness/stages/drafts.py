"""Another model of `conf/model` that guesses for the one that is compressed: which it is, whether it can, and where it lies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import ModelConfig, RunConfig, StepConfig
from slimbench.harness.stages import models
from slimbench.methods.base import Unsupported
from slimbench.util import checksums
from slimbench.util.hashing import digest

if TYPE_CHECKING:
    from slimbench.harness.stages.common import Reporter  # which imports torch

_WHOLE = "tokenizer.json"
_OTHERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def keys(config: RunConfig) -> list[str]:
    """What the drafts of a pipeline depend on, of each model that a step names."""
    return [identity(step.draft) for step in config.pipeline if step.draft]


def identity(draft: ModelConfig) -> str:
    """Name, revision and content of a model, as of a teacher."""
    revision = f"@{draft.revision}" if draft.revision else ""
    return f"{draft.name}{revision} {digest(models.identity(draft))}"


def misfit(config: RunConfig) -> str | None:
    """Why a model that a step names cannot guess for the cell's, in one line, as far as what is here tells; None where it can.

    Raises:
        ConfigError: The config.json of one of them does not describe a decoder.
    """
    return next((reason for step in config.pipeline if (reason := _misfit(config.model, step))), None)


def prepare(config: RunConfig, step: StepConfig, report: Reporter) -> tuple[Path, str] | None:
    """Folder and identity of the model that a step names, fetched or made if need be; None where it names none.

    Raises:
        Unsupported: It cannot guess for the cell's model, which is here already.
        tasks.assets.AssetError: It cannot be fetched.
    """
    if step.draft is None:
        return None
    folder = models.prepare(step.draft, report.phase)
    if reason := _misfit(config.model, step):
        raise Unsupported(reason)
    return folder, identity(step.draft)


def _misfit(model: ModelConfig, step: StepConfig) -> str | None:
    if (draft := step.draft) is None:
        return None
    try:
        reason = _by_size(model, draft) or _by_tokens(models.folder_of(model), models.folder_of(draft))
        if reason is None and (shape := models.known_shape(draft)):
            build_method(step).check_draft(shape)
    except Unsupported as error:
        reason = str(error)
    return f"{step.name} cannot guess for {model.name} by {draft.name}: {reason}" if reason else None


def _by_size(model: ModelConfig, draft: ModelConfig) -> str | None:
    size, most = _parameters(draft), _parameters(model)
    return f"its {size:,} parameters are not fewer than {most:,}" if size and most and size >= most else None


def _by_tokens(own: Path | None, other: Path | None) -> str | None:
    """Why ids of one folder do not mean in the other what they mean here."""
    if own is None or other is None:
        return None
    if _vocabulary(own) != _vocabulary(other):
        return "their tokenizers differ"
    widths = [models.shape_of(folder).vocab_size for folder in (own, other)]
    return None if widths[0] == widths[1] else f"it has logits of {widths[1]:,} tokens, the model of {widths[0]:,}"


def _parameters(model: ModelConfig) -> int | None:
    """Parameters of a model, as its choice says or its files hold; None where neither is here."""
    if model.parameters or (folder := models.folder_of(model)) is None:
        return model.parameters
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _vocabulary(folder: Path) -> str | None:
    """Hash of the token of each id, or of the files of a tokenizer that does not list them; None without a tokenizer.

    Raises:
        Unsupported: `tokenizer.json` is none.
    """
    file = folder / _WHOLE
    if not file.is_file():
        files = [folder / name for name in _OTHERS if (folder / name).is_file()]
        return digest(checksums.sha256s(files)) if files else None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        listed = told["model"]["vocab"]
        tokens = dict(listed) if isinstance(listed, dict) else {entry[0]: place for place, entry in enumerate(listed)}
        return digest(tokens | {added["content"]: added["id"] for added in told.get("added_tokens") or []})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unsupported(f"{file} does not list its tokens ({error})") from error

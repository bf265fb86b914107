"""An artefact is loaded only while its files are those that were published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.stages import common
from slimbench.harness.store import artefact
from slimbench.harness.store.artefact import Manifest
from slimbench.methods.base import Claim
from tests.unit.measure.test_lies import Silent

CONTENT = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "parts/more.bin": b"1"}


@pytest.fixture
def key() -> str:
    """The key of an artefact that was published."""
    key = uuid4().hex[:16]
    with artefact.staging(key) as folder:
        out = folder / "step-0"
        for name, content in CONTENT.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        artefact.publish(out, Manifest(key=key, model="tiny", pipeline=[], claim=Claim("huggingface")))
    return key


def test_what_was_published_is_opened(key: str) -> None:
    assert artefact.fault(key) is None and artefact.opened(key) == artefact.location(key)
    assert {file.name for file in artefact.read_manifest(artefact.location(key)).files} == set(CONTENT)


def _without_hashes(folder: Path) -> None:
    """As versions wrote it that took no hashes."""
    artefact.write_manifest(folder, artefact.read_manifest(folder).model_copy(update={"files": []}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"Weights" * 100), "model.safetensors has other bytes"),
    "length": (lambda folder: (folder / "parts" / "more.bin").write_bytes(b""), "parts/more.bin has other bytes"),
    "gone": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "more": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"1"), "adapter.safetensors does not belong to it"),
    "no hashes": (_without_hashes, "it has no hashes"),
    "no manifest": (lambda folder: (folder / artefact.MANIFEST).unlink(), "it is not in the cache"),
    "half a manifest": (lambda folder: (folder / artefact.MANIFEST).write_text('{"key":'), "its manifest cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_anything_else_is_not_loaded(key: str, overrides: list[str], damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(artefact.location(key))
    assert str(artefact.fault(key)).startswith(reason)
    with pytest.raises(artefact.Damaged, match="the artefact is not to be used: ") as error:
        common.load(resolve(overrides), key, Silent())
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_where_an_artefact_differs_from_its_record_is_told(key: str) -> None:
    files = artefact.read_manifest(artefact.location(key)).files
    assert artefact.unlike(key, files) is None and artefact.unlike(key, [*reversed(files)]) is None
    other = [file.model_copy(update={"sha256": "f" * 64} if file.name == "config.json" else {}) for file in files]
    assert artefact.unlike(key, other) == "config.json is 44136fa3, and ffffffff in the record"
    assert artefact.unlike(key, files[1:]) == f"{files[0].name} is {str(files[0].sha256)[:8]}, and missing in the record"
    assert artefact.unlike(key, [file.model_copy(update={"sha256": None}) for file in files]) is None, "before there were hashes"

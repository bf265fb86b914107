"""Reads back what W&B wrote offline: a LevelDB log of protobuf records behind a header of seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def payloads(path: Path) -> Iterator[bytes]:
    """The records of the log, pieced together over its blocks."""
    data, offset, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while offset + _HEADER <= len(data):
        room = _BLOCK - offset % _BLOCK
        if room < _HEADER:
            offset += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        piece = data[offset + _HEADER : offset + _HEADER + length]
        offset += _HEADER + length
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts


def read(folder: Path) -> dict[str, Any]:
    """Identity, config, summary, tables and artefacts of one offline run."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("run-*.wandb")
    found: dict[str, Any] = {"config": {}, "summary": {}, "tables": {}, "artefacts": []}
    for payload in payloads(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags), "project": record.run.project}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.value_json}
        elif kind == "config":
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update if item.value_json}
        elif kind == "summary":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update if item.value_json}
            found["summary"] |= {key: json.loads(value) for key, value in values.items()}
        elif kind == "artifact" and record.artifact.type == "compressed-model":
            found["artefacts"].append(json.loads(record.artifact.metadata))
    for path in (folder / "files" / "media" / "table").glob("*.table.json"):
        found["tables"][path.name.rsplit("_", 2)[0]] = json.loads(path.read_text())
    return found

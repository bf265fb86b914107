"""Cells as W&B runs: one run for each row of the board, with its records' configuration, tables and artefact. A function of the records.

Runs carry ids made from keys and hardware, so that logging a cell again updates its run; where the keys of a cell were others before,
the oldest ones, so that it goes on with the run that it had. Without a login runs are written offline,
and `wandb sync` sends them later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index, cells, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.util import locks
from slimbench.util.files import write_atomically
from slimbench.util.hashing import short_hash

Mode = Literal["auto", "online", "offline"]
_LONGEST = 128
_STATE = "slimbench-runs.json"
_OF_THE_TABLE = {
    *(f"{measure}_{fact}" for measure in ("perplexity", "accuracy") for fact in ("verdict_p", "needed", "apart")),
    *("rank_last", "accuracy_rank_last"),
}
"""What any further row of the table changes a little."""
_NOT_SUMMARY = {"keys", "provenance", "command", "speed_points", "contexts", "flags", *_OF_THE_TABLE}


@dataclass(frozen=True)
class Run:
    """What a cell becomes in W&B.

    Attributes:
        id: Made from the oldest keys of the cell, and its hardware.
        group: Model and family, by which the runs are grouped; `job_type` is the family.
        config: Identity, settings and protocols of the cell, and its provenance.
        summary: The measured values under the names of the board's row.
        tables: Columns and rows by name: `speed_grid`, `tasks`, `layers`, `files`.
        artefact: Claim, files and hashes of the compressed model; None where none was made.
    """

    id: str
    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    summary: dict[str, Any]
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    artefact: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        """Changes when anything of the run does."""
        return short_hash(json.dumps([self.config, self.summary, self.tables, self.artefact], sort_keys=True, default=str))


def runs(records: Iterable[Record]) -> list[Run]:
    """A run for each row of the board, in its order."""
    ordered = oldest_first(records)
    index = Index(ordered)
    bearers = cells(ordered)
    return [_run(row, bearers[row.place], index) for row in rows(ordered)]


def log(
    records: Iterable[Record],
    project: str,
    folder: Path,
    entity: str | None = None,
    mode: Mode = "auto",
    progress: Callable[[Run], None] | None = None,
) -> tuple[list[Run], bool]:
    """Write every cell as a run; those that were logged to the same project from this folder and have not changed are left alone.

    Args:
        folder: Where W&B keeps its files (`folder/wandb`).
        mode: `auto`: online with a login, offline without.

    Returns:
        The runs that were written, and whether they went to the server.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it calls home of itself, offline too
    import wandb

    settings: dict[str, Any] = {"console": "off", "silent": True, "disable_git": True, "save_code": False, "host": "-"}
    settings |= {"x_disable_meta": True, "x_disable_stats": True}
    online = mode == "online" or (mode == "auto" and logged_in())
    state_file = folder / "wandb" / _STATE
    state = _logged(state_file)
    place = f"{entity or ''}/{project}"
    written = []
    for run in runs(records):
        if state.get(f"{place}/{run.id}") == run.digest:
            continue
        handle = wandb.init(
            project=project,
            entity=entity,
            id=run.id,
            name=run.name,
            group=run.group,
            job_type=run.job_type,
            tags=run.tags,
            config=run.config,
            dir=folder,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            settings=wandb.Settings(**settings),
        )
        handle.log({name: wandb.Table(columns=[*columns], data=[*data]) for name, (columns, data) in run.tables.items() if data})
        handle.summary.update(run.summary)
        if run.artefact:
            made = wandb.Artifact(f"artefact-{run.id}", type="compressed-model", metadata=run.artefact)
            with made.new_file("artefact.json") as file:
                json.dump(run.artefact, file, indent=1)
            handle.log_artifact(made)
        handle.finish()
        _note(state_file, f"{place}/{run.id}", run.digest)
        written.append(run)
        if progress:
            progress(run)
    if written:
        wandb.teardown()  # offline files are whole only when W&B's own process has ended
    return written, online


def _logged(state_file: Path) -> dict[str, str]:
    """The digest of each run that was logged, by its place; none where the file is torn: then all is logged again."""
    try:
        state = json.loads(state_file.read_text())
    except (OSError, ValueError):
        return {}
    return {place: str(digest) for place, digest in state.items()} if isinstance(state, dict) else {}


def _note(state_file: Path, place: str, digest: str) -> None:
    """Add a run to what was logged; several nodes may log from one folder."""
    with locks.held(state_file):
        write_atomically(state_file, json.dumps(_logged(state_file) | {place: digest}, indent=1).encode())


def offline_runs(folder: Path) -> list[Path]:
    """The folders of runs that were written offline and not sent yet."""
    found = sorted((folder / "wandb").glob("offline-run-*"))
    return [path for path in found if not list(path.glob("*.synced"))]


def logged_in() -> bool:
    """Whether W&B has a key; nothing is asked for, and `WANDB_MODE` is kept to."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False


def _run(row: Row, bearer: Record, index: Index) -> Run:
    found = {stage: index.of_row(row, stage) for stage in Stage}
    family = row.family or "none"
    measured = row.model_dump(mode="json", exclude=_NOT_SUMMARY)
    return Run(
        id=_id(row, found),
        name=f"{row.pipeline} · {row.engine}"[:_LONGEST],
        group=f"{row.model} · {family}"[:_LONGEST],
        job_type=family[:64],
        tags=[
            tag[:64] for tag in dict.fromkeys((row.model, row.engine, row.device, row.suite, row.status, "foreign" * row.foreign)) if tag
        ],
        config=clean(_config(row, bearer)),
        summary={name: value for name, value in measured.items() if value is not None} | {"flags": "; ".join(row.flags)},
        tables=_clean_tables(_tables(row, found)),
        artefact=clean(_artefact(found[Stage.COMPRESS])),
    )


def _id(row: Row, found: dict[Stage, Record | None]) -> str:
    """The oldest keys of a cell held the hardware themselves."""
    former = [record.cell.former_keys[0] for record in found.values() if record and record.cell.former_keys and _is_of(record, row)]
    return short_hash(former[-1].compress, former[-1].quality, former[-1].speed) if former else short_hash(*row.place)


def _is_of(record: Record, row: Row) -> bool:
    return record.cell.keys == row.keys and record.hardware.fingerprint == row.fingerprint


def _config(row: Row, bearer: Record) -> dict[str, Any]:
    identity = bearer.cell.model_dump(mode="json", exclude={"keys", "reference", "former_keys"})
    return identity | {
        "keys": row.keys.model_dump(),
        "protocols": {name: bearer.config.get(name) for name in ("suite", "speed", "calibration", "limits")},
        "command": row.command,
        "provenance": bearer.provenance,
    }


def _tables(row: Row, found: dict[Stage, Record | None]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "speed_grid": _columns(row.speed_points),
        "contexts": _columns(row.contexts),
        "tasks": (
            ["task", "accuracy", "delta"],
            [[task, accuracy, row.task_delta.get(task)] for task, accuracy in row.task_accuracy.items()],
        ),
    }
    results = [result for stage in (Stage.QUALITY, Stage.SPEED) if (r := found[stage]) and (result := r.quality or r.speed)]
    if results and (evidence := results[0].evidence):
        columns = ["layer", "role", "count", "parameters", "bytes", "bits_per_weight", "zeros", "operators"]
        layers = [layer.model_dump() for layer in evidence.layers]
        tables["layers"] = (columns, [[_flat(layer[name]) for name in columns] for layer in layers])
    return tables


def _columns(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Names and values of lines of a table."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return names, [[line.get(name) for name in names] for line in lines]


def _artefact(record: Record | None) -> dict[str, Any] | None:
    if record is None or record.compress is None:
        return None
    result = record.compress
    return {
        "key": record.key,
        "claim": result.claim.to_dict(),
        "disk_bytes": result.disk_bytes,
        "dense_bytes": result.dense_bytes,
        "files": [file.model_dump() for file in result.files],
    }


def _flat(value: Any) -> Any:
    return ", ".join(f"{k} × {v}" for k, v in value.items()) if isinstance(value, dict) else value


def _clean_tables(tables: dict[str, tuple[list[str], list[list[Any]]]]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The tables with finite numbers and one-line texts."""
    return {name: (list(columns), clean(data)) for name, (columns, data) in tables.items()}

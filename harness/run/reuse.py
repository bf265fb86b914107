"""What was made before is used again only where it is still what it says: records by the code behind them, artefacts by their bytes."""

from __future__ import annotations

from slimbench.harness.config import lock
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store import artefact


def changed_code(record: Record, config: RunConfig) -> list[str]:
    """The methods, engines, formats and protocols, by kind and name, whose code is not what it was when the record was made."""
    return lock.differing(record.code, lock.fingerprints(config, record.stage)) if record.code else []


def artefact_fault(key: str, config: RunConfig, record: Record | None) -> str | None:
    """Why an artefact has to be made again before it is used, in a few words, or None.

    Args:
        key: Its compress key.
        record: Its compress record, made on this hardware; None where there is none.
    """
    if problem := artefact.fault(key):
        return problem
    manifest = artefact.read_manifest(artefact.location(key))
    if changed := lock.differing(manifest.code, lock.fingerprints(config, Stage.COMPRESS)):
        return f"the code of {' and '.join(changed)} has changed since"
    return other_bytes(key, record)


def other_bytes(key: str, record: Record | None) -> str | None:
    """Where an artefact differs from its compress record, in a few words, or None.

    Another device, another card, another build of torch may round differently: a record of other hardware says nothing about these bytes.
    """
    return artefact.unlike(key, record.compress.files) if record is not None and record.compress else None

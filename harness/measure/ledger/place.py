"""What a part of a ledger is known by."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.harness.schema.ledger import PartKind


@dataclass(frozen=True)
class Place:
    """A part: its kind, and the classes of layers where it has some."""

    kind: PartKind
    layers: tuple[str, ...] = ()

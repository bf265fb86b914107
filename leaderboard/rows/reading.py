"""Records as a board needs them: of the log-likelihoods of zero-shot items, which are most of a file and on no page, only their sums.

The sums tell whether two records have the same ones.
"""

from __future__ import annotations

from pathlib import Path

from slimbench.harness.schema.former.migrations import migrate
from slimbench.harness.schema.record import Record
from slimbench.harness.store import shared
from slimbench.harness.store.decode import decode
from slimbench.harness.store.store import read


def lean(path: Path) -> Record | str:
    """The record in a file, or one line that says why there is none."""
    try:
        data = migrate(shared.join(decode(path.read_bytes()), shared.folder_of(path)))
        for task in (data.get("quality") or {}).get("zeroshot") or []:
            items = task["items"]
            items["loglikelihoods"] = [[sum(choices)] for choices in items.get("loglikelihoods") or []]
        return Record.model_validate(data)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return read(path)

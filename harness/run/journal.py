"""Starts and ends of stages, told in a file outside the results folder: what ran twice and was written over cannot be seen inside.

`SLIMBENCH_JOURNAL=FILE` asks for it. A line is `<time> <host> <process id> <stage>-<key>`, with the status at its end
where a record was written.
"""

from __future__ import annotations

import datetime
import os
import socket
from contextlib import suppress


def note(task: str, status: str = "") -> None:
    """Add a line, whole, however many processes write at a time; a journal that cannot be written stops nothing.

    Args:
        task: Stage and key.
        status: Of the record that was written; empty when the stage is started.
    """
    if file := os.environ.get("SLIMBENCH_JOURNAL"):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = " ".join(filter(None, (now, socket.gethostname(), str(os.getpid()), task, status)))
        with suppress(OSError), open(file, "ab", buffering=0) as stream:
            stream.write(f"{line}\n".encode())

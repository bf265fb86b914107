"""The time that an exchange with a server may take, whatever part of it the server draws out.

Timeouts of a library are those of each read: a server that sends a byte of a header now and then, or one interim answer after another, is
within them for ever. Here the connection is shut when the time is over, and whoever reads from it comes to its end.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from threading import Lock, Timer
from typing import Any

_CONNECTED = "connection.connect_tcp.complete"


class Deadline:
    """So many seconds from where its block begins; for one connection at a time.

    Attributes:
        over: The time is over.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._line: socket.socket | None = None
        self._lock, self._timer = Lock(), Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._take(None)

    def watch(self, event: str, told: Mapping[str, Any]) -> None:
        """Take the connection of a request when it is made; httpx calls it where it is the extension `trace` of the request."""
        if event != _CONNECTED:
            return
        with self._lock:
            self._take(told["return_value"].get_extra_info("socket").dup())  # TLS takes the socket itself away
            if self.over:
                self._shut()

    def _end(self) -> None:
        with self._lock:
            self.over = True
            self._shut()

    def _take(self, line: socket.socket | None) -> None:
        if self._line is not None:
            self._line.close()
        self._line = line

    def _shut(self) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):  # the server has gone already
                self._line.shutdown(socket.SHUT_RDWR)

"""A server on this machine that hands requests on to another one there, and counts each that comes over the wire, tried again or not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_OF_ONE_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


@dataclass
class Passed:
    """Where it is, and what went through.

    Attributes:
        asked: Bodies of the requests with one, in the order in which they came.
        answered: Those of them whose answer went out with status 200.
        bare: Number of requests without a body.
    """

    url: str
    asked: list[bytes] = field(default_factory=list)
    answered: list[bytes] = field(default_factory=list)
    bare: int = 0


@contextlib.contextmanager
def forwarding(port: int, after: Callable[[int], None] = lambda answered: None) -> Iterator[Passed]:
    """A proxy of the server at a port, until the block ends; where that one is gone, the connection ends without a word.

    Args:
        after: Told how many are answered, once each such answer is out.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._forward(b"")

        def do_POST(self) -> None:
            self._forward(self.rfile.read(int(self.headers["Content-Length"])))

        def _forward(self, body: bytes) -> None:
            with lock:
                passed.bare += not body
                passed.asked += [body] if body else []
            there = HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                there.request(self.command, self.path, body or None, self._kept(self.headers.items()))
                reply = there.getresponse()
                content = reply.read()
            except (OSError, HTTPException):
                self.close_connection = True
                return
            finally:
                there.close()
            self.send_response(reply.status)
            for name, value in {**self._kept(reply.getheaders()), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            if body and reply.status == 200:
                with lock:
                    passed.answered.append(body)
                    count = len(passed.answered)
                after(count)

        @staticmethod
        def _kept(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
            return {name: value for name, value in headers if name.lower() not in _OF_ONE_CONNECTION}

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = False  # so that all is counted when the block ends
    http.handle_error = lambda *_: None  # type: ignore[method-assign]
    passed = Passed(f"http://127.0.0.1:{http.server_address[1]}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield passed
    finally:
        http.shutdown()
        http.server_close()

"""A small server on this machine that speaks the protocol of chat completions, answers as a script says, and counts what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Asked"], "Reply"]


@dataclass
class Asked:
    """A request.

    Attributes:
        body: As JSON.
        turn: How many requests for a completion came before it.
        headers: By name in lower case.
    """

    body: dict[str, Any]
    turn: int
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        """The last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass
class Reply:
    """What is answered.

    Attributes:
        body: Bytes, or a text from which a completion is made.
        cut: Bytes after which the connection is closed; None: none is lost.
        stall_s: Silence before the body.
        drip_s: Silence after each of its bytes.
        repeated: How often the body is sent, one after the other.
        raw: What is sent in the place of all of an answer, headers too, at `drip_s`.
    """

    body: bytes | str = "yes"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    cut: int | None = None
    stall_s: float = 0.0
    drip_s: float = 0.0
    repeated: int = 1
    raw: bytes | None = None

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        message = {"role": "assistant", "content": self.body}
        used = {"prompt_tokens": 7, "completion_tokens": len(self.body.split())}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": self.finish}], "usage": used}).encode()


@dataclass
class Server:
    """Where it is and what it was asked.

    Attributes:
        sent: Bytes of bodies that went out.
    """

    url: str
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0
    most_at_once: int = 0


@contextlib.contextmanager
def serving(answer: Answer, models: tuple[str, ...] = ("teacher",), listed: Reply | None = None) -> Iterator[Server]:
    """A server, until the block ends.

    Args:
        listed: What it says of its models, in the place of their list.
    """
    lock, running = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(listed or Reply(json.dumps({"data": [{"id": name} for name in models]}).encode()))

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked = Asked(body, len(server.asked), {name.lower(): value for name, value in self.headers.items()})
                server.asked.append(asked)
                running += 1
                server.most_at_once = max(server.most_at_once, running)
            try:
                reply = answer(asked)
                time.sleep(reply.stall_s)
            finally:
                with lock:
                    running -= 1  # before anything goes out: who has an answer may ask the next
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            content = reply.content
            if reply.raw is not None:
                self._drip(reply.raw, reply.drip_s)
                return
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content) * reply.repeated), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for _ in range(reply.repeated):
                part = content if reply.cut is None else content[: reply.cut]
                self._drip(part, reply.drip_s)
            if reply.cut is not None:
                self.close_connection = True
                self.connection.close()

        def _drip(self, part: bytes, seconds: float) -> None:
            for piece in [part] if not seconds else [part[place : place + 1] for place in range(len(part))]:
                self.wfile.write(piece)
                self.wfile.flush()
                server.sent += len(piece)
                time.sleep(seconds)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # type: ignore[method-assign]
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()

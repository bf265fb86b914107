"""The folder of a board over HTTP, for this machine only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from slimbench.harness.config.errors import ConfigError
from slimbench.leaderboard.site.build import BoardError

HOST = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each file says nothing that a reader wants to know."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the folder on this machine, listening but not yet answering.

    Args:
        port: 0 takes any that is free.

    Raises:
        harness.config.errors.ConfigError: There is no board in the folder.
        BoardError: The port is taken.
    """
    if not (folder / "index.html").is_file():
        raise ConfigError(f"there is no board in '{folder}'; make one with `slimbench board build --out {folder}`")
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Quiet, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise BoardError(f"cannot listen on port {port}: {getattr(error, 'strerror', None) or error}") from error


def url(serving: ThreadingHTTPServer) -> str:
    return f"http://{HOST}:{serving.server_address[1]}/"

"""A small hub on this machine, for the real clients (`huggingface_hub`, `datasets`, `transformers`) under `HF_ENDPOINT`.

It serves repositories from folders: the API of models and data sets (info, tree, paths-info, refs), files by revision with HEAD, GET and
ranges, weights and tables by a redirect as the hub does for what lies in its large-file store. It counts what it was asked and the bytes
that it sent, refuses as the hub refuses (unknown, gated), and does what a script of faults says. It knows nothing of Xet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gz", ".bin", ".gguf")
_CHUNK = 1 << 16
_DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What goes wrong with the next requests that it fits, before all others that stand behind it.

    Attributes:
        path: Pattern of the path that is asked for, such as `*/model.safetensors`; the large-file store has `/large/…/NAME`.
        kind: `status`: an answer of that status. `stall`: `after` bytes of the body, then silence for `seconds`. `cut`: the connection is
            closed after so many bytes; `reset`: with a reset in place of an end.
        times: How many requests it spoils.
        method: Of these requests.
    """

    path: str
    kind: str = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    seconds: float = 0.0
    times: int = 1
    method: str = "GET"


@dataclass
class Request:
    """A request; what was answered is written down while it is.

    Attributes:
        begin: First byte that was asked for, 0 where no range was.
        sent: Bytes of the body that were sent.
    """

    method: str
    path: str
    begin: int
    status: int = 0
    sent: int = 0


@dataclass
class Repository:
    """A repository: the folder of each commit, and the commit of each branch or tag."""

    kind: str
    name: str
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """The server; a context manager. `url` is what `HF_ENDPOINT` is set to."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.moves: dict[tuple[str, str], Path] = {}  # what `main` becomes once it has been asked for
        self.lock = threading.Lock()
        self._ended = threading.Event()

    def add(self, kind: str, name: str, folder: Path, *revisions: str) -> str:
        """Serve a folder as the newest commit of a repository.

        Args:
            kind: `models` or `datasets`.
            revisions: Branches or tags that name it from now on; `main` if none is given.

        Returns:
            The commit.
        """
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        content = [[file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()] for file in _files(folder)]
        commit = hashlib.sha1(json.dumps([kind, name, content]).encode()).hexdigest()
        repository.commits[commit] = folder
        repository.refs |= dict.fromkeys(revisions or ("main",), commit)
        return commit

    def sent(self, name: str) -> int:
        """Bytes that were sent of all files of that name."""
        return sum(request.sent for request in self.requests if request.path.endswith(f"/{name}"))

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        return [request for request in self.requests if request.method == method and fnmatch(request.path, pattern)]

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that strikes a request; it is used up."""
        with self.lock:
            found = next((f for f in self.faults if f.times > 0 and f.method == method and fnmatch(path, f.path)), None)
            if found:
                found.times -= 1
            return found

    def wait(self, seconds: float) -> None:
        """Be silent so long, or until the server ends."""
        self._ended.wait(seconds)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def store_url(self) -> str:
        """The large-file store: another host, as clients see it."""
        return self.url.replace("127.0.0.1", "localhost")

    def start(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Gone(Exception):
    """The connection was ended on purpose."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        """Route a request; what ends early by a fault or because the client went away is no error of the server."""
        self._path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self._range = (int(found[1]), int(found[2]) if found[2] else None) if found else None
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._request = Request(self.command, self._path, self._range[0] if self._range else 0)
        with self.hub.lock:
            self.hub.requests.append(self._request)
        with contextlib.suppress(_Gone, ConnectionError):
            self._fault = self.hub.fault(self.command, self._path)
            if self._fault and self._fault.kind == "status":
                self._refuse(self._fault.status, "", "the server says no", **self._fault.headers)
            else:
                self._route()

    def _route(self) -> None:
        raw = urlsplit(self.path).path
        if raw == "/":
            return self._json({"hub": "local"})
        if found := re.fullmatch(r"/large/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", raw):
            kind, name, commit, file = found.groups()
            return self._file(self.hub.repositories[kind, name].commits[commit] / unquote(file), {})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?", raw):
            kind, name, what, revision, rest = found.groups()
            return self._api(kind, name, what or "revision", unquote(revision or "main"), unquote(rest or ""))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            kind = "datasets" if found[1] else "models"
            return self._resolve(kind, found[2], unquote(found[3]), unquote(found[4]))
        return self._refuse(404, "", "no such address")

    def _repository(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit of a revision; None where the request has been refused."""
        if name in self.hub.renamed:
            self._head(307, {"Location": self.path.replace(name, self.hub.renamed[name], 1), "Content-Length": "0"})
            return None
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
        elif (commit := repository.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            if revision == "main" and (moved := self.hub.moves.pop((kind, name), None)):
                self.hub.add(kind, name, moved)
            return repository, commit
        return None

    def _api(self, kind: str, name: str, what: str, revision: str, rest: str) -> None:
        if (found := self._repository(kind, name, revision)) is None:
            return None
        repository, commit = found
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items() if "/" not in n]
            converts = [{"name": n, "ref": n, "targetCommit": c} for n, c in repository.refs.items() if "/" in n]
            return self._json({"branches": branches, "converts": converts, "tags": []})
        entries = list(_entries(repository.commits[commit]))
        query = parse_qs(urlsplit(self.path).query)
        if what == "tree":
            prefix = f"{rest.strip('/')}/" if rest.strip("/") else ""
            below = [e for e in entries if e["path"].startswith(prefix)]
            if prefix and not below:
                return self._refuse(404, "EntryNotFound", f"{rest} does not exist", commit)
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return self._json([e for e in below if deep or "/" not in e["path"].removeprefix(prefix)])
        if what == "paths-info":
            wanted = parse_qs(self._body.decode()).get("paths", [])
            return self._json([e for e in entries if e["path"] in wanted])
        files = [e for e in entries if e["type"] == "file"]
        blobs = "blobs" in query
        siblings = [
            {"rfilename": e["path"]} | ({"size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs") and _lfs(e)} if blobs else {})
            for e in files
        ]
        facts = {"id": name, "sha": commit, "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        return self._json(facts | {"modelId": name, "lastModified": _DATE, "siblings": siblings, "author": name.partition("/")[0]})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        if (found := self._repository(kind, name, revision)) is None:
            return
        repository, commit = found
        file = repository.commits[commit] / path
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        elif file.suffix in LARGE:
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{_sha256(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            headers |= {"Location": f"{self.hub.store_url}/large/{kind}/{name}/{commit}/{path}", "Content-Length": "0"}
            self._head(302, headers)
        else:
            self._file(file, {"X-Repo-Commit": commit, "ETag": f'"{_oid(file)}"'})

    def _file(self, file: Path, headers: dict[str, str]) -> None:
        """A file or the asked-for range of it, so much of it as the fault allows."""
        content, size = file.read_bytes(), file.stat().st_size
        headers = {"ETag": f'"{_sha256(file)}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        if self._range is None:
            return self._send(200, headers, content)
        begin, last = self._range
        if begin >= size:
            return self._send(416, {"Content-Range": f"bytes */{size}"}, b"")
        end = size if last is None else min(size, last + 1)
        return self._send(206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}, content[begin:end])

    def _json(self, content: Any) -> None:
        self._send(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(content).encode())

    def _refuse(self, status: int, code: str, message: str, commit: str = "", **headers: str) -> None:
        facts = {"X-Error-Code": code, "X-Repo-Commit": commit, "X-Error-Message": message}
        told = {name: value for name, value in facts.items() if value} | headers
        self._send(status, told | {"Content-Type": "application/json"}, json.dumps({"error": message}).encode())

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self._request.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, headers | {"Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        fault = self._fault if self._fault and self._fault.kind != "status" else None
        room = len(body) if fault is None else min(fault.after, len(body))
        for begin in range(0, room, _CHUNK):
            chunk = body[begin : min(begin + _CHUNK, room)]
            self.wfile.write(chunk)
            self._request.sent += len(chunk)
        if fault is None:
            return
        self.wfile.flush()
        self.close_connection = True
        if fault.kind == "stall":
            self.hub.wait(fault.seconds)
        elif fault.kind == "reset":
            time.sleep(0.2)  # so that what was sent is read before the reset throws it away
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Gone


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _oid(file: Path) -> str:
    """What git calls a file: the hash of its bytes, or of the pointer to it in the large-file store."""
    content = file.read_bytes() if file.suffix not in LARGE else f"oid sha256:{_sha256(file)}".encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(entry: dict[str, Any]) -> dict[str, Any]:
    """The same facts as the API of models tells them."""
    return {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Folders and files as the tree of a revision tells them."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            yield {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        else:
            large = {"lfs": {"oid": _sha256(path), "size": path.stat().st_size, "pointerSize": 134}} if path.suffix in LARGE else {}
            yield {"type": "file", "oid": _oid(path), "size": path.stat().st_size, "path": name} | large

"""A teacher behind an OpenAI-compatible endpoint: llama.cpp's server, vLLM, `transformers serve`, or a hosted one.

Asked is `POST {url}/chat/completions`. What may pass, such as a busy server, a timeout or half an answer, is tried again with longer and
longer pauses; what may not, such as a wrong key, ends in one line. An answer is cut off while it streams once it is longer than it can be,
and a server that sends a byte now and then, in headers too, is given up when the time for the answer is over. A redirection is not
followed. Each request has a connection of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from slimbench.tasks.teaching.deadline import Deadline
from slimbench.util.text import nearest, plain
from slimbench.util.writing.teaching import Completion, Request, TeacherError

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_OF_THE_REQUEST = {400, 413, 422}
_LONGEST_PAUSE_S, _LONGEST_ASKED_S = 30.0, 120.0
_BYTES_PER_TOKEN, _FRAME = 64, 64 * 1024  # of an answer in JSON, escapes included, and of what stands around it


class _Passing(Exception):
    """What may be otherwise the next time, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """A server that answers chats.

    Attributes:
        url: Up to and with `/v1`.
        model: As the server calls it.
        revision: Of the model, which no server tells; the user's own word.
        key_variable: Name of the environment variable that holds the key; None: none is sent.
        at_once: Requests under way at a time.
        timeout_s: For one answer, from the request to its last byte.
        attempts: For each request.
        pause_s: Before the second, twice as many before the third, and so on, thirty at most; a server may ask for others, 120 at most.
    """

    url: str
    model: str
    revision: str | None = None
    key_variable: str | None = None
    at_once: int = 4
    timeout_s: float = 120.0
    attempts: int = 5
    pause_s: float = 1.0

    def __post_init__(self) -> None:
        """Raise `TeacherError` for an address that is none, or that holds a password."""
        check_address(self.url)

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.url.rstrip("/")

    @property
    def identity(self) -> str:
        """The model, and its revision where it is said; not the address."""
        return f"endpoint {self.model}@{self.revision}" if self.revision else f"endpoint {self.model}"

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See `util.writing.teaching.Teacher`; answers come as they are ready."""
        if any(request.against for request in requests):
            raise TeacherError("this recipe subtracts one distribution from another, which no endpoint does; take teacher.source=self")
        if any(request.sampling.beams > 1 for request in requests):
            raise TeacherError("this recipe searches with beams, which no endpoint does; take teacher.source=self")
        given_up = Event()
        with self._client() as client, ThreadPoolExecutor(self.at_once) as pool:
            under_way = {pool.submit(self._answer, client, request, given_up): index for index, request in enumerate(requests)}
            failed: TeacherError | None = None
            try:
                for future in as_completed(under_way):
                    try:
                        answer = future.result()
                    except CancelledError:
                        continue
                    except TeacherError as error:
                        failed = failed or error
                        given_up.set()
                        for other in under_way:
                            other.cancel()
                        continue
                    yield under_way[future], answer  # those that are finished count, whatever became of others
            finally:
                given_up.set()
                for future in under_way:
                    future.cancel()
            if failed:
                raise failed

    def require_model(self) -> None:
        """Raise `TeacherError` if the server does not answer, speaks another language, or says that it serves others than the model."""
        served = self._served()
        if served and self.model not in served:
            raise TeacherError(f"teacher {self.place} serves no '{self.model}'{nearest(self.model, served)}")

    def _served(self) -> list[str]:
        """What the server says that it serves; an empty list where it does not say."""
        with self._client() as client:
            for attempt in range(self.attempts):
                try:
                    return self._named(self._read(client, "GET", "models", None, _FRAME))
                except _Passing as error:
                    if attempt + 1 == self.attempts:
                        raise TeacherError(f"teacher {self.place} does not answer: {error}") from error
                    time.sleep(self._pause(attempt, error.wait))
                except (_Refused, _TooLong):
                    break
        return []

    def _named(self, body: bytes) -> list[str]:
        """The models that a list names; none where it has another form.

        Raises:
            TeacherError: It is no JSON at all, such as a page.
        """
        if body.strip() and body.lstrip()[:1] not in (b"{", b"["):
            said = self._told(body[:200].decode(errors="replace"))
            raise TeacherError(f"teacher {self.place} answers '{said[:60]}' where it should list its models; its address goes up to /v1")
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return []
        rows = content.get("data") if isinstance(content, dict) else None
        return [
            plain(row["id"])[:200]
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, dict) and isinstance(row.get("id"), str)
        ]

    def _client(self) -> Any:
        import httpx

        key = self._key()
        if self.key_variable and not key:
            raise TeacherError(f"the environment variable {self.key_variable}, which shall hold the teacher's key, is not set")
        if key and not (key.isascii() and key.isprintable()):
            raise TeacherError(f"the environment variable {self.key_variable} holds no key: it has characters that no header may have")
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_keepalive_connections=0)  # a connection that is shut is of no other request
        return httpx.Client(headers=headers, timeout=self.timeout_s, limits=limits, trust_env=False, follow_redirects=False)

    def _key(self) -> str | None:
        return (os.environ.get(self.key_variable) or "").strip() or None if self.key_variable else None

    def _told(self, text: str) -> str:
        """One short line of what a server or a library says, without the key."""
        key = self._key()
        line = next(iter(plain(text).strip().splitlines()), "") or "no text"
        return (line.replace(key, "…") if key else line)[:200]

    def _answer(self, client: Any, request: Request, given_up: Event) -> Completion:
        """One answer, after as many attempts as it takes, unless another request was given up meanwhile."""
        malformed, reason = None, "another request was given up"
        for attempt in range(self.attempts):
            if given_up.is_set():
                break
            try:
                return _completion(self._read(client, "POST", "chat/completions", self._body(request), _limit(request)))
            except _TooLong:
                return Completion("", "malformed", reason="longer than its limit")
            except _Refused as error:
                return Completion("", "refused", reason=str(error))
            except ValueError as error:
                malformed, wait, reason = str(error), None, f"its answer is none: {error}"
            except _Passing as error:
                malformed, wait, reason = None, error.wait, str(error)
            if attempt + 1 < self.attempts:
                given_up.wait(self._pause(attempt, wait))
        if malformed is not None:
            return Completion("", "malformed", reason=malformed)
        given_up.set()
        raise TeacherError(f"teacher {self.place} gave no answer in {self.attempts} attempts: {reason}")

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds before the next attempt; a server may ask for others."""
        return min(_LONGEST_PAUSE_S, self.pause_s * 2**attempt) if asked is None else min(_LONGEST_ASKED_S, asked)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in request.chat],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "seed": request.seed,
        }
        return body | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def _read(self, client: Any, verb: str, path: str, body: dict[str, Any] | None, limit: int) -> bytes:
        """The body of an answer.

        Raises:
            _Passing, _Refused, _TooLong: There is none.
            TeacherError: There will never be one.
        """
        import httpx

        url, deadline, found = f"{self.url.rstrip('/')}/{path}", Deadline(self.timeout_s), bytearray()
        late = f"no answer within {self.timeout_s:g} s"
        try:
            with deadline, client.stream(verb, url, json=body, extensions={"trace": deadline.watch}) as response:
                status, wait = response.status_code, response.headers.get("retry-after")
                for part in response.iter_raw():
                    found += part
                    if len(found) > limit:
                        if status == 200:
                            raise _TooLong
                        break
        except httpx.HTTPError as error:
            is_late = deadline.over or isinstance(error, httpx.TimeoutException)
            raise _Passing(late if is_late else self._told(str(error) or type(error).__name__)) from error
        if deadline.over:  # what ends with its connection is not whole
            raise _Passing(late)
        if status == 200:
            return bytes(found)
        said = f"status {status}: {self._told(found[:400].decode(errors='replace'))}"
        if status in _AGAIN:
            raise _Passing(said, _seconds(wait))
        if status in _OF_THE_REQUEST or (status == 404 and path == "models"):
            raise _Refused(said)
        raise TeacherError(f"teacher {self.place} refuses: {said}")


def check_address(url: str) -> None:
    """Raise `TeacherError` for an address that is none, or that may hold a secret, none of which it repeats."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise TeacherError("a teacher's address holds no name, password or query; put the key into a variable, teacher.key_variable=NAME")
    try:
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise TeacherError(f"teacher '{url}' is no address; write http://HOST:PORT/v1")


class _TooLong(Exception):
    """An answer is longer than its limit allows, and was cut off."""


class _Refused(Exception):
    """The server does not take this one request."""


def _seconds(wait: str | None) -> float | None:
    """What `retry-after` asks for, as seconds or as a date (RFC 9110, section 10.2.3); None where it asks for nothing."""
    if wait is None:
        return None
    if wait.isascii() and wait.isdigit():
        return float(wait)
    try:
        until = parsedate_to_datetime(wait)
    except ValueError:
        return None
    left = (until if until.tzinfo else until.replace(tzinfo=UTC)) - datetime.now(UTC)
    return max(0.0, left.total_seconds())


def _limit(request: Request) -> int:
    return request.sampling.max_tokens * _BYTES_PER_TOKEN + _FRAME


def _completion(body: bytes) -> Completion:
    """An answer of the agreed form.

    Raises:
        ValueError: It is none.
    """
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no JSON of a chat completion") from error
    if not isinstance(text, str):
        raise ValueError("its text is no text")
    used = content.get("usage")
    prompt_tokens, tokens = (_count(used, name) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(text, "length" if finish == "length" else "stop", prompt_tokens, tokens)


def _count(used: Any, name: str) -> int:
    value = used.get(name) if isinstance(used, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0

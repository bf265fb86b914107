"""The proxy by which tests of real servers count: it changes nothing, and sees what a client tries again."""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from slimbench.tasks.teaching.endpoint import Endpoint
from slimbench.util.writing.teaching import Request, Sampling, TeacherError
from tests.support.chat_server import Asked, Reply, serving
from tests.support.counting_proxy import Passed, forwarding

REQUESTS = [Request((("user", f"question {number}"),), Sampling(max_tokens=8), seed=number) for number in range(6)]


def port(url: str) -> int:
    found = urlsplit(url).port
    assert found
    return found


def through(passed: Passed, **settings: Any) -> Endpoint:
    return Endpoint(f"{passed.url}/v1", "teacher", pause_s=0.01, timeout_s=5.0, **settings)


def test_what_is_asked_and_answered_goes_through_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-123")
    told: list[int] = []
    with serving(lambda asked: Reply(f"é answer to {asked.prompt}")) as server, forwarding(port(server.url), told.append) as passed:
        teacher = through(passed, key_variable="MY_KEY")
        teacher.require_model()
        found = dict(teacher.answers(REQUESTS))
        assert [found[number].text for number in range(6)] == [f"é answer to question {number}" for number in range(6)]
        assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer secret-123"}
    assert len(passed.asked) == len(set(passed.asked)) == 6 and sorted(passed.answered) == sorted(passed.asked)
    assert sorted(told) == [1, 2, 3, 4, 5, 6] and passed.bare == 1


def test_what_is_tried_again_is_counted_again() -> None:
    def answer(asked: Asked) -> Reply:
        return Reply(b"busy", status=429, headers={"Retry-After": "0"}) if asked.turn < 6 else Reply()

    with serving(answer) as server, forwarding(port(server.url)) as passed:
        assert len(dict(through(passed).answers(REQUESTS))) == 6
    assert len(passed.asked) == 12 and len(set(passed.asked)) == 6 and len(passed.answered) == 6


def test_a_server_that_is_gone_gives_no_answer_and_what_came_before_was_out() -> None:
    gone = threading.Event()

    def answer(asked: Asked) -> Reply:
        return Reply("", cut=0) if gone.is_set() else Reply()

    def after(count: int) -> None:
        if count == 2:
            gone.set()

    with serving(answer) as server, forwarding(port(server.url), after) as passed:
        found, teacher = list[int](), through(passed, at_once=1, attempts=2)
        with pytest.raises(TeacherError, match="gave no answer in 2 attempts"):
            found.extend(index for index, _ in teacher.answers(REQUESTS))
    assert len(passed.answered) == len(found) == 2 and len(passed.asked) == 4
    with forwarding(1) as passed, pytest.raises(TeacherError, match="gave no answer in 2 attempts"):
        dict(through(passed, at_once=1, attempts=2).answers(REQUESTS[:1]))
    assert len(passed.asked) == 2 and not passed.answered

"""The answers of a teacher as they came, one a line, so that none is asked for twice.

The file is only ever appended to, an answer at a time; what a crash leaves of a last line is cut off when it is opened again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from slimbench.tasks.errors import DataError
from slimbench.util.writing.teaching import Completion, Request, Teacher

Watch = Callable[[int, int], None]


class Journal:
    """A file of answers.

    Attributes:
        asked: Requests that a teacher got from here.
        seconds: That teachers took, those before this process too.
    """

    def __init__(self, file: Path) -> None:
        self._file, self.asked, self.seconds = file, 0, 0.0
        self._answers: dict[str, Completion] = {}
        whole = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
            if not line.endswith(b"\n"):
                break
            try:
                entry, whole = json.loads(line), whole + len(line)
                name, seconds = entry.pop("request"), float(entry.pop("seconds"))
                answer = Completion(**entry)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise DataError(f"{file} has a line that is no answer: remove it") from error
            self.seconds += seconds
            if answer.finish not in ("malformed", "refused"):  # these may be otherwise the next time
                self._answers[name] = answer
        if file.exists() and whole < file.stat().st_size:
            os.truncate(file, whole)

    def __len__(self) -> int:
        return len(self._answers)

    def ask(self, teacher: Callable[[], Teacher], requests: Sequence[Request], watch: Watch = lambda done, total: None) -> list[Completion]:
        """The answers to requests in their order; a teacher is asked only for those that are not there.

        Args:
            teacher: Gives it, where there is something to ask.
            watch: Told how many of the requests are answered.

        Raises:
            TeacherError: As `Teacher.answers`; what came before is kept.
        """
        hashes = [request.hash for request in requests]
        open_ = {name: request for name, request in zip(hashes, requests, strict=True) if name not in self._answers}
        names, since = list(open_), time.perf_counter()
        self.asked += len(names)
        for index, answer in teacher().answers(list(open_.values())) if names else ():
            now = time.perf_counter()
            self._append(names[index], answer, now - since)
            since = now
            watch(sum(name in self._answers for name in names), len(names))
        return [self._answers[name] for name in hashes]

    def _append(self, name: str, answer: Completion, seconds: float) -> None:
        line = json.dumps({"request": name, **asdict(answer), "seconds": round(seconds, 4)}) + "\n"
        with self._file.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._answers[name] = answer
        self.seconds += seconds


class Remembering:
    """A teacher whose answers are kept, so that who asks the same again, after an interruption, gets the same and costs nothing.

    Attributes:
        identity: That of the teacher.
    """

    def __init__(self, teacher: Callable[[], Teacher], identity: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.identity, self._teacher, self._journal = identity, cache(teacher), Journal(file)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See `util.writing.teaching.Teacher`; the teacher is loaded when there is something new to ask."""
        yield from enumerate(self._journal.ask(self._teacher, requests))

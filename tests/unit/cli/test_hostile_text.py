"""Texts of strangers on the console: markup is shown, escapes are not obeyed, and nothing ends a sweep or a command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from slimbench.harness.config.schema import DeviceConfig, LauncherConfig
from slimbench.harness.run.planning.plan import Plan, PlannedCell, Task, TaskNeeds, task_name
from slimbench.harness.run.planning.progress import ProgressDisplay
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Failure, Record
from slimbench.harness.store.store import Store, parse
from slimbench.util.text import one_line, plain
from tests.support.board_records import Spec, records

MESSAGES = ["[/INST] is no token", "ninja: [/usr/bin/c++] failed", "[/dev/shm/x]", "", "\n\n", "[red", ":warning: \x1b]0;title\x07\x1b[2J"]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_failure_of_any_text_is_one_line_of_progress(message: str, tmp_path: Path) -> None:
    record = records(Spec())[0]
    failed = record.model_copy(update={"status": Status.FAILED, "failure": Failure(type="RuntimeError", message=message)})
    cell: Any = SimpleNamespace(identity=record.cell, label="tiny · [/INST]", stages=lambda: [Stage.COMPRESS])
    out = io.StringIO()
    config = SimpleNamespace(device=DeviceConfig(name="cpu", compress="cpu"), launcher=LauncherConfig())
    planned = PlannedCell.model_construct(config=config, identity=record.cell, overrides=[], stages=[Stage.COMPRESS], asked=True)
    needs = TaskNeeds(device="cpu", memory_bytes=None, environment=None, modules=[], seconds=1)
    task = Task(name=task_name(record.cell, Stage.COMPRESS), cell=0, stage=Stage.COMPRESS, after=[], needs=needs)
    plan = Plan.model_construct(created="", cells=[planned], tasks=[task])
    display = ProgressDisplay(plan, Store(tmp_path), Console(file=out, width=200))
    display.note(message)
    display.stage_started(cell, Stage.COMPRESS)
    display.stage_ended(cell, Stage.COMPRESS, failed, reused=False)
    last = out.getvalue().splitlines()[-1]
    assert "tiny · [/INST] compress failed" in last and "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert last.endswith(one_line(message) or "RuntimeError")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("10 %\r\n20 %\rdone", "10 %\n20 %\ndone"),
        ("abc\u202edef\x9b2J\ud800", "abc�def�2J�"),
        ("tab\tand\nline", "tab\tand\nline"),
    ],
)
def test_nothing_that_a_terminal_acts_on_stays(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_what_is_read_from_a_record_is_plain(tmp_path: Path) -> None:
    data = json.loads(records(Spec())[0].model_dump_json())
    data["cell"]["model"] = "a\x1b[2Jb\u2028\x9d"
    data["config"] = {"ke\x1by": ["\u202e"]}
    for text in (json.dumps(data), json.dumps(data, ensure_ascii=False)):
        record = parse(text.encode())
        assert isinstance(record, Record) and record.cell.model == "ab��" and "\x1b" not in record.model_dump_json()
        assert record.config == {"ke": ["�"]}
    broken = parse(json.dumps(data).replace("u2028", "ud800").encode())
    assert isinstance(broken, str) and broken.startswith("not a record") and "\n" not in broken

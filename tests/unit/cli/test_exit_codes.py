"""What `run`, `sweep`, `status` and `show` end with and say: the exit code comes from the records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from slimbench.harness.cli.exit_codes import ExitCode, of
from slimbench.harness.cli.run import run, seconds_of, sweep
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import sweep as sweeps
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.store.store import Store
from tests.unit.cli.test_cli import slimbench


def exit_code(command: object, *overrides: str, **options: object) -> int:
    with pytest.raises(typer.Exit) as end:
        command([*overrides], **options)  # type: ignore[operator]
    return end.value.exit_code


def test_a_run_that_measured_nothing_has_a_code_of_its_own_and_compresses_nothing(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(run, *overrides, "engine=vllm", f"results={tmp_path}", "method=rtn-4bit") == ExitCode.NOTHING_MEASURED
    assert "nothing was measured: engine vllm runs on cuda, not on cpu" in capsys.readouterr().err
    assert {record.stage.value for record in Store(tmp_path).scan()[0]} == {"quality", "speed"}


def test_a_sweep_that_is_stopped_has_a_code_of_its_own_and_writes_its_plan(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [*overrides, f"results={tmp_path}", "method=rtn-4bit,rtn-8bit"]
    assert exit_code(sweep, *mine, stop_after="0s") == ExitCode.STOPPED
    assert "stopped with 9 of 9 stages to do; the same command goes on" in capsys.readouterr().err
    (path,) = (tmp_path / "plans").iterdir()
    state = slimbench("status", str(path))
    assert state.returncode == 0 and " 75 " in f"{state.stdout} " and "no estimate yet" in state.stdout


def test_the_exit_code_of_a_plan_needs_nothing_but_its_records(overrides: list[str], tmp_path: Path) -> None:
    plan = sweeps.plan([*overrides, f"results={tmp_path}", "stages=[]"], several=False)
    assert of(Ledger(plan, Store(tmp_path))) == ExitCode.STOPPED


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("150m", 9000), ("2h", 7200), ("1.5h", 5400), (None, None)])
def test_durations(text: str | None, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["30", "2w", "", "-1h", "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no duration"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=random-135m", "stages=[quality]"], "random weights, for speed and memory only; give stages=[speed]"),
        (["launcher=slrum"], "no launcher 'slrum'"),
        (["hydra/launcher=submitit_slurm"], "give launcher=NAME"),
        (["launcher.slots=0"], "launcher.slots"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_plan(overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweeps.plan([*overrides, f"results={tmp_path}"], several=True)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_method_that_needs_text_is_refused_for_a_model_without_tokenizer(tmp_path: Path) -> None:
    plan = sweeps.plan(["model=random-135m", "method=gptq", f"results={tmp_path}"], several=False)
    assert [task.refusal for task in plan.tasks] == ["gptq needs text, random-135m has no tokenizer"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": "{}"}, "no safetensors in"),
        ({"config.json": "{}", "model.safetensors": "x"}, "does not describe a decoder"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "x"}, "does not describe a decoder"),
        ({"config.json": "[", "model.safetensors": "x"}, "does not describe a decoder"),
        ({}, "no config.json in"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        sweeps.plan(["model=custom", "model.name=x", f"model.source=file:{folder}", f"results={tmp_path}/r"], several=False)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and "did you mean 'model'" not in str(caught.value)


def test_a_results_folder_that_cannot_be_written_is_one_line_for_the_plan_too(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"cannot write into .*: permission denied"):
        sweeps.plan([*overrides, f"results={tmp_path / 'deep' / 'er'}"], several=True)


def test_a_record_that_a_full_disk_refuses_may_be_written_later_and_so_may_what_a_hub_refused(tmp_path: Path) -> None:
    import errno

    from slimbench.harness.cli.main import _answer
    from slimbench.harness.store.store import StoreError
    from slimbench.tasks.errors import DataError, HubError

    def store(number: int) -> StoreError:
        try:
            raise StoreError("cannot write") from OSError(number, "…")
        except StoreError as error:
            return error

    assert _answer(store(errno.EDQUOT)) == ("cannot write", 75)
    assert _answer(store(errno.EACCES)) == ("cannot write", 1)
    assert _answer(HubError("busy")) == ("busy", 75) and _answer(DataError("no such data set")) == ("no such data set", 2)


def test_what_a_disk_does_is_one_line() -> None:
    import errno
    import os

    from slimbench.harness.cli.main import _answer

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "board/index.html")
    assert _answer(full) == ("No space left on device: board/index.html; the same command may succeed later", 75)
    assert _answer(PermissionError(errno.EACCES, "Permission denied", "board")) == (
        "Permission denied: board; the same command may succeed later",
        1,
    )
    assert _answer(OSError(errno.ENOEXEC, "no program"))[0].startswith("unexpected")

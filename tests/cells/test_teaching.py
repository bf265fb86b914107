"""A cell whose method learns from a teacher behind a server, in real child processes: what is asked, kept, recorded, and asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimbench.harness.cli.exit_codes import ExitCode
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sections.teaching import TeacherConfig
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.tasks.teaching import data_set
from slimbench.util.writing.teaching import TeacherError
from tests.support.chat_server import Asked, Reply, Server, serving
from tests.support.running import Listener, cell, run

RECIPE = """
paper: none
start: {kind: seeds, name: instructions}
stages:
  - {kind: ask, prompt: "Do this: {instruction}", draw: {max_tokens: 24}, keep: {response: {words: [2, 12]}}}
examples:
  - {prompt: "{instruction}", response: "{response}", gold: "well"}
apart: null
"""
FEW = ["method=alpaca", "method.alpaca.recipe=mine", "method.alpaca.steps=6", "method.alpaca.length=200", "stages=[quality]"]


@pytest.fixture(scope="module")
def own(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Runner]]:
    """A folder of choices, and a runner whose workers began with it."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "recipe").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMBENCH_CONF", str(folder))
        runner = Runner(Store(folder / "unused"), Listener())
        yield folder, runner
        runner.close()


@pytest.fixture
def conf(own: tuple[Path, Runner]) -> Path:
    (own[0] / "recipe" / "mine.yaml").write_text(RECIPE)
    return own[0]


@pytest.fixture
def runner(own: tuple[Path, Runner], tmp_path: Path) -> Runner:
    own[1].store, own[1].listener = Store(tmp_path / "results"), Listener()
    return own[1]


def willing(asked: Asked) -> Reply:
    return Reply("short" if asked.turn % 8 == 0 else f"as you wish {len(asked.prompt)} all is well")


def teacher(server: Server, *more: str) -> list[str]:
    return [f"teacher.source={server.url}", "teacher.model=teacher", "teacher.examples=24", *more]


def of(records: list[Record], stage: Stage) -> Record:
    return next(record for record in records if record.stage is stage and record.cell.pipeline != "dense")


def test_a_cell_learns_from_a_server_and_is_held_against_it(runner: Runner, overrides: list[str], conf: Path) -> None:
    with serving(willing) as server:
        wanted = cell(overrides, *FEW, *teacher(server, "teacher.revision=v1"))
        found = run(runner, wanted)
        assert [record.status for record in found] == [Status.OK, Status.OK], [record.failure for record in found]
        assert len(server.asked) == 24 and all(asked.prompt.startswith("Do this: ") for asked in server.asked)
        compress, quality = of(found, Stage.COMPRESS).compress, of(found, Stage.QUALITY).quality
        assert compress and compress.teaching and quality and quality.imitation
        told = compress.teaching
        assert (told.teacher, told.recipe, told.asked, told.kept, told.reused) == ("endpoint teacher@v1", "mine", 24, 21, False)
        assert compress.claim.teacher == "endpoint teacher@v1" and compress.claim.training_tokens > 0
        made = data_set.every()
        assert [(one.kept, one.rejected, one.sha256) for one in made] == [(21, {"response: number of words": 3}, told.sha256)]
        imitation = quality.imitation
        assert imitation.recipe == "mine" and imitation.text_sha256 == told.sha256
        assert len(imitation.nll) == made[0].held_out > 0 and 0 < imitation.nll_per_token < 10
        assert all(0 <= value <= 1 for value in imitation.rouge_l) and imitation.accuracy is not None
        texts = json.dumps([record.model_dump(mode="json", exclude={"command", "config"}) for record in found])
        assert server.url not in texts and "as you wish" not in texts, "the address stands with the settings alone, and a text nowhere"

        other = cell(overrides, *FEW, *teacher(server, "teacher.revision=v1", "method.alpaca.learning_rate=1e-3"))
        again = of(run(runner, other), Stage.COMPRESS).compress
        assert again and again.teaching and again.teaching.reused and again.teaching.sha256 == told.sha256
        assert len(server.asked) == 24, "another method, or other settings, ask nothing again"
        assert again.teaching.seconds == told.seconds, "what it took once still counts"


def test_a_teacher_that_writes_the_test_text_is_flagged(runner: Runner, overrides: list[str], conf: Path, text: Path) -> None:
    words = text.read_text().split()

    def copies(asked: Asked) -> Reply:
        return Reply(" ".join(words[7 * asked.turn % (len(words) - 25) :][:25]))

    found = {}
    for name, answer in (("copied", copies), ("own", willing)):
        (conf / "recipe" / f"{name}.yaml").write_text(RECIPE.replace("[2, 12]", "[2, 40]"))
        with serving(answer) as server:
            records = run(runner, cell(overrides, *FEW, f"method.alpaca.recipe={name}", *teacher(server, f"teacher.revision={name}")))
        result = of(records, Stage.QUALITY).quality
        assert result
        found[name] = result
    (flag,) = (line for line in found["copied"].flags if "inside the test text" in line)
    assert flag.startswith("calibration or taught text inside the test text: ")
    assert (found["copied"].perplexity[0].calibration_overlap or 0) > 0.01
    assert found["own"].perplexity[0].calibration_overlap == 0
    assert not any("inside the test text" in line for line in found["own"].flags)


def test_keys_hold_the_recipe_the_teacher_and_the_count_and_not_the_address(overrides: list[str], conf: Path) -> None:
    def key(*more: str) -> str:
        first = ["teacher.source=http://127.0.0.1:1/v1", "teacher.model=m"]
        return cell(overrides, *FEW, *first, *more).identity.keys.compress

    plain = key()
    assert plain == key("teacher.source=https://elsewhere/v1") == key("teacher.timeout_s=5", "teacher.at_once=1", "teacher.licence=mit")
    others = {
        key("teacher.model=other"),
        key("teacher.revision=2"),
        key("teacher.examples=8"),
        key("teacher.seed=1"),
        key("teacher.source=self"),
    }
    (conf / "recipe" / "mine.yaml").write_text(RECIPE.replace("Do this: ", "Do this; "))
    others.add(key())
    assert len(others | {plain}) == 7
    dense = cell(overrides, "method=rtn-4bit").identity.keys.compress
    assert dense == cell(overrides, "method=rtn-4bit", "teacher.examples=8").identity.keys.compress, "who is not taught has no teacher"


def test_a_server_that_fails_half_way_is_the_machines_fault_and_the_next_run_goes_on(
    runner: Runner, overrides: list[str], conf: Path
) -> None:
    dead = True

    def answer(asked: Asked) -> Reply:
        return Reply(b"", status=503) if dead and asked.turn >= 9 else willing(asked)

    more = ["teacher.attempts=2", "teacher.at_once=1", "limits.retries=0", "teacher.seed=7"]
    with serving(answer) as server:
        wanted = cell(overrides, *FEW, *teacher(server, *more))
        (failed,) = run(runner, wanted)
        assert failed.status is Status.TRANSIENT and failed.failure and failed.failure.reason == "network"
        assert "gave no answer in 2 attempts" in failed.failure.summary and "\n" not in failed.failure.summary
        assert len(server.asked) == 11
        dead = False
        found = run(runner, wanted)
        assert [record.status for record in found] == [Status.OK, Status.OK]
        assert len(server.asked) == 11 + 15, "nine answers were there"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method.alpaca.recipe=min"], "no recipe 'min'; did you mean 'mine'"),
        (["teacher.source=http://127.0.0.1:1/v1"], "teacher.model: how the server at http://127.0.0.1:1/v1 calls its model is needed"),
        (["teacher.source=http://user:pw@127.0.0.1:1/v1"], "address holds no name, password or query"),
        (["teacher.source=elsewhere"], "none of self, file:FOLDER and hf:ORG/NAME: teacher 'elsewhere' is no address"),
        (["teacher.examples=0"], "teacher.examples"),
        (["teacher.exampels=5"], "did you mean 'teacher.examples'|did you mean 'examples'"),
        (["teacher.key_variable=a key"], "teacher.key_variable"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(more: list[str], message: str, overrides: list[str], conf: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        cell(overrides, *FEW, *more)
    assert "\n" not in str(error.value) and "pw" not in str(error.value)


def test_a_recipe_of_the_test_text_is_refused(overrides: list[str], conf: Path) -> None:
    with pytest.raises(ConfigError, match="'seqkd' learns from lee-news, the test text of suite"):
        cell(overrides, "method=seqkd", "suite.corpus=lee-news")


def test_one_text_in_a_pipeline(overrides: list[str], conf: Path) -> None:
    with pytest.raises(ConfigError, match="'alpaca' and 'magister' both learn from a text"):
        cell(overrides, "method=[alpaca,magister]")


def test_an_error_of_a_teacher_ends_a_command_as_a_stop() -> None:
    from slimbench.harness.cli.main import _answer

    assert _answer(TeacherError("gone")) == ("gone", ExitCode.STOPPED)
    assert TeacherConfig(source="hf:org/name").kind == "model"


def test_a_cell_s_own_model_teaches(runner: Runner, overrides: list[str], conf: Path) -> None:
    """A tiny random model writes nothing that is kept: the text fails, in one line, and says what it was."""
    recipe = RECIPE.replace("keep: {response: {words: [2, 12]}}", "keep: {response: {having: ['never there']}}")
    (conf / "recipe" / "mine.yaml").write_text(recipe)
    (failed,) = run(runner, cell(overrides, *FEW, "teacher.examples=8"))
    assert failed.status is Status.FAILED and failed.failure
    assert "could be kept; most often: " in failed.failure.summary

"""A real server teaches: llama.cpp's own, serving the GGUF file of the packaged model on this machine."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimbench.harness.config import environments
from slimbench.harness.config.schema import ModelConfig
from slimbench.harness.stages import models
from slimbench.tasks import assets
from slimbench.tasks.teaching import data_set
from slimbench.tasks.teaching.endpoint import Endpoint
from slimbench.tasks.teaching.local import Local
from slimbench.tasks.teaching.recipe import Recipe, read
from slimbench.util.writing.teaching import TeacherError
from tests.support.counting_proxy import Passed, forwarding

pytestmark = pytest.mark.full
SERVE = """
import sys, threading, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.port, settings.n_parallel, settings.n_ctx = sys.argv[1], int(sys.argv[2]), 4, 4096
server = xllamacpp.Server(settings)
print("listening", flush=True)
threading.Event().wait()
"""


class Serving:
    """A server in a process of its own, which can be killed and started again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        python = str(environments.get("teacher-server").python)
        command = [python, "-c", SERVE, str(self.file), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout and self.process.stdout.readline().strip() == "listening"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def teacher(self, proxy: Passed | None = None, **settings: int) -> Endpoint:
        """What asks the server, or asks it through a proxy that counts."""
        url = proxy.url if proxy else f"http://127.0.0.1:{self.port}"
        return Endpoint(f"{url}/v1", str(self.file), pause_s=0.05, timeout_s=60, **settings)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    environment = environments.get("teacher-server")
    if not environment.is_made:
        environments.make("teacher-server")
    found = Serving(assets.path("smollm2-135m"))
    yield found
    found.kill()


@pytest.fixture(autouse=True)
def own_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_set, "cache_dir", lambda: tmp_path)


def made_by(teacher: Endpoint, by: Recipe, count: int) -> data_set.Made:
    return data_set.make(by, lambda: teacher, teacher.identity, count, 0)


def recipe(**draw: float) -> Recipe:
    stage = {"kind": "ask", "prompt": "Go on with this text:\n\n{passage}", "draw": {"max_tokens": 12} | draw}
    return read(
        "passages",
        {
            "paper": "none",
            "start": {"kind": "passages", "words": 40},
            "stages": [stage],
            "examples": [{"prompt": "{passage}", "response": "{response}"}],
            "apart": None,
        },
    )


def test_it_says_what_the_same_model_says_in_this_process(serving: Serving) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.prepare(ModelConfig(name="smollm2-135m", source="asset:smollm2-135m"), lambda phase: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    here = Local(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), tokenizer, "here")
    asked = data_set.preview(recipe(), 64, 0)
    assert len(asked) == 64
    theirs, ours = dict(serving.teacher().answers(asked)), dict(here.answers(asked))
    first = [
        [tokenizer(found[number].text.strip(), add_special_tokens=False)["input_ids"][:1] for number in range(64)]
        for found in (theirs, ours)
    ]
    equal = sum(bool(one) and one == other for one, other in zip(*first, strict=True))
    assert equal >= 58, f"{equal} of 64 begin, and with the same token"
    prompts = [(theirs[number].prompt_tokens, ours[number].prompt_tokens) for number in range(64)]
    assert all(one == other for one, other in prompts), "both put prompts into the same template"


def test_a_server_that_is_killed_half_way_costs_no_answer(serving: Serving) -> None:
    def after(answered: int) -> None:
        if answered == 20:
            serving.kill()

    with forwarding(serving.port, after) as before, pytest.raises(TeacherError, match="gave no answer in 2 attempts") as error:
        made_by(serving.teacher(before, attempts=2), recipe(), 64)
    assert "\n" not in str(error.value)
    assert 20 <= len(before.answered) <= 24, "those that were under way may have been answered too"
    assert max(Counter(before.asked).values()) == 2 and len(before.asked) <= len(before.answered) + 2 * 4, "tries are bounded"
    serving.start()
    with forwarding(serving.port) as rest:
        made = made_by(serving.teacher(rest), recipe(), 64)
    assert made.kept + sum(made.rejected.values()) == made.asked == 64
    assert len(rest.asked) == len(set(rest.asked)) == 64 - len(before.answered), "each of the others was asked once"
    assert not set(rest.asked) & set(before.answered), "what had been answered was not asked again"
    with forwarding(serving.port) as nothing:
        again = made_by(serving.teacher(nothing), recipe(), 64)
    assert not nothing.asked and not nothing.bare and again.sha256 == made.sha256 and again.reused


def test_a_changed_recipe_is_asked_anew_and_a_seed_draws_the_same(serving: Serving) -> None:
    with forwarding(serving.port) as passed:
        one = made_by(serving.teacher(passed), recipe(temperature=1.0), 8)
        other = made_by(serving.teacher(passed), recipe(temperature=1.0, top_p=0.9), 8)
    assert one.key != other.key and len(passed.asked) == len(set(passed.asked)) == 16
    with pytest.raises(TeacherError, match="serves no 'another'"):
        Endpoint(f"http://127.0.0.1:{serving.port}/v1", "another").require_model()
    serving.teacher().require_model()

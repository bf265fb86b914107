"""A thousand wrong command lines: one line, exit code 2, nothing written. Each is wrong by how it is made, whatever slimbench says."""

from __future__ import annotations

import string
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimbench.harness.config.sources import groups, shipped
from tests.support.answers import answer

LEAST = {
    "suite.seqlen": 8,
    "suite.windows": 1,
    "suite.documents": 1,
    "suite.chunk": 1,
    "suite.top_k": 1,
    "suite.limit": 1,
    "suite.num_fewshot": 0,
    "suite.batch_tokens": 1,
    "speed.warmup": 0,
    "speed.min_repeats": 2,
    "speed.max_repeats": 2,
    "speed.largest_batch": 1,
    "model.parameters": 1,
    "device.index": 0,
    "device.threads": 1,
    "launcher.slots": 1,
    "calibration_samples": 1,
    "calibration_length": 8,
    "calibration_seed": 0,
    "seed": 0,
}
"""Whole numbers, and the least that each may be."""
POSITIVE = ("speed.budget_s", "speed.target", "limits.wall_s", "limits.memory_gb")
CHOICES = ("model.track", "model.dtype", "device.name", "device.compress", "device.hardware", "launcher.name", "on_existing", "tracking")
FLAGS = ("suite.add_bos", "suite.divergence", "model.trust_remote_code", "speed.flush_cache")
LISTS = ("suite.corpus", "suite.tasks", "suite.protocols", "stages", "speed.grid")
KEYS = (*LEAST, *POSITIVE, *CHOICES, *FLAGS, *LISTS, "model.name", "model.source", "engine.name", "suite.name", "calibration", "results")
VALID = (
    "method=rtn-4bit",
    "suite=quick",
    "speed=quick",
    "engine=transformers",
    "device=cpu",
    "suite.windows=4",
    "seed=3",
    "on_existing=failed",
)
NAMES = [name for group in groups() for name in shipped(group)]

word = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=12).filter(lambda text: text not in NAMES)
letters = st.text(string.ascii_lowercase, min_size=3, max_size=10).filter(
    lambda text: text not in (*NAMES, "null", "true", "false", "yes", "inf", "nan")
)
control = st.sampled_from(["\x07", "\x1b[31m", "\x1b]0;x\x07", "\x7f", "\x9b2J", "\n", "\r", "\t", "\u202e", "\u2028", "\u2066", "\udce4"])
strange = st.text(st.characters(categories=["L", "N", "S", "P"], min_codepoint=0xA1), min_size=1, max_size=8)
whole = st.sampled_from(sorted(LEAST))


def misspelt(key: str, at: int, how: str, letter: str) -> str:
    """A key with one letter left out, doubled, exchanged or swapped with the next."""
    at %= len(key)
    changes = {
        "drop": key[:at] + key[at + 1 :],
        "double": key[: at + 1] + key[at:],
        "change": key[:at] + letter + key[at + 1 :],
        "swap": key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
    }
    return changes[how]


misspelt_key = st.builds(
    misspelt, st.sampled_from(KEYS), st.integers(0, 40), st.sampled_from(["drop", "double", "change", "swap"]), st.sampled_from("qxz")
).filter(lambda key: key not in (*KEYS, "") and key.partition(".")[0] not in ("", "hydra"))


def one(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return strategy.map(lambda text: [text])


def words(*strategies: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    """One wrong word in place of several kinds, each as likely as the others."""
    return one(st.one_of(*strategies))


def join(form: str, *parts: st.SearchStrategy[object]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda values: form.format(*values))


WRONG: dict[str, st.SearchStrategy[list[str]]] = {
    "unknown choice": words(
        join("{}={}", st.sampled_from(groups()), word.filter(lambda text: text not in ("null", "inf", "nan"))),
        join("method=[rtn-8bit,{}]", word),
        join("{}={}", st.sampled_from(CHOICES), letters),
        join("suite.protocols=[{}]", letters),
        join("stages=[{}]", letters),
    ),
    "misspelt key": words(
        join("{}=1", misspelt_key), join("+{}=1", misspelt_key), join("~{}", misspelt_key), join("{}={{a: 1}}", misspelt_key)
    ),
    "unknown key": words(
        join("{}.{}=1", st.sampled_from(["suite", "speed", "device", "limits", "launcher", "model", "engine"]), letters),
        join("+{}.{}=1", st.sampled_from(["suite", "speed", "device", "limits", "launcher"]), letters),
        join("{}={{{}: 1}}", st.sampled_from(["suite", "speed", "device", "limits", "launcher"]), letters),
        join("method.rtn-4bit.{}=3", letters),
        join("+method.rtn-4bit.{}=3", letters),
        join("method.{}.bits=3", letters),
        join("settings.{}=3", letters),
        join("+{}=3", letters),
    ),
    "wrong type": words(
        join("{}={}", whole, letters),
        join("{}={}.5", whole, st.integers(10, 99)),
        join("{}={}", whole, st.sampled_from(["true", "false", "[1]", "[]", "{a: 1}", "''", "1.5e1x", "0x10", "1_0_"])),
        join("{}={}", st.sampled_from(POSITIVE), st.sampled_from(["true", "much", "[1]", "{a: 1}", "''", "nan", "null.5"])),
        join("{}={}", st.sampled_from(FLAGS), st.sampled_from(["2", "maybe", "[true]", "{a: 1}", "''", "0.5"])),
        join("{}={}", st.sampled_from(LISTS), st.sampled_from(["7", "1.5", "true", "{a: 1}", "[[1]]", "[1.5]", "[null]", "[{a: 1}]"])),
        join("{}={}", st.sampled_from(CHOICES[:-1]), st.sampled_from(["7", "true", "[cpu]", "{a: 1}", "''", "null"])),
        join(
            "{}={}",
            st.sampled_from(["model.name", "model.source", "suite.name", "calibration", "results"]),
            st.sampled_from(["[a]", "{a: 1}", "null"]),
        ),
        join("{}=[1]", st.sampled_from(["seed", "reference", "on_existing", "tracking"])),
    ),
    "out of range": words(
        whole.flatmap(lambda key: join("{}={}", st.just(key), st.integers(max_value=LEAST[key] - 1))),
        join("{}=-{}", st.sampled_from(POSITIVE), st.floats(0, 1e12, allow_nan=False)),
        join("{}={}", st.sampled_from(POSITIVE), st.sampled_from(["0", "0.0", "-1e300", "-inf"])),
        join("speed.target={}", st.floats(1, 1e12)),
        join("speed.grid=[{{batch: {}, prompt: 8, new_tokens: 4}}]", st.integers(-9, 0)),
        join("speed.grid=[{{batch: 1, prompt: {}, new_tokens: 4}}]", st.integers(-9, 0)),
        join("speed.grid=[{{batch: 1, prompt: 8, new_tokens: {}}}]", st.integers(-9, 1)),
        join("suite.protocols=[window@{}]", st.integers(-9, 7)),
        join("method.rtn-4bit.bits={}", st.integers(-99, 99).filter(lambda bits: bits not in (2, 3, 4, 8))),
        join("method.rtn-4bit.group_size={}", st.integers(max_value=0)),
    ),
    "contradiction": st.one_of(
        st.tuples(st.just("method=[gptq,rtn-8bit]")),
        st.tuples(st.just("method=[rtn-4bit,sparsegpt]")),
        st.tuples(st.just("method=[kv-int8,kv-fp8]")),
        st.builds(lambda n: ["launcher.slots=" + str(n), "device.name=cpu"], st.integers(2, 99)),
        st.builds(lambda b: [f"settings.bits={b}", f"method.rtn-4bit.bits={b}"], st.sampled_from([2, 3, 8])),
        st.builds(lambda a, b: [f"suite.limit={a}", f"suite.limit={b}"], st.integers(1, 9), st.integers(1, 9)),
        st.builds(lambda k: ["suite.corpus=[]", "suite.tasks=[]", f"suite.seqlen={k}"], st.integers(8, 99)),
        st.tuples(st.just("model.track=encoder")),
        st.tuples(st.just("speed.grid=[]")),
        st.tuples(st.just("suite.protocols=[document]")),
        st.tuples(st.just("stages=quality")),
        st.tuples(st.just("calibration=wikitext2"), st.just("suite.corpus=wikitext2"), st.just("method=[gptq]")),
    ).map(list),
    "huge": words(
        join("{}={}{}", whole, st.integers(1, 9), st.integers(40, 5000).map(lambda zeros: "0" * zeros)),
        join("{}={}", st.sampled_from(POSITIVE), st.sampled_from(["inf", "1e999", "1" + "0" * 400])),
        join("model.name={}", st.integers(101, 20_000).map(lambda length: "x" * length)),
        join("{}=1", st.integers(200, 20_000).map(lambda length: "k" * length)),
        join("method={}", st.integers(200, 20_000).map(lambda length: "m" * length)),
        join("suite.protocols=[{}]", st.integers(100, 3000).map(lambda count: ",".join(["windows"] * count))),
        join("results={}", st.integers(300, 6000).map(lambda length: "r" * length)),
        join("suite.corpus=file:{}", st.integers(300, 6000).map(lambda length: "r" * length)),
    ),
    "strange letters": words(
        join("method={}", strange),
        join("{}={}", whole, strange),
        join("{}=1", strange),
        join("suite.{}=1", strange),
        strange,
        join("method=rtn-4{}bit", control),
        join("model.name='a{}b'", control),
        join("suite{}.limit=3", control),
        join("results='r{}'", control),
        join("{}x=1", control),
    ),
    "empty": words(
        st.sampled_from(
            ["", " ", "=", "=1", "~", "+", "++", "+=", "~=", "method=", "method=[]", "method=''", "model=", "suite=", "results=", "stages="]
        ),
        st.sampled_from(
            [
                "model.name=",
                "model.name=''",
                "model.source=''",
                "engine=[]",
                "calibration=''",
                "reference=",
                "on_existing=''",
                ".=1",
                "suite.=1",
            ]
        ),
        st.sampled_from(
            ["speed.grid=[{}]x", "~method", "~model", "~suite", "~speed", "~engine", "~model.source", "seed=", "suite.seqlen=null"]
        ),
    ),
    "nested": words(
        join("{}.{}=1", st.sampled_from([*sorted(LEAST), "model.name", "results"]), letters),
        join("{}={}1{}", whole, st.integers(1, 400).map(lambda depth: "[" * depth), st.just("")),
        whole.flatmap(lambda key: st.integers(1, 400).map(lambda depth: f"{key}={'[' * depth}1{']' * depth}")),
        whole.flatmap(lambda key: st.integers(1, 200).map(lambda depth: f"{key}={'{a: ' * depth}1{'}' * depth}")),
        join("model={{model: {}}}", word),
        join("suite={{suite: {{windows: {}}}}}", st.integers(1, 9)),
        st.integers(2, 300).map(lambda depth: ".".join(["suite"] * depth) + "=1"),
    ),
    "twice": st.tuples(st.sampled_from(KEYS), st.sampled_from(["", "+", "++"]), word, word).map(
        lambda drawn: [f"{drawn[0]}={drawn[2]}", f"{drawn[1]}{drawn[0]}={drawn[3]}"]
    ),
    "grammar": words(
        st.sampled_from(
            ["method=[gptq", "method=gptq]", "suite={windows: 4", "seed='1", 'seed="1', "seed=(1", "seed=1)", "seed=1,", "seed=,1"]
        ),
        st.sampled_from(
            ["seed=choice(", "seed=choice()", "seed=range()", "seed=range(0,3,0)", "seed=interval(0,1)", "seed=glob(*)", "seed=sort("]
        ),
        st.sampled_from(
            [
                "seed=int(x)",
                "seed=nosuch(1)",
                "seed=shuffle()",
                "seed=tag(a)",
                "seed=cast(1)",
                "seed=${nothing}",
                "seed=${seed}",
                "seed=???",
            ]
        ),
        st.sampled_from(
            [
                "seed=${oc.env:NO_SUCH}",
                "seed=${",
                "seed=$",
                "method=gptq=x",
                "method@x=gptq",
                "method@:x=gptq",
                "hydra.run.dir=x",
                "+hydra.x=1",
            ]
        ),
        st.sampled_from(["hydra/launcher=basic", "suite/x=1", "/suite=quick", "seed:1", "--", "-", "seed==", "seed=1 2 3\\"]),
        join("seed={}1", st.text("[{('\"", min_size=1, max_size=30)),
        join("seed=1{}", st.text("]})", min_size=1, max_size=30)),
    ),
    "no such path": words(
        join("{}:/nowhere/{}", st.sampled_from(["model.source=file", "suite.corpus=file"]), word),
        join("model.source={}", st.sampled_from(["file:", "asset:", "hf:", "http://x/y", "asset:nothing", "/tmp", "git:x", "random:x"])),
        join("model.source=file:{}", st.sampled_from(["file", "file/x", "empty", ".", "..", "~nobody/x"])),
        join("suite.corpus={}", st.sampled_from(["file:", "file:empty", "hf:", "hf:a", "asset:x", "nothing", "'file:file/x'"])),
        join("suite.include_path=[/nowhere/{}]", word),
        join("results={}", st.sampled_from(["file", "file/x", "/dev/null", "/dev/null/x"])),
    ),
    "launcher": words(
        join("launcher={}", word),
        join("launcher.{}=1", letters),
        join("launcher.name={}", letters),
        join("launcher.slots={}", st.sampled_from(["0", "-1", "two", "[1]", "1.5", "null", "true", "1e9"])),
        join("launcher={{name: {}}}", letters),
        st.sampled_from(
            ["launcher.cpus=0", "launcher.cards=-1", "launcher.cards=all", "launcher.memory_gb=0", "launcher.array=0", "launcher.time=soon"]
        ),
        st.sampled_from(
            ["launcher.time=-1", "launcher.time=true", "launcher.sizes=3", "launcher.sizes=[{cards: 1}]", "launcher.extra=[a]"]
        ),
        st.sampled_from(["launcher.sizes=[{weights_gb: 0}]", "launcher.partition=[a]", "launcher.name=pbs", "launcher.array=yes"]),
    ),
    "option": st.one_of(
        st.builds(lambda value: ["--format", value], letters),
        st.builds(
            lambda value: ["--stop-after", value], st.sampled_from(["5", "1y", "-1s", "soon", "1e3s", "", "inf", "nans", "1.s", "1:30"])
        ),
        st.builds(lambda value: [f"--{value}"], letters.filter(lambda text: text not in ("plan", "format", "help", "debug", "stop"))),
        st.builds(lambda value: [f"--{value[0]}", value[1]], st.tuples(st.sampled_from(KEYS), word)),
        st.sampled_from([["--format"], ["--stop-after"], ["-x"], ["--plan=3"], ["--cfg", "job"], ["--multirun"], ["-m"]]),
    ),
}
wrong = st.sampled_from(sorted(WRONG)).flatmap(lambda kind: st.tuples(st.just(kind), WRONG[kind]))
line = st.tuples(st.sampled_from(["run", "sweep"]), wrong, st.lists(st.sampled_from(VALID), unique=True, max_size=3), st.booleans())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file and an empty folder in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_bytes(b"\0\1")
    (folder / "empty").mkdir()
    return folder


def refused(place: Path, examples: int) -> Counter[str]:
    """How many wrong lines of each kind were refused as they should be; the first that was not fails."""
    kinds: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(line)
    def check(drawn: tuple[str, tuple[str, list[str]], list[str], bool]) -> None:
        command, (kind, bad), valid, first = drawn
        mine = [v for v in valid if all(v.partition("=")[0] != b.lstrip("+~").partition("=")[0] for b in bad)]
        said = answer([command, *(bad + mine if first else mine + bad)], place)
        assert said.code == 2 and said.is_one_line and not said.out, f"{kind}: {bad} → {said}"
        assert len(said.err) < 2000 + 2 * max(len(text) for text in bad), "what is said of a long word is not much longer than it"
        assert not said.written, said.written
        kinds[kind] += 1

    check()
    return kinds


def test_a_wrong_command_line_is_one_line_and_exit_code_2_and_writes_nothing(place: Path) -> None:
    assert refused(place, 250).keys() == WRONG.keys()


@pytest.mark.full
def test_a_thousand_wrong_command_lines(place: Path) -> None:
    kinds = refused(place, 1000)
    assert kinds.total() >= 1000 and min(kinds.values()) >= 20, kinds

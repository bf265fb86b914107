"""Two hundred broken files: plans, records, models, methods, experiments, tasks, imports. One line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimbench.harness.launch import sweep
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.store.store import Store
from slimbench.leaderboard.exchange import parquet
from tests.support.answers import Answer, answer
from tests.support.board_records import Spec, records

METHOD = "# @package method.mine\n_target_: slimbench.methods.quantization.weight.rtn.RTN\nbits: 4\ngroup_size: 32\n"
EXPERIMENT = (
    "# @package _global_\ndefaults:\n  - override /method: rtn-4bit\nseed: 3\nhydra:\n  sweeper:\n    params:\n      suite.seqlen: 16,32\n"
)
TASK = (
    "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: mine.jsonl\noutput_type: multiple_choice\ntest_split: test\n"
    "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: Writes a folder with all that a command needs, and returns the file in it.
        words: The command, given the folder.
        text: It is text, not of some binary form.
        whole: A part of it, or another value than a mapping, may not pass for one of it.
        own: The environment variable `SLIMBENCH_CONF` names the folder.
    """

    write: Callable[[Path], Path]
    words: Callable[[Path], list[str]]
    text: bool = True
    whole: bool = True
    own: bool = False


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _plan(folder: Path) -> Path:
    return plans.write(sweep.plan(["method=rtn-4bit", "device=cpu", f"results={folder / 'runs'}"], several=False), folder / "runs")


def _record(folder: Path) -> Path:
    return Store(folder / "runs").put(records(Spec("gptq"))[0])


def _model(folder: Path) -> Path:
    _file(folder, "model/model.safetensors", b"\x02\0\0\0\0\0\0\0{}")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257}
    return _file(folder, "model/config.json", json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))


def _task(folder: Path) -> Path:
    _file(folder, "tasks/mine.jsonl", json.dumps({"question": "1?", "choices": ["a", "b"], "answer": 0}) + "\n")
    return _file(folder, "tasks/mine.yaml", TASK)


def _harness_result(folder: Path) -> Path:
    evaluated = {
        "results": {"arc": {"acc,none": 0.5}},
        "config": {"model": "hf", "model_args": "pretrained=a/b"},
        "lm_eval_version": "0.4.9",
    }
    return _file(folder, "results_x.json", json.dumps(evaluated | {"n-samples": {"arc": {"effective": 10}}, "versions": {"arc": 1}}))


KINDS = {
    "plan": Kind(_plan, lambda folder: ["status", str(next((folder / "runs" / "plans").glob("*.json")))]),
    "record": Kind(_record, lambda folder: ["show", "gptq", "--results", str(folder / "runs")]),
    "model": Kind(
        _model,
        lambda folder: [
            "run",
            "model=custom",
            "model.name=m",
            f"model.source='file:{folder / 'model'}'",
            "device=cpu",
            "stages=[speed]",
            "--plan",
        ],
    ),
    "method": Kind(lambda folder: _file(folder, "method/mine.yaml", METHOD), lambda _: ["run", "method=mine", "--plan"], own=True),
    "experiment": Kind(
        lambda folder: _file(folder, "experiment/mine.yaml", EXPERIMENT),
        lambda _: ["sweep", "experiment=mine", "--plan"],
        whole=False,
        own=True,
    ),
    "task": Kind(_task, lambda folder: ["run", f"suite.include_path=['{folder / 'tasks'}']", "suite.tasks=[mine]", "--plan"]),
    "parquet": Kind(
        lambda folder: _file(folder, "r.parquet", parquet.of_records(records(Spec("gptq")))),
        lambda folder: ["records", "import", str(folder / "r.parquet")],
        text=False,
    ),
    "import": Kind(_harness_result, lambda folder: ["records", "import", str(folder / "results_x.json"), "--model", "a"]),
}


def _json_like(kind: str) -> bool:
    return kind in ("plan", "record", "model", "import")


def breakages(kind: str) -> st.SearchStrategy[tuple[str, Callable[[bytes], bytes]]]:
    """How a file of a kind may be broken so that it cannot be right, and flips of bits, which may leave it right."""
    of = KINDS[kind]

    def put(name: str, content: bytes) -> tuple[str, Callable[[bytes], bytes]]:
        return name, lambda _: content

    found = [
        st.just(put("empty", b"")) if of.whole else st.nothing(),
        st.integers(1, 50).map(lambda count: put("zeros", b"\0" * count)),
        st.sampled_from([b"[]", b"3", b'"text"', b"true", b"[1, 2]", b"1e999", b"-0", b"[{}]", b"null" if of.whole else b"7"]).map(
            lambda content: put("another type", content)
        ),
        st.integers(3_000, 60_000).map(lambda depth: put("deep", b"[" * depth + b"]" * depth)),
        st.integers(3_000, 60_000).map(lambda depth: put("deep", b'{"a":' * depth + b"1" + b"}" * depth)),
        st.integers(400, 20_000).map(lambda digits: put("huge", b"9" * digits)),
        st.floats(0, 1).map(lambda at: ("flip", lambda content: _flipped(content, int(at * 8 * (len(content) - 1))))),
    ]
    if of.text:
        found.append(st.floats(0, 0.99).map(lambda at: ("no UTF-8", lambda content: _put_in(content, at, b"\xff\xfe\xff"))))
    if not of.text or _json_like(kind):
        found.append(st.floats(0, 0.95).map(lambda at: ("truncated", lambda content: content.rstrip()[: max(1, int(at * len(content)))])))
    return st.one_of(found)


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _put_in(content: bytes, at: float, more: bytes) -> bytes:
    place = int(at * len(content))
    return content[:place] + more + content[place:]


breakage = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), breakages(kind)))


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path / "method-and-experiment"))
    (tmp_path / "method-and-experiment").mkdir()
    return tmp_path / "method-and-experiment"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_sound_file_is_taken(kind: str, tmp_path: Path, conf: Path) -> None:
    of, folder = KINDS[kind], conf if KINDS[kind].own else tmp_path / "files"
    of.write(folder)
    (tmp_path / "here").mkdir()
    said = answer(of.words(folder), tmp_path / "here")
    assert said.code == 0 and not said.err, said


class Broken:
    """Breaks files one after another, each in a fresh copy of the folder that it stands in, and tells what a command says of it."""

    def __init__(self, place: Path, conf: Path) -> None:
        self.place, self.conf = place, conf
        self.paths = {name: of.write(place / "sound" / name).relative_to(place / "sound" / name) for name, of in KINDS.items()}

    def answer(self, kind: str, change: Callable[[bytes], bytes]) -> Answer:
        folder, here = self.conf if KINDS[kind].own else self.place / "files", self.place / "here"
        for old in (self.conf, self.place / "files", here):
            shutil.rmtree(old, ignore_errors=True)
            old.mkdir()
        shutil.copytree(self.place / "sound" / kind, folder, dirs_exist_ok=True)
        path = folder / self.paths[kind]
        path.write_bytes(change(path.read_bytes()))
        return answer(KINDS[kind].words(folder), here)


def refused(broken: Broken, examples: int) -> Counter[str]:
    """How many broken files of each kind were refused as they should be; the first that was not fails."""
    kinds: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(breakage)
    def check(drawn: tuple[str, tuple[str, Callable[[bytes], bytes]]]) -> None:
        kind, (how, change) = drawn
        said = broken.answer(kind, change)
        taken = how == "flip" and said.code == 0  # a digit or a letter may have become another one
        assert not said.written or (taken and kind in ("import", "parquet")), f"{kind}, {how}: wrote {said.written}"
        if not taken:
            assert (said.code, said.out, said.is_one_line) == (2, "", True), f"{kind}, {how}: {said}"
            kinds[kind] += 1

    check()
    return kinds


def test_a_broken_file_is_one_line_and_exit_code_2_and_writes_nothing(tmp_path: Path, conf: Path) -> None:
    assert refused(Broken(tmp_path, conf), 60).keys() == KINDS.keys()


@pytest.mark.full
def test_two_hundred_broken_files(tmp_path: Path, conf: Path) -> None:
    kinds = refused(Broken(tmp_path, conf), 240)
    assert kinds.total() >= 200 and min(kinds.values()) >= 15, kinds

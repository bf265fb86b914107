"""A measurement that is cut off goes on where it stopped: nothing is computed twice, and its numbers are those of a calm one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import divergence, latency
from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.stages import compress, stage
from slimbench.harness.stages.common import identity
from slimbench.harness.store import partial
from slimbench.harness.store.partial import Journal
from slimbench.tasks import prompts
from slimbench.tasks.prompts import Prompts
from tests.unit.measure.test_lies import Silent

SUITE = [
    "suite.windows=20",
    "suite.protocols=[window,incremental,document]",
    "suite.chunk=32",
    "suite.batch_tokens=256",
    "suite.tasks=[likely,written]",
    "suite.continuations=3",
]


class Cut(BaseException):
    """What a signal raises in the middle of the work."""


class Meter:
    """Counts what goes through a model, and cuts the attempt off before the n-th call."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[bytes] = []
        self.left: float = float("inf")
        for name in ("logits", "extend", "prefill"):
            patch.setattr(TransformersModel, name, self._counted(getattr(TransformersModel, name)))

    def _counted(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: TransformersModel, what: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            if not self.left:
                raise Cut
            self.left -= 1
            found = whole(model, what, *arguments, **named)
            self.seen.append(what.numpy().tobytes())
            return found

        return call


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    return Meter(monkeypatch)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of lm-eval: one that compares likelihoods, one that writes."""
    folder = tmp_path_factory.mktemp("tasks")
    items = [{"q": f"What is {i} and {i * i}?", "a": ["one", "two or so", str(i)], "right": i % 3} for i in range(6)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'items.jsonl'}}}}}\ntest_split: test\n"
    common = f"{data}doc_to_text: '{{{{q}}}}'\nmetadata: {{version: 1}}\n"
    choose = "output_type: multiple_choice\ndoc_to_choice: '{{a}}'\ndoc_to_target: right\nmetric_list: [{metric: acc}]\n"
    write = (
        "output_type: generate_until\ndoc_to_target: 'x'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 5}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    for name, rest in (("likely", choose), ("written", write)):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}")
    return folder


@pytest.fixture(scope="module")
def keys(overrides: list[str]) -> dict[str, str]:
    """Keys of a dense and a rounded artefact, which are there."""
    made = {"dense": uuid4().hex, "rounded": uuid4().hex}
    for name, method in (("dense", "dense"), ("rounded", "rtn-4bit")):
        compress.run(resolve([*overrides, f"method={method}"]), made[name], Silent())
    return made


@pytest.fixture
def config(overrides: list[str], tasks: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    packaged = prompts.load()
    monkeypatch.setattr(prompts, "load", lambda: Prompts(packaged.kinds[::10], packaged.texts[::10]))
    return resolve([*overrides, *SUITE, f"suite.include_path={tasks}"])


@pytest.fixture
def measure(keys: dict[str, str]) -> Iterator[Callable[..., QualityResult]]:
    """Runs the quality stage of one of the artefacts, in a journal or without one; what it made for others is gone before."""
    names = set()

    def run(config: RunConfig, artefact: str, name: str | None = None, fresh: bool = False) -> QualityResult:
        if fresh:
            shutil.rmtree(divergence.location(""), ignore_errors=True)
        kept = {"partial": name, "since": ""} if name else {}
        names.add(name or "")
        torch.manual_seed(0)
        return stage.run(Stage.QUALITY, config, {"compress": keys[artefact]} | kept, keys["dense"], Silent())

    yield run
    for name in names - {""}:
        partial.discard(name)


def numbers(result: QualityResult) -> dict[str, Any]:
    """All of a result but times, remarks, and the bytes of the process."""
    return result.model_dump(exclude={"seconds", "load_seconds", "flags", "evidence"})


@pytest.mark.parametrize("artefact", ["dense", "rounded"])
def test_cut_off_anywhere_it_computes_nothing_twice(
    config: RunConfig, measure: Callable[..., QualityResult], meter: Meter, artefact: str
) -> None:
    calm = measure(config, artefact, fresh=True)
    calls, name, dice = meter.seen, uuid4().hex, random.Random(7)
    meter.seen = []
    shutil.rmtree(divergence.location(""), ignore_errors=True)
    cuts = sorted(dice.sample(range(1, len(calls)), 3))
    for before, cut in zip([0, *cuts], cuts, strict=False):
        meter.left = cut - before
        with pytest.raises(Cut):
            measure(config, artefact, name)
    meter.left = float("inf")
    stormy = measure(config, artefact, name)
    assert numbers(stormy) == numbers(calm)
    assert len(meter.seen) - len(calls) <= len(cuts) * 16, "a batch of windows in chunks, or a text, is begun again as a whole"
    assert any(flag.startswith("went on after 3 interruptions: ") for flag in stormy.flags)
    assert not any(flag.startswith("went on") for flag in calm.flags)


def test_after_the_last_batch_nothing_is_left_to_do(config: RunConfig, measure: Callable[..., QualityResult], meter: Meter) -> None:
    name = uuid4().hex
    calm = measure(config, "dense", name, fresh=True)
    meter.seen = []
    again = measure(config, "dense", name)
    assert len(meter.seen) == 1, "one prefill, for the evidence of what was loaded"
    assert numbers(again) == numbers(calm)
    assert again.flags == [
        "went on after an interruption: 40 of 40 windows, 39 of 39 windows of documents, 24 of 24 answers, "
        "10 of 10 continuations were there before"
    ]
    assert again.seconds.keys() == calm.seconds.keys()
    assert all(again.seconds[part] >= 0.5 * calm.seconds[part] for part in calm.seconds), "seconds are those of both attempts"


@pytest.mark.parametrize("lost", [False, True])
def test_a_recording_goes_on_in_place_and_is_checked(
    config: RunConfig, measure: Callable[..., QualityResult], meter: Meter, lost: bool
) -> None:
    """Where the machine went down, the journal may name what never reached the disk."""
    name, place = uuid4().hex, divergence.location("")
    calm = measure(config, "dense", fresh=True)
    files = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.npy")}
    calls, meter.seen = meter.seen, []
    shutil.rmtree(place)
    meter.left = 2  # one for the evidence, one for a first batch of windows
    with pytest.raises(Cut):
        measure(config, "dense", name)
    if lost:
        (begun,) = partial.location(name).glob("distributions-*")
        with (begun / "tail.npy").open("r+b") as file:
            file.seek(200)
            file.write(b"\0" * 64)
    meter.left, meter.seen = float("inf"), []
    assert numbers(measure(config, "dense", name)) == numbers(calm)
    assert len(meter.seen) == len(calls) - (0 if lost else 1)
    assert {path.relative_to(place): path.read_bytes() for path in place.rglob("*.npy")} == files


def test_points_that_were_measured_are_kept_each_of_one_process(
    overrides: list[str], keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = "speed.grid=[{batch: [1, 2, 3], prompt: 8, new_tokens: 4}]"
    config, name, done = resolve([*overrides, grid, "speed.largest_batch=2"]), uuid4().hex, []
    whole = latency.measure_point

    def point(*arguments: Any) -> Any:
        done.append(arguments[2].batch)
        found = whole(*arguments)
        if len(done) == 2:
            raise Cut
        return found

    monkeypatch.setattr(latency, "measure_point", point)

    def measure() -> SpeedResult:
        return stage.run(Stage.SPEED, config, {"compress": keys["rounded"], "partial": name, "since": ""}, keys["dense"], Silent())

    with pytest.raises(Cut):
        measure()
    kept = {entry["part"]: entry for line in _lines(name) if "part" in (entry := json.loads(line.partition(" ")[2]))}
    result = measure()
    assert done == [1, 2, 2, 3], "the point in which it was cut off is measured again as a whole"
    assert result.points[0].model_dump(mode="json") == kept["points"]["result"]["point"] | {
        "roofline": result.points[0].roofline.model_dump()
    }
    assert [point.batch for point in result.points] == [1, 2, 3]
    assert result.flags[-1] == (
        "went on after an interruption: 5 of 5 other figures, 1 of 3 points were there before; its points are of several processes"
    )
    partial.discard(name)


class CutShort(Silent):
    """Cuts a compression off when its step has told of so many pieces, at the latest before its artefact is published."""

    def __init__(self, after: float) -> None:
        self.after = after

    def phase(self, name: str) -> None:
        if name == "write artefact":
            raise Cut

    def progress(self, done: float, total: float) -> None:
        if done >= self.after:
            raise Cut


TRAINED = ["method=peqa-3bit", "method.peqa-3bit.steps=6", "method.peqa-3bit.checkpoint_every=1", "method.peqa-3bit.length=16"]


@pytest.mark.parametrize(
    ("method", "after", "flag"),
    [
        (TRAINED, 3, "peqa-3bit went on from a checkpoint: its times are those of all attempts"),
        (["method=gptq"], 1, "gptq began again after an interruption: its times are those of the last attempt"),
    ],
)
def test_a_compression_that_was_cut_off_says_whether_it_went_on(overrides: list[str], method: list[str], after: int, flag: str) -> None:
    config = resolve([*overrides, *method, "calibration_samples=4", "calibration_length=32"])
    name, calm, key = uuid4().hex, uuid4().hex, uuid4().hex
    undisturbed = compress.run(config, calm, Silent())

    def attempt(report: CutShort | Silent) -> CompressResult:
        return stage.run(Stage.COMPRESS, config, {"compress": key, "partial": name, "since": ""}, None, report)

    with pytest.raises(Cut):
        attempt(CutShort(after))
    long = Journal(name, identity(Stage.COMPRESS, config, key, None) | {"since": ""})
    long.add({"what": "step 0", "attempt": 1, "spent": {"seconds": 3600.0}})  # a second attempt, that got no further in an hour
    result = attempt(Silent())
    assert result.files == undisturbed.files
    assert [found for found in result.flags if not found.startswith("other load") and "stolen by the hypervisor" not in found] == [flag]
    assert (result.seconds > 3600) == (result.step_seconds[config.pipeline[0].name] > 3600) == ("of all attempts" in flag)
    partial.discard(name)


def _lines(name: str) -> list[str]:
    return [line for line in (partial.location(name) / "journal").read_text().splitlines() if line]


@pytest.mark.parametrize("change", ["batch_tokens", "artefact", "since"])
def test_what_was_measured_otherwise_is_not_used(
    config: RunConfig, measure: Callable[..., QualityResult], meter: Meter, keys: dict[str, str], change: str
) -> None:
    name, suite = uuid4().hex, config.suite
    config = config.model_copy(update={"suite": suite.model_copy(update={"tasks": [], "protocols": ["window"], "continuations": None})})
    measure(config, "rounded", name, fresh=True)
    calls, meter.seen = len(meter.seen), []
    if change == "since":
        stage.run(Stage.QUALITY, config, {"compress": keys["rounded"], "partial": name, "since": "2026"}, keys["dense"], Silent())
    else:
        other = (
            config.model_copy(update={"suite": config.suite.model_copy(update={"batch_tokens": 128})})
            if change == "batch_tokens"
            else config
        )
        result = measure(other, "dense" if change == "artefact" else "rounded", name)
        assert not any(flag.startswith("went on") for flag in result.flags)
    assert len(meter.seen) >= 0.5 * calls

"""The keys of a cell: where a class lies and which machine plans play no part. Records of other hardware count only if asked for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch.sweep import plan
from slimbench.harness.measure import protocols
from slimbench.harness.run import cell as cells
from slimbench.harness.run import hub
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.planning.ledger import Ledger, recorded, reusable
from slimbench.harness.run.planning.outlook import outlook
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.hardware import Gpu, Hardware, HardwareIdentity, identify
from slimbench.harness.schema.identity import Keys, Stage, Status
from slimbench.harness.schema.record import Failure, Record
from slimbench.harness.store.store import Store
from slimbench.methods.base import Needs
from slimbench.methods.quantization.weight import rtn
from slimbench.methods.quantization.weight.rtn import RTN
from slimbench.tasks import gguf, retrieval
from slimbench.tasks.errors import DataError, HubError
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT
from tests.support.running import Listener

CARD = Gpu("Example GPU", 24 * 2**30, "550.1", "9.0")
ELSEWHERE = HardwareIdentity(fingerprint="0badcafe", label="Example CPU · 96 threads · 512 GB")
HUB = ["model=custom", "model.name=far", "model.source=hf:Example/Far"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cell(overrides: list[str], *more: str) -> Cell:
    return make_cell(resolve([*overrides, *more]), (*overrides, *more))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this machine another one."""

    def change(**facts: object) -> None:
        other = Hardware("Example CPU", ["avx2"], 96, 512 * 2**30, **facts)  # type: ignore[arg-type]
        monkeypatch.setattr(cells, "hardware", lambda: other)

    return change


def test_a_class_in_another_file_has_the_same_keys(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere_entirely.py"
    moved.write_text(Path(rtn.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    here = cell(overrides, "method=rtn-4bit")
    there = cell(overrides, "method=rtn-4bit", "method.rtn-4bit._target_=elsewhere_entirely.RTN")
    assert sys.modules["elsewhere_entirely"].RTN is not RTN
    ours, theirs = here.identity, there.identity
    assert (theirs.keys, theirs.reference, theirs.steps) == (ours.keys, ours.reference, ours.steps)


def test_an_engine_in_another_file_has_the_same_keys(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ROOT / "harness" / "engines" / "transformers.py"
    (tmp_path / "moved_engine.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    there = cell(overrides, "engine._target_=moved_engine.TransformersEngine")
    assert there.identity == cell(overrides).identity
    (tmp_path / "newer_engine.py").write_text(source.read_text().replace("version: ClassVar[int] = 1", "version: ClassVar[int] = 2"))
    newer = cell(overrides, "engine._target_=newer_engine.TransformersEngine").identity.keys
    was = there.identity.keys
    assert newer.compress == was.compress and newer.quality != was.quality and newer.speed != was.speed
    assert "moved_engine" not in sys.modules, "a plan imports no engine"


def test_another_version_of_a_method_or_protocol_has_other_keys(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell(overrides, "method=rtn-4bit").identity
    monkeypatch.setattr(RTN, "version", 2)
    after = cell(overrides, "method=rtn-4bit").identity
    assert not {after.keys.compress, after.keys.quality, after.keys.speed} & {*before.keys.model_dump().values()}
    assert after.reference == before.reference and after.steps[0]["version"] == 2
    monkeypatch.undo()
    changes = {
        "quality": [("PERPLEXITY", protocols.PERPLEXITY | {"window": "window-2"}), ("DIVERGENCE", 2)],
        "speed": [("SPEED", protocols.SPEED + 1)],
    }
    for stage, patches in changes.items():
        for name, value in patches:
            with monkeypatch.context() as patch:
                patch.setattr(protocols, name, value)
                now = cell(overrides, "method=rtn-4bit").identity.keys
            assert {s for s in Keys.model_fields if getattr(now, s) != getattr(before.keys, s)} == {stage}, name
    monkeypatch.setattr(protocols, "ZEROSHOT", 2)
    assert cell(overrides, "method=rtn-4bit").identity == before, "a suite without tasks does not ask for them"


def test_another_version_of_the_converter_is_another_model(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asset = ["model=custom", "model.name=smollm2", "model.source=asset:smollm2-135m"]
    drawn, before = cell(overrides).identity, cell(overrides, *asset).identity
    monkeypatch.setattr(gguf, "VERSION", gguf.VERSION + 1)
    after = cell(overrides, *asset).identity
    assert not {*after.keys.model_dump().values()} & {*before.keys.model_dump().values()} and after.reference != before.reference
    assert cell(overrides).identity == drawn, "what no converter makes does not ask for it"


def test_any_machine_plans_the_same_keys(overrides: list[str], machine: Callable[..., None]) -> None:
    free = [o for o in overrides if not o.startswith("device")]
    mine = cell(free, "device=cpu", "method=rtn-4bit")
    far = cell(free, "device=cuda", "method=rtn-4bit")
    here = mine.hardware(Stage.SPEED)
    machine()
    assert cell(free, "device=cpu", "method=rtn-4bit").identity == mine.identity
    assert cell(free, "device=auto", "method=rtn-4bit").identity == mine.identity
    assert cell(free, "device=cuda", "method=rtn-4bit").identity == far.identity, "planned without a card"
    assert mine.hardware(Stage.SPEED) != here
    machine(gpus=[CARD])
    assert cell(free, "device=cuda", "method=rtn-4bit").identity == far.identity
    assert cell(free, "device=auto", "method=rtn-4bit").identity == far.identity


def test_only_threads_that_were_asked_for_stand_in_the_speed_key(overrides: list[str]) -> None:
    free = [o for o in overrides if o != "device.threads=1"]
    all_cores, one = cell(free).identity.keys, cell(overrides).identity.keys
    assert (one.compress, one.quality) == (all_cores.compress, all_cores.quality) and one.speed != all_cores.speed


def test_the_content_of_timed_prompts_stands_in_the_speed_key(overrides: list[str], tmp_path: Path) -> None:
    texts = tmp_path / "prompts.txt"
    texts.write_text("Where do the geese go in winter?\n")
    few = ["+speed.prompts.count=6", "+speed.prompts.repeats=1", "speed.max_repeats=6"]
    prompted = [*overrides, *few, f"+speed.prompts.corpus=file:{texts}"]
    before = cell(prompted).identity.keys
    (moved := tmp_path / "moved.txt").write_text(texts.read_text())
    assert cell([*overrides, *few, f"+speed.prompts.corpus=file:{moved}"]).identity.keys == before
    texts.write_text("Where do the ducks go in winter?\n")
    after = cell(prompted).identity.keys
    assert (after.compress, after.quality) == (before.compress, before.quality) and after.speed != before.speed


def test_the_content_of_contexts_stands_in_the_quality_key_of_suites_that_have_some(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Where do the geese go in winter?\n")
    asked = [*overrides, f"+suite.retrieval.corpus=file:{story}"]
    plain, before = cell(overrides).identity.keys, cell(asked).identity.keys
    assert (before.compress, before.speed) == (plain.compress, plain.speed) and before.quality != plain.quality
    (moved := tmp_path / "moved.txt").write_text(story.read_text())
    assert cell([*overrides, f"+suite.retrieval.corpus=file:{moved}"]).identity.keys == before
    settings = ("lengths=[64,128]", "contexts=3", "needles=5", "questions=1", "seed=1")
    changed = {cell([*asked, f"+suite.retrieval.{setting}"]).identity.keys.quality for setting in settings}
    assert len(changed | {before.quality}) == 6
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "FACT", " {name} knows {digits}.")
        assert cell(overrides).identity.keys == plain and cell(asked).identity.keys.quality != before.quality, (
            "other facts, another measurement"
        )
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "RETRIEVAL", 2)
        assert cell(overrides).identity.keys == plain and cell(asked).identity.keys.quality != before.quality
    story.write_text("Where do the ducks go in winter?\n")
    assert cell(asked).identity.keys.quality != before.quality


def test_where_compression_runs_stands_in_its_key(
    overrides: list[str], machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=[CARD])
    free = [o for o in overrides if not o.startswith("device")]
    card, processor = (cell(free, "device=cuda", "method=rtn-4bit", *more) for more in ((), ("device.compress=cpu",)))
    assert card.config.device.compress == "cuda" and card.identity.keys.compress != processor.identity.keys.compress
    assert card.identity.reference == processor.identity.reference, "the reference does not follow what it is compared with"
    assert processor.reference().identity.keys == processor.identity.reference
    assert card.hardware(Stage.COMPRESS).label == processor.hardware(Stage.SPEED).label == "Example GPU"
    assert processor.hardware(Stage.COMPRESS).label == "Example CPU · 96 threads · 512 GB"
    monkeypatch.setattr(RTN, "needs", Needs(device="cpu"))
    assert cell(free, "device=cuda", "method=rtn-4bit").config.device.compress == "cpu", "its only device"
    monkeypatch.setattr(
        cells, "build_method", lambda step: type("Fake", (), {"needs": Needs(device="cuda" if step.name == "b" else "cpu")})
    )
    steps = [step.model_copy(update={"name": name}) for step, name in zip(card.config.pipeline * 2, "ab", strict=True)]
    both = processor.config.model_copy(update={"pipeline": steps, "device": card.config.device.model_copy(update={"compress": "auto"})})
    with pytest.raises(ConfigError, match="'a' runs on a CPU only and 'b' on a CUDA card only"):
        cells._on_its_device(both)


def test_a_fingerprint_follows_what_a_kernel_sees() -> None:
    machine = Hardware("CPU", ["avx2"], 2, 24 * 2**30, [CARD], {"L2": 1 << 20})
    base = machine.identity("cpu")
    assert machine.identity("cpu", threads=1).fingerprint == base.fingerprint
    assert replace(machine, memory_bytes=24 * 2**30 + 4096).identity("cpu") == base, "some pages more"
    changes = (
        {"cpu": "B"},
        {"cpu_flags": ["avx512f"]},
        {"cores": 4},
        {"memory_bytes": 48 * 2**30},
        {"caches": {"L2": 2 << 20}},
        {"caches": {}},
    )
    others = [replace(machine, **change).identity("cpu").fingerprint for change in changes]  # type: ignore[arg-type]
    assert len({base.fingerprint, *others}) == len(changes) + 1
    card = machine.identity("cuda")
    assert card.label == "Example GPU" and replace(machine, cores=4).identity("cuda") == card
    assert replace(machine, gpus=[replace(CARD, driver="560")]).identity("cuda") == card
    for change in ({"memory_bytes": 80 * 2**30}, {"compute_capability": "8.0"}, {"name": "B"}):
        assert replace(machine, gpus=[replace(CARD, **change)]).identity("cuda").fingerprint != card.fingerprint  # type: ignore[arg-type]
    assert identify(machine.to_dict(), "cpu") == base
    for facts in (None, {}, {"cpu": "x"}, {"cpu": "x", "gpus": [1]}):
        assert identify(facts, "cpu") == HardwareIdentity()


def stored(store: Store, this: Cell, stage: Stage, hardware: HardwareIdentity, **change: object) -> Record:
    """A record of a stage of a cell in a folder."""
    result = next(r for r in records(Spec()) if r.stage is stage)
    facts = {"cell": this.identity, "key": this.identity.keys.of(stage), "hardware": hardware, **change}
    record = result.model_copy(update=facts)
    store.put(record)
    return record


def test_records_of_other_hardware_count_only_where_any_will_do(overrides: list[str], tmp_path: Path) -> None:
    mine = [*overrides, f"results={tmp_path}", "method=rtn-4bit"]
    this, whichever, store = cell(mine), cell(mine, "device.hardware=any"), Store(tmp_path)
    assert whichever.identity == this.identity
    for stage in Stage:
        stored(store, this, stage, ELSEWHERE)
    assert [reusable(store, this, stage) for stage in Stage] == [None] * 3
    found = [reusable(store, whichever, stage) for stage in Stage]
    assert [record and record.hardware for record in found] == [ELSEWHERE, ELSEWHERE, None], "speed is of one machine"
    (_, planned), (_, planned_any) = (outlook(Ledger(plan(o, False), store)) for o in (mine, [*mine, "device.hardware=any"]))
    assert {*planned.stages.values()} == {"run"}
    assert planned_any.stages == {Stage.COMPRESS: "recorded ok", Stage.QUALITY: "recorded ok", Stage.SPEED: "run"}
    own = stored(store, this, Stage.QUALITY, this.hardware(Stage.QUALITY))
    assert reusable(store, whichever, Stage.QUALITY) == reusable(store, this, Stage.QUALITY) == own, "its own goes first"


def test_a_failure_elsewhere_is_no_fact_here(overrides: list[str], tmp_path: Path) -> None:
    whichever, store = cell([*overrides, "device.hardware=any"]), Store(tmp_path)
    stored(store, whichever, Stage.COMPRESS, ELSEWHERE, status=Status.OOM, compress=None, failure=Failure(type="OOM", message="small"))
    assert recorded(store, whichever, Stage.COMPRESS) is None


def test_a_reference_that_failed_elsewhere_is_tried_here(overrides: list[str], tmp_path: Path) -> None:
    """Where the reference did not run, a candidate is measured without it: on the machine where that was."""
    this, store = cell([*overrides, "method=rtn-4bit"]), Store(tmp_path)
    reference, runner = this.reference(), Runner(Store(tmp_path), Listener())
    bad = {"status": Status.OOM, "quality": None, "failure": Failure(type="OOM", message="small")}
    stored(store, reference, Stage.QUALITY, ELSEWHERE, **bad)
    assert runner._reference_key(this, Stage.QUALITY) == this.identity.reference.compress
    stored(store, reference, Stage.QUALITY, reference.hardware(Stage.QUALITY), **bad)
    assert runner._reference_key(this, Stage.QUALITY) is None
    runner.close()


def test_the_keys_of_a_hub_model_hold_the_commit_that_the_cache_knows(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [*(o for o in overrides if not o.startswith("model")), *HUB]
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub.commit_of.cache_clear()
    unknown = cell(mine, "model.revision=main")
    assert unknown.identity.revision == unknown.config.model.revision == "main", "as written"
    (tmp_path / "models--Example--Far" / "refs").mkdir(parents=True)
    (tmp_path / "models--Example--Far" / "refs" / "main").write_text(COMMIT)
    hub.commit_of.cache_clear()
    known = cell(mine, "model.revision=main")
    assert known.identity.revision == known.config.model.revision == COMMIT, "what runs is what the key says"
    assert known.identity.keys == cell(mine, f"model.revision={COMMIT}").identity.keys == cell(mine).identity.keys
    assert known.identity.keys.compress != unknown.identity.keys.compress
    hub.commit_of.cache_clear()


def test_without_the_commit_of_a_hub_model_nothing_is_run(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that fails while the keys are made would give the same stages other keys than the next time."""
    mine = [*(o for o in overrides if not o.startswith("model")), *HUB]
    asked: list[Exception] = [HubError("no route"), DataError("no such repository")]

    def ask(repository: str, revision: str | None) -> str:
        if not asked:
            return COMMIT
        raise asked.pop(0)

    monkeypatch.setattr(hub, "_ask", ask)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    hub.commit_of.cache_clear()
    config = cell(mine, "model.revision=main").config
    with pytest.raises(HubError, match="no route"):
        hub.require_commits([config])
    hub.require_commits([config])  # what the hub refuses is the stages' to tell
    with pytest.raises(HubError, match="only now"):
        hub.require_commits([config])
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": COMMIT})})
    hub.require_commits([pinned])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.require_commits([config])
    hub.commit_of.cache_clear()


def test_a_plan_with_its_keys_imports_no_torch() -> None:
    """A login node may have none."""
    import subprocess

    code = (
        "import sys\nfrom slimbench.harness.config.compose import resolve\nfrom slimbench.harness.run.cell import make_cell\n"
        "make_cell(resolve(['method=gptq']))\nprint([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    )
    assert importlib.util.find_spec("torch")
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

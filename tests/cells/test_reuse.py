"""What was made before is used again only while it is what it says: a user's own method on the tiny model."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path

import pytest

from slimbench.harness.config import lock
from slimbench.harness.config.compose import resolve
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.planning.ledger import reusable
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store import artefact
from slimbench.harness.store.store import Store
from slimbench.util import syntax
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT
from tests.support.running import Listener, run

METHOD = '''
from dataclasses import dataclass
from slimbench.methods.base import Citation, Claim, Method
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True)
class Toy(Method):
    """Words."""

    name = "toy"
    family = "quantization"
    citation = Citation("none", 2024)
    reference = "paper"

    def compress(self, dense, calibration, out):
        import torch

        model = dense.load()
        with torch.no_grad():
            for layer in block_linears(model).values():
                layer.weight.copy_((layer.weight * 1024).round() / 1024)
        save_dense(model, out)
        return Claim(self.produces, simulated=True)
'''


_times = count(1_000_000_000)


class Notes(Listener):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Bench:
    """A results folder, a method in a module of its own, and a cell that measures it."""

    def __init__(self, runner: Runner, folder: Path, module: Path, overrides: list[str]) -> None:
        self.workers, self.results, self.module, self.overrides = runner, folder / "results", module, overrides
        self.write(METHOD)

    def write(self, text: str) -> None:
        self.module.write_text(text)
        os.utime(self.module, (then := next(_times), then))  # Python takes a file of the same size and second for the compiled one

    def run(self, *more: str) -> tuple[dict[Stage, Record], list[str]]:
        """The records of the method after a run, and what the runner said."""
        target = f"+method.toy._target_={self.module.stem}.Toy"
        overrides = (*self.overrides, "stages=[quality]", "~method.dense", target, *more)
        runner = Runner(Store(self.results), notes := Notes())
        runner._workers = self.workers._workers
        return {record.stage: record for record in run(runner, make_cell(resolve(overrides), overrides))}, notes.said

    def forget_quality(self) -> None:
        for path in self.results.rglob("toy/quality-*.json"):
            path.unlink()


def nll(records: dict[Stage, Record]) -> list[float]:
    quality = records[Stage.QUALITY].quality
    assert quality is not None, records[Stage.QUALITY].failure
    return quality.perplexity[0].window_nll


@pytest.fixture(autouse=True)
def looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source file is read again even if it was read a moment ago."""
    monkeypatch.setattr(syntax, "_LOOK_S", -1.0)


@pytest.fixture
def bench(shared: Runner, modules: Path, tmp_path: Path, overrides: list[str]) -> Bench:
    return Bench(shared, tmp_path, modules / f"{tmp_path.name.lower()}.py", overrides)


def test_another_algorithm_under_the_same_command_is_measured_and_the_old_number_is_not_shown(bench: Bench) -> None:
    first, _ = bench.run()
    bench.write(METHOD.replace('"""Words."""', '"""Other words."""  # and a comment'))
    again, _ = bench.run()
    assert [r.started for r in again.values()] == [r.started for r in first.values()], "words are not code"
    bench.write(METHOD.replace(".round()", ".floor()"))
    second, said = bench.run()
    assert [line for line in said if "compress again, the code of method toy has changed since" in line]
    assert nll(second) != nll(first)
    assert all(second[stage].code["method toy"] != first[stage].code["method toy"] for stage in second)
    files = [[f.sha256 for f in r[Stage.COMPRESS].compress.files] for r in (first, second)]  # type: ignore[union-attr]
    assert files[0] != files[1]
    key = second[Stage.COMPRESS].key
    assert [f.sha256 for f in artefact.read_manifest(artefact.location(key)).files] == files[1], "record and artefact are of one code"
    shutil.copytree(bench.results, bench.results.with_name("kept"))
    bench.write(METHOD)
    bench.run()
    shutil.rmtree(bench.results)
    bench.results.with_name("kept").rename(bench.results)
    bench.write(METHOD.replace(".round()", ".floor()"))
    bench.forget_quality()
    third, _ = bench.run()
    assert nll(third) == nll(second), "an artefact that another run left in the cache by other code is not measured"


@pytest.mark.parametrize("part", ["engine", "loader"])
def test_an_engine_and_a_loader_of_one_s_own_count_by_their_code(modules: Path, tmp_path: Path, overrides: list[str], part: str) -> None:
    """Its name and version are all that a key holds of an engine; of its loaders a key holds nothing."""
    own = {"engine": modules / f"{part}_own_engine.py", "loader": modules / f"{part}_own_loader.py"}
    own["engine"].write_text((ROOT / "harness" / "engines" / "transformers.py").read_text())
    own["loader"].write_text("def load(folder, device='cpu', trust_remote_code=False):\n    return 1\n")
    named = [f"engine._target_={own['engine'].stem}.TransformersEngine", f"engine.loaders.huggingface={own['loader'].stem}.load"]
    cell, store = make_cell(resolve([*overrides, *named])), Store(tmp_path)
    for record in records(Spec()):
        hardware = cell.hardware(record.stage)
        facts = {"cell": cell.identity, "key": cell.identity.keys.of(record.stage), "hardware": hardware}
        store.put(record.model_copy(update=facts | {"code": lock.fingerprints(cell.config, record.stage)}))
    assert all(reusable(store, cell, stage) for stage in Stage)
    old, new = {"engine": ("_CHUNK = ", "_CHUNK = 1 + "), "loader": ("return 1", "return 2")}[part]
    text = own[part].read_text()
    assert old in text
    own[part].write_text(text.replace(old, new))
    now = make_cell(resolve([*overrides, *named]))
    assert now.identity == cell.identity
    assert [bool(reusable(store, now, stage)) for stage in Stage] == [True, False, False], "compression runs no engine"


def test_an_artefact_with_other_bytes_than_published_is_made_again(bench: Bench) -> None:
    first, _ = bench.run()
    weights = artefact.location(first[Stage.COMPRESS].key) / "model.safetensors"
    good = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(good[:-8192] + bytes(8192))
    bench.forget_quality()
    second, said = bench.run()
    assert [line for line in said if "making the artefact again, model.safetensors has other bytes" in line]
    assert nll(second) == nll(first)
    assert weights.read_bytes() == good


def test_other_bytes_under_one_version_are_refused_in_one_line(bench: Bench) -> None:
    drawn = METHOD.replace("(layer.weight * 1024)", "(layer.weight * (1024 + __import__('random').SystemRandom().random()))")
    bench.write(drawn)
    first, _ = bench.run()
    artefact.discard(first[Stage.COMPRESS].key)
    bench.forget_quality()
    refused, _ = bench.run()
    failure = refused[Stage.QUALITY].failure
    assert refused[Stage.QUALITY].status is Status.FAILED and failure is not None
    assert failure.message.startswith("other bytes under one version of toy 1: model.safetensors is ")
    assert "\n" not in failure.message
    measured, _ = bench.run("on_existing=all")
    assert measured[Stage.QUALITY].status is Status.OK, "and the line says how to go on"

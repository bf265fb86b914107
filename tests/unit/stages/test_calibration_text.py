"""Calibration text that the dense model writes: its key, one writing for all cells, and what a record says of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from slimbench.harness.config import lock
from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.run import audit
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.identity import keys
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import calibration_text
from slimbench.harness.stages.common import calibration_of
from slimbench.harness.stages.compress import _calibration_facts
from slimbench.methods.base import DenseModel
from slimbench.tasks import calibration
from tests.support import tiny

SMALL = ["calibration=self", "calibration_samples=6", "calibration_length=24", "device=cpu", "device.compress=cpu"]


class Silent:
    def __init__(self) -> None:
        self.done: list[float] = []

    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None:
        self.done.append(done / total)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model").path


def cell(source: Path, *words: str, method: str = "gptq", name: str = "tiny") -> RunConfig:
    return resolve(["model=custom", f"model.name={name}", f"model.source=file:{source}", f"method={method}", *SMALL, *words])


def test_a_text_is_written_once_for_all_methods_without_a_tokenizer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = Silent(), Silent()
    one = calibration_of(cell(source), source, first)
    assert one is not None and one.ids.shape == (6, 24) and one.ids.dtype == torch.int64 and first.done[-1] == 1
    took = calibration_text.seconds(cell(source))
    monkeypatch.setattr(DenseModel, "load", lambda *_, **__: pytest.fail("it was written before"))
    other = calibration_of(cell(source, method="awq"), source, again)
    assert other is not None and torch.equal(other.ids, one.ids) and other.fingerprint == one.fingerprint and not again.done
    assert calibration_text.seconds(cell(source, method="awq")) == took > 0


def test_a_record_says_who_wrote_it_and_how_long_it_took(source: Path) -> None:
    config = cell(source)
    text = calibration_of(config, source, Silent())
    assert text is not None
    facts = _calibration_facts(config, text)
    assert facts.source == "self" and facts.written_seconds == calibration_text.seconds(config)
    assert facts.text_sha256 == facts.tokens_sha256 == hashlib.sha256(text.ids.numpy().astype("<i8").tobytes()).hexdigest()


def test_what_it_depends_on_is_in_the_key(source: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", hidden_size=128).path
    changed = [
        cell(source, "calibration_seed=1"),
        cell(source, "calibration_samples=7"),
        cell(source, "calibration_length=25"),
        cell(other),
    ]
    assert len({calibration_text.fingerprint(config) for config in [cell(source), *changed]}) == 5
    assert len({keys(config).compress for config in [cell(source), *changed]}) == 5
    assert calibration_text.fingerprint(cell(source, name="alias")) == calibration_text.fingerprint(cell(source)), (
        "its content, whatever it is called"
    )
    packaged = resolve(["method=gptq"])
    wanted = packaged.calibration
    assert calibration_text.fingerprint(packaged) == calibration.fingerprint(wanted.source, wanted.samples, wanted.length, wanted.seed)


def test_a_record_names_the_text_that_its_method_read(source: Path) -> None:
    config = cell(source, "device.compress=auto")
    made = make_cell(config)
    assert made.identity.calibration == calibration_text.fingerprint(made.config) != calibration_text.fingerprint(config), (
        "the device is known by then"
    )
    assert "protocol written" in lock.fingerprints(made.config, Stage.COMPRESS)
    assert "protocol written" not in lock.fingerprints(resolve(["method=gptq"]), Stage.COMPRESS)


def test_who_only_compares_writes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cell(source, "calibration_seed=5")
    with monkeypatch.context() as patched:
        patched.setattr(DenseModel, "load", lambda *_, **__: pytest.fail("it writes"))
        assert calibration_of(config, source, Silent(), writes=False) is None
    text = calibration_of(config, source, Silent())
    again = calibration_of(config, source, Silent(), writes=False)
    assert text is not None and again is not None and torch.equal(text.ids, again.ids)
    assert "written" in audit._MADE, "an audit writes it anew"


def test_an_interrupted_text_goes_on_where_it_was(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "_TOGETHER", 2)
    config, seen = cell(source), []

    def killed(done: float, total: float) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration_text.text(config, source, killed)
    assert calibration_text.found(config, source) is None, "half of it is none"
    taken = calibration_text.seconds(config)
    ids = calibration_text.text(config, source, lambda done, total: seen.append(done))
    assert seen[-1] == 6 and seen.count(2) == 1 and calibration_text.seconds(config) > taken > 0
    assert ids.shape == (6, 24) and len({tuple(row) for row in ids.tolist()}) == 6

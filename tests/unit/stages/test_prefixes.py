"""The artefact of each shorter pipeline is kept, and a longer one goes on from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.compress import CompressResult, Spent
from slimbench.harness.stages import compress
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, Unsupported
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support.lying import FineTune
from tests.unit.measure.test_lies import MAGNITUDE, RTN4, Silent, step_overrides

MASKED = "FineTune(masked=true)"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods whose `compress` was called, in order."""
    seen: list[str] = []
    for kind in (Magnitude, RTN, FineTune):

        def counted(own: Any, name: str, *arguments: Any) -> Claim:
            seen.append(name)
            claim: Claim = own(*arguments)
            return claim

        bound = partial(counted, kind.compress, kind.__name__)
        monkeypatch.setattr(kind, "compress", lambda self, dense, calibration, out, bound=bound: bound(self, dense, calibration, out))
    return seen


def cell_of(overrides: list[str], *steps: str, seed: int) -> Cell:
    return make_cell(resolve([*overrides, f"seed={seed}", *step_overrides(steps)]))


def run(cell: Cell) -> CompressResult:
    prefixes = [cell.prefix_key(steps) for steps in range(1, len(cell.methods))]
    return compress.run(cell.config, cell.identity.keys.compress, Silent(), prefixes)


def test_the_key_of_a_prefix_is_that_of_the_shorter_cell(overrides: list[str]) -> None:
    short, long = (cell_of(overrides, *steps, seed=1) for steps in ((MAGNITUDE,), (MAGNITUDE, MASKED, RTN4)))
    assert long.prefix_key(1) == short.identity.keys.compress
    assert long.prefix_key(3) == long.identity.keys.compress != long.prefix_key(2)


def test_a_pipeline_goes_on_from_the_longest_that_is_there(overrides: list[str], calls: list[str]) -> None:
    one, two, three = (cell_of(overrides, *(MAGNITUDE, MASKED, RTN4)[:n], seed=2) for n in (1, 2, 3))
    first = run(one)
    assert calls == ["Magnitude"] and first.reused_steps == []
    made = run(three)
    assert calls == ["Magnitude", "FineTune", "RTN"] and made.reused_steps == ["step0"]
    again = run(two)
    assert calls == ["Magnitude", "FineTune", "RTN", "FineTune"] and again.reused_steps == ["step0"]
    assert made.claim.sparsity == first.claim.sparsity and made.claim.training_tokens == 1000 and made.claim.bits == 4
    assert list(made.step_seconds) == ["step0", "step1", "step2"]
    assert made.seconds >= first.seconds and made.step_seconds["step0"] == first.step_seconds["step0"]
    fresh = run(cell_of(overrides, MAGNITUDE, MASKED, RTN4, seed=3))
    assert fresh.reused_steps == [] and [f.sha256 for f in fresh.files] == [f.sha256 for f in made.files], "reused or not, the same bytes"


def test_other_settings_or_the_wish_for_all_make_every_step_again(overrides: list[str], calls: list[str]) -> None:
    run(cell_of(overrides, MAGNITUDE, seed=4))
    run(cell_of(overrides, MAGNITUDE.replace("0.5", "0.4"), RTN4, seed=4))
    assert calls == ["Magnitude", "Magnitude", "RTN"]
    result = run(make_cell(resolve([*overrides, "seed=4", "on_existing=all", *step_overrides((MAGNITUDE, RTN4))])))
    assert calls[3:] == ["Magnitude", "RTN"] and result.reused_steps == []


def test_a_step_that_fails_leaves_what_came_before(overrides: list[str], calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cell_of(overrides, MAGNITUDE, RTN4, seed=5)

    def broken(*_: Any) -> Claim:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(RTN, "compress", broken)
        run(cell)
    assert artefact.exists(cell.prefix_key(1)) and not artefact.exists(cell.identity.keys.compress)
    assert run(cell).reused_steps == ["step0"] and calls == ["Magnitude", "RTN"]


def test_what_was_spent_adds_up() -> None:
    both = Spent(seconds=2, cpu_seconds=3, peak_device_bytes=5) + Spent(seconds=1, cpu_seconds=1, device_seconds=1, peak_device_bytes=4)
    assert both == Spent(seconds=3, cpu_seconds=4, device_seconds=1, peak_device_bytes=5)


def test_an_intermediate_artefact_is_one_like_any_other(overrides: list[str]) -> None:
    cell = cell_of(overrides, MAGNITUDE, RTN4, seed=6)
    run(cell)
    folder: Path = artefact.location(cell.prefix_key(1))
    manifest = artefact.read_manifest(folder)
    assert manifest.key == folder.name and manifest.claim.format == "huggingface" and len(manifest.pipeline) == 1


@pytest.mark.parametrize(("what", "seed"), [("other code", 7), ("other bytes", 8)])
def test_a_shorter_artefact_of_other_code_or_bytes_is_not_gone_on_from(
    overrides: list[str], calls: list[str], what: str, seed: int
) -> None:
    cell = cell_of(overrides, MAGNITUDE, RTN4, seed=seed)
    first = run(cell)
    folder = artefact.location(cell.prefix_key(1))
    if what == "other code":
        manifest = artefact.read_manifest(folder)
        artefact.write_manifest(folder, manifest.model_copy(update={"code": dict.fromkeys(manifest.code, "0" * 16)}))
    else:
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content[:-4096] + bytes(4096))
    again = run(cell)
    assert again.reused_steps == [] and calls == ["Magnitude", "RTN"] * 2
    assert [file.sha256 for file in again.files] == [file.sha256 for file in first.files]


def test_each_step_is_told_the_shape_that_the_one_before_it_left(overrides: list[str]) -> None:
    """A step that asks for more blocks than are left is refused, though the first model had them."""
    drop = "slimbench.methods.pruning.depth.shortgpt.ShortGPT(fraction=0.5)"
    with pytest.raises(Unsupported, match="fewer than all must guess"):
        run(cell_of(overrides, drop, "slimbench.methods.dynamic.self_speculation.SelfSpeculation(blocks=1)", seed=5))

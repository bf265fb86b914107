"""The artefact of each shorter pipeline is kept, and a longer one goes on from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.compress import CompressResult, Spent
from slimbench.harness.stages import compress
from slimbench.harness.stages.parts import parts
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, Unsupported
from slimbench.methods.formats import policy as policies
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.weight.rtn import RTN
from slimbench.methods.work import Work
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
    return compress.run(cell.config, cell.identity.keys.compress, Silent(), cell.prefix_keys())


def test_the_key_of_a_prefix_is_that_of_the_shorter_cell(overrides: list[str]) -> None:
    short, long = (cell_of(overrides, *steps, seed=1) for steps in ((MAGNITUDE,), (MAGNITUDE, MASKED, RTN4)))
    assert long.prefix_key(1) == short.identity.keys.compress
    assert long.prefix_keys() == [long.prefix_key(1), long.prefix_key(2)]
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


EXITS = "slimbench.methods.dynamic.early_exit.EarlyExits"
SHORT = "exits=[1], steps=2, batch_size=2, length=16"


@pytest.fixture
def news(tmp_path: Path) -> list[str]:
    """A text of its own for the exits to learn from."""
    (tmp_path / "news.txt").write_text(" ".join(f"On day {n} the {n * n}th report was read aloud." for n in range(300)))
    return [f"calibration=file:{tmp_path / 'news.txt'}", "calibration_samples=4", "calibration_length=32"]


def test_what_only_acts_while_a_model_runs_is_fitted_once_for_all_of_its_values(
    overrides: list[str], news: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimbench.methods.core import training

    trained, inner = list[int](), training.train

    def train(*given: Any) -> Any:
        trained.append(1)
        return inner(*given)

    monkeypatch.setattr(training, "train", train)
    ways = [("margin", 0.3), ("margin", 0.9), ("entropy", 0.5), ("patience", 1)]
    cells = [cell_of([*overrides, *news], f"{EXITS}(criterion={criterion}, threshold={at}, {SHORT})", seed=9) for criterion, at in ways]
    made = [run(cell) for cell in cells]
    assert len(trained) == 1 and [one.reused_steps for one in made] == [[], ["step0"], ["step0"], ["step0"]]
    assert len({cell.identity.keys.compress for cell in cells}) == 4 and len({cell.prefix_keys()[0] for cell in cells}) == 1
    held: list[Any] = [policies.read(artefact.location(cell.identity.keys.compress))[0][0] for cell in cells]
    assert [(one.criterion, one.threshold) for one in held] == ways
    assert all(torch.equal(one.translators["1.weight"], held[0].translators["1.weight"]) for one in held)
    assert held[0].translators["1.weight"].any()
    size = sum(value.numel() for value in held[0].translators.values())
    assert {(one.training_tokens, one.claim.trained_parameters) for one in made} == {(2 * 2 * 16, size)}
    assert [one.claim.work.fewest_blocks for one in made if one.claim.work] == [1, 1, 1, 2]
    assert all(list(one.step_seconds) == ["step0"] and one.step_seconds["step0"] >= made[0].step_seconds["step0"] / 2 for one in made)
    fitted = artefact.read_manifest(artefact.location(cells[0].prefix_keys()[0]))
    assert fitted.pipeline[0]["settings"]["threshold"] == 1e9 and fitted.claim.work == Work(blocks=2, fewest_blocks=2)
    run(cell_of([*overrides, *news], f"{EXITS}(criterion=margin, threshold=0.3, {SHORT.replace('steps=2', 'steps=3')})", seed=9))
    assert len(trained) == 2, "other fitting is fitted anew"


def test_parts_of_a_pipeline_are_its_steps_and_what_is_fitted_apart(overrides: list[str], news: list[str]) -> None:
    window = "slimbench.methods.compact.streaming_llm.StreamingLLM(budget=32)"
    found = cell_of([*overrides, *news], f"{EXITS}(threshold=0.3, {SHORT})", window, seed=9)
    assert [(part.step.name, part.sets, len(part.pipeline)) for part in parts(found.config.pipeline)] == [
        ("step0", False, 1),
        ("step0", True, 1),
        ("step1", False, 2),
    ]
    assert found.prefix_keys()[1:] == [found.prefix_key(1)] != found.prefix_keys()[:1]
    plain = cell_of([*overrides, *news], f"{EXITS}(threshold=1e9, sinks=0, {SHORT})", seed=9)
    assert [part.sets for part in parts(plain.config.pipeline)] == [False] and plain.identity.keys.compress == found.prefix_keys()[0]

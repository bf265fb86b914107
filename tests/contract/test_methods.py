"""What every shipped method class promises, whatever it computes: facts, claim, artefact, seed, resumption, refusal."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from slimbench.harness.config.meaning import meanings
from slimbench.harness.measure import claims
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.schema.evidence import simulation
from slimbench.harness.store import artefact
from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.util import checkpoints
from tests.contract.shipped import CALIBRATION, NAMES, Made, classes, make, marked, runnable, sound
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("quick_collections")

DEQUANTIZED = "fell back to dequantize + dense matmul in 14 of 14 layers"
FLAGS = {
    "bitsandbytes": {"claims 4 bits, stores 4.3", "claims 4 bits, stores 4.5"},  # the tables of its scales weigh on a tiny model
    "codebook": {DEQUANTIZED},
    "fp8-dynamic": {DEQUANTIZED, "claims 8-bit activations, computes in bfloat16"},
    "fp8-weight": {DEQUANTIZED},
    **{name: {"2:4 mask without a sparse kernel"} for name in ("admm", "dsnot", "llm-surgeon", "ria-permuted", "sr-ste")},
}
"""By format or name: what a processor cannot do, and the evidence therefore says."""
FINISHED_AT_ONCE = {"signround": "its library learns a block in one go"}
"""Methods that train and keep nothing to resume from."""


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The artefact of one method, which the tests of this module share."""
    return make(runnable(request.param), dense, tmp_path_factory.mktemp(request.param) / "artefact")


def content(made: Made) -> dict[str, str]:
    """SHA-256 of each file of an artefact, but for OpenVINO's graph, whose nodes are numbered on through a process."""
    return {file.name: file.sha256 for file in artefact.files(made.folder) if file.name != "openvino_model.xml"}


def differences(made: Made, model: LoadedModel) -> set[str]:
    """What the evidence says against the claim, less what holds of every tiny model on a processor."""
    manifest = artefact.read_manifest(made.folder)
    found = claims.check(model, made.claim, artefact.disk_bytes(made.folder), [made.method.needs], manifest.dense_parameters)
    flags = set(found.flags)
    expected = FLAGS.get(made.claim.format, set()) | FLAGS.get(made.method.name, set())
    expected |= {claims.UNMEASURED} if made.claim.work else set()  # tests/contract/test_policies.py measures it
    simulated = {simulation(made.claim, found)} if made.claim.simulated else set()
    assert simulated <= flags
    return {flag for flag in flags - expected - simulated if not flag.startswith("a slower kernel ran")}


def test_modules_import_no_heavy_library() -> None:
    modules = sorted({type(method).__module__ for method in classes().values()})
    heavy = ("torch", "transformers", "llmcompressor", "bitsandbytes")
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_what_its_settings_mean(name: str) -> None:
    method = classes()[name]
    family = type(method).__module__.split(".")[2]
    assert method.family == family or family == "dense"
    assert method.reference == "paper" or re.fullmatch(r"[\w.]+:[\w.]+", method.reference)
    assert method.citation.title and 1950 < method.citation.year < 2100 and method.produces
    assert method.citation.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", method.citation.arxiv)
    assert all(re.fullmatch(r"[a-z]+/[a-z0-9-]+", covered) for covered in method.citation.covers)
    if method.needs.modules:
        assert method.needs.extra or method.needs.environment, "how to install what it needs"
    assert {field.name for field in dataclasses.fields(method)} <= set(meanings(type(method))) and type(method).__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.extra_field = 1  # type: ignore[attr-defined]


def test_the_loaded_artefact_keeps_what_is_claimed(made: Made) -> None:
    model = made.load()
    assert made.claim.format == made.method.produces
    assert differences(made, model) == set()
    assert sound(model, CALIBRATION.ids[:2])


def test_the_grid_that_it_says_lies_in_the_artefact(made: Made) -> None:
    grid, claim = made.method.weight_grid, made.claim
    assert (grid is None) == (claim.bits is None or claim.bits >= 16), "bits and grid are said together"
    if grid is None or made.claim.format not in ("packed", "runtime"):
        return
    stored = [name for file in made.folder.glob("*.safetensors") for name in load_file(file)]
    layers, offsets = ({name.rpartition(".")[0] for name in stored if name.endswith(end)} for end in (".qweight", ".offsets"))
    assert offsets == (layers if grid.startswith("with offsets") else set())
    assert layers or claim.simulated


def test_an_artefact_loads_the_same_twice(made: Made) -> None:
    before = content(made)
    first, second = (made.load().logits(CALIBRATION.ids[:2]) for _ in range(2))
    assert torch.equal(first, second)
    assert content(made) == before, "loading writes nothing"


def test_logits_depend_on_no_later_token_and_no_other_sequence_unless_it_says_so(made: Made) -> None:
    ids = CALIBRATION.ids[:2]
    others = torch.stack([torch.cat([ids[0, :-8], ids[1, -8:].flip(0)]), ids[1].flip(0)])
    model = made.load()
    first, second = (model.logits(batch)[0, :-8].float() for batch in (ids, others))
    assert torch.equal(first, second) is made.method.causal


def test_the_seed_of_a_cell_reaches_what_it_draws(made: Made, dense: DenseModel, tmp_path: Path) -> None:
    other = content(make(made.method, replace(dense, seed=1), tmp_path / "other"))
    if not made.method.draws:
        assert other == content(made), "it says that it draws nothing"
        return
    assert other != content(made), "it says that it draws something"
    assert content(make(made.method, dense, tmp_path / "again")) == content(made)


def test_a_claim_of_a_teacher_comes_with_its_proof(made: Made) -> None:
    training = made.claim.details.get("training", {})
    proofs = {name: training[name] for name in ("start_sha256", "teacher_sha256") if name in training}
    assert all(re.fullmatch(r"[0-9a-f]{64}", proof) for proof in proofs.values())
    if "loss_curve" in training:
        assert "start_sha256" in proofs
    if made.claim.teacher == "the model that the pipeline began with":
        assert "teacher_sha256" in proofs
    assert made.claim.teacher or "teacher_sha256" not in proofs, "whoever taught is named"


class Killed(Exception):
    """In place of the end of a process."""


class Course:
    """What a training did: steps of its optimizers, and states that it saved or went on from.

    Attributes:
        dies_at: Index of the saved state after which the run ends; None: it does not.
    """

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at, self.steps, self.saved, self.states = dies_at, 0, 0, list[Any]()

    @contextmanager
    def watched(self) -> Iterator[Course]:
        """What happens inside is counted."""
        save, load = checkpoints.save, checkpoints.load

        def saving(*arguments: Any) -> None:
            save(*arguments)
            self.saved += 1
            if self.saved - 1 == self.dies_at:
                raise Killed

        def loading(*arguments: Any) -> Any:
            self.states.append(load(*arguments))
            return self.states[-1]

        def stepped(*_: Any) -> None:
            self.steps += 1

        hook = register_optimizer_step_post_hook(stepped)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "save", saving)
            patch.setattr(checkpoints, "load", loading)
            try:
                yield self
            finally:
                hook.remove()


TRAINED = [name for name, method in classes().items() if method.needs.training and name not in FINISHED_AT_ONCE]


@pytest.mark.parametrize("made", marked(TRAINED), indirect=True)
def test_training_that_is_killed_goes_on_to_the_same_artefact(made: Made, dense: DenseModel, tmp_path: Path) -> None:
    """After any of its saved states, drawn by its name; what it computes again is what was not saved."""
    method = made.method

    def run(name: str, course: Course, kept: str) -> dict[str, str]:
        with course.watched():
            return content(make(method, replace(dense, checkpoints=tmp_path / kept), tmp_path / name))

    whole = Course()
    assert run("whole", whole, "calm") == content(made), "it is the same whether states are saved or not"
    assert whole.saved and whole.steps and not any(whole.states)
    killed, resumed = Course(random.Random(method.name).randrange(whole.saved)), Course()
    with pytest.raises(Killed):
        run("killed", killed, "stormy")
    assert run("resumed", resumed, "stormy") == content(made)
    assert any(state is not None for state in resumed.states), "it began anew"
    left, every = whole.steps - killed.steps, getattr(method, "checkpoint_every", 0)
    assert resumed.steps <= left + every, f"{killed.steps} of {whole.steps} steps were saved, and {resumed.steps} came after"
    assert resumed.steps < whole.steps or not killed.steps, "all steps were taken again"


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_that_does_not_fit_is_refused_before_work_or_compressed(name: str, odd: DenseModel, tmp_path: Path) -> None:
    method = runnable(name)
    try:
        method.check(odd.shape)
    except Unsupported as error:
        assert re.search(r"\d", str(error)) and "\n" not in str(error)
        return
    make(method, odd, tmp_path / "artefact")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Widths that no group, block or kernel divides."""
    return tiny.save_model(tmp_path_factory.mktemp("odd"), hidden_size=72, intermediate_size=137, num_hidden_layers=1)


@pytest.mark.parametrize("name", NAMES)
def test_other_layers_are_refused_in_one_line_or_compressed_as_claimed(name: str, gpt2: DenseModel, tmp_path: Path) -> None:
    try:
        made = make(runnable(name), gpt2, tmp_path / "artefact")
    except Unsupported as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert differences(made, made.load()) == set()


def test_a_shape_names_what_would_fit() -> None:
    shape = ModelShape("LlamaForCausalLM", 96, 192, 2, 2, 2, 256, True)
    with pytest.raises(Unsupported, match=r"group_size 64 does not divide the input features 96; nearest that does: 32"):
        shape.check_group(64)

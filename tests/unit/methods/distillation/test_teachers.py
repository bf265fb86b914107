"""Hashes in a claim that prove who taught and from what a student began, against hashes that are written out from files."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimbench.methods.base import DenseModel
from slimbench.methods.distillation.distilbert import DistilBERT
from slimbench.methods.distillation.hints import FitNets
from slimbench.methods.distillation.homodistil import HomoDistil
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.distillation.peers import TeacherAssistant
from slimbench.methods.distillation.student import Distillation
from slimbench.methods.peft.selective import Norms
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"steps": 4, "batch_size": 2, "length": 16, "learning_rate": 3e-3, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """What `shortgpt` leaves of a model of four blocks, which its pipeline began with."""
    folder = tmp_path_factory.mktemp("pair")
    whole = tiny.save_model(folder / "whole", num_hidden_layers=4)
    (folder / "pruned").mkdir()
    ShortGPT(blocks=2).compress(whole, TOKENS, folder / "pruned")
    return replace(tiny.dense_model(folder / "pruned"), original=whole.path)


def written_out(folder: Path, dtype: torch.dtype, among: str = "") -> str:
    """SHA-256 of the tensors of a folder in a dtype: name, shape and dtype in a line of text before the bytes of each.

    Args:
        among: Part of the names that count.
    """
    tensors = {name: value for name, value in load_file(folder / "model.safetensors").items() if among in name}
    lines = [
        f"{name} {tuple(tensors[name].shape)} {dtype}\n".encode() + bytes(tensors[name].to(dtype).flatten().view(torch.uint8).tolist())
        for name in sorted(tensors)
    ]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def told(method: Any, dense: DenseModel, out: Path) -> dict[str, Any]:
    out.mkdir()
    return method.compress(dense, TOKENS, out).details["training"]


def test_the_teacher_of_a_pruned_student_is_the_first_model(pruned: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pruned.original is not None
    first, student = (written_out(folder, torch.bfloat16) for folder in (pruned.original, pruned.path))
    found = told(LogitDistillation(**PLAIN), pruned, tmp_path / "kd")
    assert found["teacher_sha256"] == first != student
    monkeypatch.setattr(DenseModel, "load_original", DenseModel.load)
    assert told(LogitDistillation(**PLAIN), pruned, tmp_path / "itself")["teacher_sha256"] == student


def test_the_teacher_is_the_one_that_was_asked_and_not_another_that_was_loaded(
    pruned: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = LogitDistillation.lessons

    def of_itself(self: LogitDistillation, student: Any, teacher: Any, dense: DenseModel) -> Any:
        return lessons(self, student, dense.load(), dense)

    monkeypatch.setattr(LogitDistillation, "lessons", of_itself)
    assert "teacher_sha256" not in told(LogitDistillation(**PLAIN), pruned, tmp_path / "kd")


@pytest.mark.parametrize(
    "method",
    [
        DistilBERT(**PLAIN),
        FitNets(**PLAIN),
        HomoDistil(**PLAIN, every=1),
        TeacherAssistant(**PLAIN),
        Norms(**PLAIN),
    ],
    ids=lambda method: method.name,
)
def test_whatever_learns_from_the_first_model_says_so(method: Any, pruned: DenseModel, tmp_path: Path) -> None:
    assert pruned.original is not None
    assert told(method, pruned, tmp_path / "out")["teacher_sha256"] == written_out(pruned.original, torch.bfloat16)


def test_the_start_is_the_student_whatever_it_learns_then(pruned: DenseModel, tmp_path: Path) -> None:
    start = written_out(pruned.path, torch.float32)
    methods = LogitDistillation(**PLAIN), LogitDistillation(**PLAIN, teacher_share=0.0), FitNets(**PLAIN)
    found = [told(method, pruned, tmp_path / str(index)) for index, method in enumerate(methods)]
    assert {each["start_sha256"] for each in found} == {start}, "also where a projection learns beside the student"
    assert "teacher_sha256" not in found[1], "hard labels have no teacher"
    assert len({each["loss_after"] for each in found}) == 3
    other = replace(tiny.save_model(tmp_path / "other", seed=1), original=pruned.original)
    assert told(methods[0], other, tmp_path / "otherwise")["start_sha256"] == written_out(other.path, torch.float32) != start


def test_a_run_that_goes_on_from_a_checkpoint_tells_the_same(pruned: DenseModel, tmp_path: Path) -> None:
    kept, method = replace(pruned, checkpoints=tmp_path / "kept"), LogitDistillation(**PLAIN)
    whole = told(method, kept, tmp_path / "whole")
    steps: list[float] = []
    resumed = told(method, replace(kept, progress=lambda done, total: steps.append(done)), tmp_path / "resumed")
    assert steps == [4] and resumed == whole


def test_a_teacher_that_changes_ends_the_run(pruned: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Distillation._learn
    seen: list[Any] = []

    def load(self: DenseModel, **settings: Any) -> Any:
        seen.append(replace(self, path=self.original, original=None).load(**settings))
        return seen[-1]

    def spoiled(self: Distillation, *arguments: Any) -> Any:
        seen[-1].lm_head.weight[3, 5] += 0.25
        return learn(self, *arguments)

    monkeypatch.setattr(DenseModel, "load_original", load)
    monkeypatch.setattr(Distillation, "_learn", spoiled)
    with pytest.raises(RuntimeError, match="the teacher changed"):
        told(LogitDistillation(**PLAIN), pruned, tmp_path / "kd")


def test_of_a_method_without_a_student_the_start_is_what_it_trains(pruned: DenseModel, tmp_path: Path) -> None:
    found = [told(Norms(**PLAIN, loss=loss), pruned, tmp_path / loss) for loss in ("nll", "distillation")]
    assert {each["start_sha256"] for each in found} == {written_out(pruned.path, torch.float32, among="norm")}
    assert ["teacher_sha256" in each for each in found] == [False, True]

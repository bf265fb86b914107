"""Losses and whole steps of training against TRL, which has both of its own: only numbers and weights are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from slimbench.methods.base import DenseModel
from slimbench.methods.core.losses import divergence
from slimbench.methods.distillation.gkd import GKD
from slimbench.methods.distillation.taught.instruct import InstructionTuning
from slimbench.util.writing.teaching import TRAIN, Example, chat_ids, write_examples
from tests.support import tiny

RATE = 0.5
STEPS = 3
PROMPT = 6
EXAMPLES = [Example("what is one and one", "two in all"), Example("why", "because of this and that"), Example("how many", "it is four")]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("case", range(20))
def test_divergences_are_trls(beta: float, case: int) -> None:
    draw = torch.Generator().manual_seed(case)
    ours, theirs = (4 * torch.randn(2, 7, 50, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    counts = torch.rand(2, 7, generator=draw) < 0.6
    counts[0, 0] = True
    temperature = 0.5 + 2 * float(torch.rand((), generator=draw))
    labels = torch.where(counts, 1, -100)
    wanted = GKDTrainer.generalized_jsd_loss(ours, theirs.detach(), labels, beta, temperature)
    kind = "forward" if beta == 0 else "reverse" if beta == 1 else "jsd"
    found = divergence(ours, theirs, kind, beta, temperature, counts)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    (slope,), (by_trl,) = torch.autograd.grad(found, ours), torch.autograd.grad(wanted, ours)
    assert float((slope - by_trl).norm()) <= 1e-5 * float(by_trl.norm())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("trl")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=3, vocab_size=300)
    found = tiny.save_model(folder / "student", "float32", num_hidden_layers=1, vocab_size=300, seed=1)
    tiny.save_tokenizer(folder / "student")
    (folder / "text").mkdir()
    write_examples(EXAMPLES, folder / "text" / TRAIN)
    (folder / "text" / "manifest.json").write_text('{"teacher": "somebody"}')
    return replace(found, original=teacher.path, taught=folder / "text")


def by_us(student: Any, batches: list[Tensor], lesson: Any) -> dict[str, Tensor]:
    """The student's parameters after steps of plain descent along a lesson's loss."""
    descent = torch.optim.SGD(student.parameters(), lr=RATE)
    for batch in batches:
        descent.zero_grad()
        lesson.loss(batch).backward()
        descent.step()
    return dict(student.named_parameters())


def plainly(config: type[Any], folder: Path, size: int, **own: Any) -> Any:
    """Settings of a trainer of TRL for the same steps, on batches of so many texts in their order."""
    return config(
        output_dir=str(folder),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        per_device_train_batch_size=size,
        max_steps=STEPS,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **own,
    )


def compare(ours: dict[str, Tensor], student: Any, start: Any) -> None:
    """Both moved, and lie nearer to each other than 1e-5, and than a hundredth of the way that they moved."""
    before = dict(start.named_parameters())
    for name, value in student.named_parameters():
        moved, gap = float((value - before[name]).norm()), float((value - ours[name]).norm())
        assert moved > 0 and gap <= min(1e-5 * max(1.0, float(value.norm())), moved / 100), name


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_steps_of_gkd_leave_the_weights_of_trls_trainer(beta: float, pair: DenseModel, tmp_path: Path) -> None:
    texts = tiny.tokens(2 * STEPS, 16).ids
    ours, theirs = pair.load(dtype=torch.float32), pair.load(dtype=torch.float32)
    teacher = pair.load_original(dtype=torch.float32)
    (lesson,) = GKD(student_share=0.0, mixture=beta, prompt_tokens=PROMPT, length=16).lessons(ours, teacher, pair)
    found = by_us(ours, list(texts.split(2)), lesson)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :PROMPT]}

    rows = Dataset.from_dict({"input_ids": texts.tolist()})
    settings = plainly(GKDConfig, tmp_path, 2, lmbda=0.0, beta=beta)
    GKDTrainer(theirs, teacher, settings, data_collator=collate, train_dataset=rows, processing_class=pair.tokenizer()).train()
    compare(found, theirs, pair.load(dtype=torch.float32))


def test_steps_on_answers_leave_the_weights_of_trls_trainer(pair: DenseModel, tmp_path: Path) -> None:
    ours, theirs = pair.load(dtype=torch.float32), pair.load(dtype=torch.float32)
    method = InstructionTuning(length=200)
    (lesson,) = method.lessons(ours, None, pair)
    answers = method.windows(tiny.tokens(), pair)
    found = by_us(ours, [answers] * STEPS, lesson)
    tokenizer = pair.tokenizer()
    prompts = [tokenizer.decode(chat_ids(tokenizer, (("user", example.prompt),))) for example in EXAMPLES]
    rows = Dataset.from_dict({"prompt": prompts, "completion": [example.response for example in EXAMPLES]})
    settings = plainly(SFTConfig, tmp_path, len(EXAMPLES), completion_only_loss=True)
    SFTTrainer(theirs, settings, train_dataset=rows, processing_class=tokenizer).train()
    compare(found, theirs, pair.load(dtype=torch.float32))

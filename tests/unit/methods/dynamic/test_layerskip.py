"""LayerSkip's training: loss, gradient and a whole run against loops over sequences, blocks and exits, and what it is good for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.core.learning import trained
from slimbench.methods.core.training import batch, cut
from slimbench.methods.dynamic.early_exit import EarlyExits
from slimbench.methods.dynamic.layerskip import Course, LayerSkip, passed_by
from slimbench.methods.dynamic.self_speculation import SelfSpeculation
from slimbench.methods.formats import policy as policies
from tests.support import tiny
from tests.support.architectures import make

BLOCKS = 5
TOKENS = tiny.tokens(8, 32)
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-3, "checkpoint_every": 3, "every": 2}
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None, "weight_decay": 0.1}
ROTATIONAL = [{0, 2, 4}, {0, 1, 3, 4}, {1, 2, 4}, {0, 2, 3, 4}, {1, 3, 4}]
"""Blocks that have a loss in each update: every second of five, moving round, and the last."""
GRADUAL = [{4}, {4}, {4}, {3, 4}, {2, 3, 4}, {1, 2, 3, 4}, *[{0, 1, 2, 3, 4}] * 6]
"""The same of twelve updates: a block more with every 1.2 of them, the last one at 1.2, all at 6."""


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=BLOCKS, initializer_range=0.1)


def compressed(method: LayerSkip, dense: DenseModel, out: Path) -> tuple[dict[str, Tensor], Claim]:
    out.mkdir()
    method.check(dense.shape)
    claim = method.compress(dense, TOKENS, out)
    return load_file(out / "model.safetensors"), claim


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def written_out(model: Any, ids: Tensor, passed: Sequence[Sequence[bool]], exits: set[int], scale: float) -> Tensor:
    """J of a Llama, sequence by sequence and block by block; `passed[l][b]`: sequence b passes block l by."""
    length, lost, count = ids.shape[1], dict.fromkeys(exits, torch.zeros(())), ids.shape[0] * (ids.shape[1] - 1)
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for row, text in enumerate(ids.split(1)):
        states = model.model.embed_tokens(text)
        turns = model.model.rotary_emb(states, torch.arange(length)[None])
        for index, block in enumerate(model.model.layers):
            if not passed[index][row]:
                states = block(states, attention_mask=mask, position_embeddings=turns)
            if index in exits:
                logs = model.lm_head(model.model.norm(states)).log_softmax(-1)
                for place in range(length - 1):
                    lost[index] = lost[index] - logs[0, place, text[0, place + 1]] / count
    scales = {index: scale * sum(range(index + 1)) for index in exits}
    scales[BLOCKS - 1] = BLOCKS - 1 + scale * sum(range(BLOCKS - 1))
    return torch.stack([lost[index] * scales[index] for index in exits]).sum() / sum(scales.values())


@pytest.mark.parametrize(("curriculum", "step"), [("rotational", 0), ("rotational", 1), ("rotational", 7), ("gradual", 3), ("gradual", 6)])
def test_loss_and_gradient_are_the_papers(curriculum: Any, step: int, dense: DenseModel) -> None:
    """Which sequence passes which block by, an observer says, who sees what each block gets and what comes out of it."""
    method = LayerSkip(drop_rate=0.7, exit_scale=0.6, curriculum=curriculum, **SHORT)
    exits = ROTATIONAL[step % BLOCKS] if curriculum == "rotational" else GRADUAL[step]
    model: Any = trained.load(dense).requires_grad_(True)
    other: Any = trained.load(dense).requires_grad_(True)
    ids, passed, heads = TOKENS.ids[:4, :12], list[list[bool]](), list[tuple[int, ...]]()
    torch.manual_seed(1)
    with passed_by(model, lambda: method.drop_rates(BLOCKS, step)):
        for block in model.model.layers:
            block.register_forward_hook(
                lambda _, args, made: passed.append([torch.equal(*pair) for pair in zip(args[0], made, strict=True)])
            )
        model.lm_head.register_forward_hook(lambda _, args, __: heads.append(tuple(args[0].shape[:2])))
        found = method._loss(model, Course(12, step), dense)(ids)
    asked = len(exits - {0})  # e(0) is 0
    assert heads == [(4, 11)] * asked, "one exit at a time, and none that has no share"
    found.backward()
    assert len(heads) == 2 * asked, "logits are not kept for the gradient"
    wanted = written_out(other, ids, passed, exits, 0.6)
    wanted.backward()
    assert len({tuple(rows) for rows in passed}) > 1 and any(0 < sum(rows) < 4 for rows in passed), "each sequence for itself"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for (name, value), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value.grad, twin.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_which_blocks_have_a_loss() -> None:
    method = LayerSkip(**SHORT)
    shown = [{index for index, weight in enumerate(method.exit_weights(BLOCKS, step)) if weight} for step in range(12)]
    assert shown == [ROTATIONAL[step % BLOCKS] - {0} for step in range(12)]
    gradual = dataclasses.replace(method, curriculum="gradual")
    assert [{index for index in range(BLOCKS - 1) if gradual.has_loss(index, BLOCKS, step)} | {4} for step in range(12)] == GRADUAL
    eighth = dataclasses.replace(method, every=8)
    rounds = [[index for index in range(30) if eighth.has_loss(index, 30, step)] for step in range(30)]
    assert {len(places) for places in rounds} == {math.ceil(30 / 8)}
    assert sorted(index for places in rounds for index in places) == sorted([*range(30)] * 4), "each as often as any other"
    assert rounds[0] == [0, 8, 16, 24] and rounds[6] == [0, 6, 14, 22]


def test_shares_of_the_losses() -> None:
    method = LayerSkip(exit_scale=0.5, curriculum="gradual", steps=2)
    whole = [0.0, 0.5, 1.5, 3.0, 4 + 3.0]
    assert method.exit_weights(BLOCKS, 1) == pytest.approx([scale / sum(whole) for scale in whole])
    assert method.exit_weights(BLOCKS, 0) == [0, 0, 0, 0, 1]
    assert LayerSkip(exit_scale=0.0).exit_weights(BLOCKS, 3) == [0, 0, 0, 0, 1], "training as usual"


def test_rates_rise_with_depth_and_time() -> None:
    constant = LayerSkip(drop_rate=0.2, steps=5)
    wanted = [0.0, 0.0378414, 0.0828427, 0.1363586, 0.2]
    for step in range(5):
        assert constant.drop_rates(BLOCKS, step) == pytest.approx(wanted, abs=1e-7)
    rising = dataclasses.replace(constant, drop_course="exponential")
    assert [rising.drop_rates(BLOCKS, step)[-1] for step in range(5)] == pytest.approx(wanted, abs=1e-7)
    assert rising.drop_rates(3, 2) == pytest.approx([0.0, 0.0828427 * 0.4142136, 0.0828427], abs=1e-7)


class Counting(nn.Module):
    """Block d adds 2^d to the states [sequences, 1, 1], so that the sum says which blocks a sequence ran."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=blocks)
        self.layers = nn.ModuleList(Adding(2**d) for d in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(hidden_states=x)[0]
        return x


class Adding(nn.Module):
    def __init__(self, amount: int) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states + self.amount, "more"


def test_each_sequence_passes_each_block_by_at_its_rate() -> None:
    """Each block of each sequence, and each pair of them: within three and a half standard deviations."""
    rates, passes = [0.0, 0.1, 0.3, 0.5], 4000
    torch.manual_seed(3)
    model: Any = Counting(4)
    with passed_by(model, lambda: rates):
        sums = torch.stack([model(torch.zeros(2, 1, 1)).flatten() for _ in range(passes)]).long()
    gone = 1 - (sums[..., None] >> torch.arange(4) & 1).double().flatten(1)
    expected = torch.tensor(rates * 2).double()
    spread = (expected * (1 - expected) / passes).sqrt()
    assert ((gone.mean(0) - expected).abs() <= 3.5 * spread).all()
    centred = gone - expected
    joint = (centred.T @ centred / passes)[~torch.eye(8, dtype=torch.bool)]
    allowed = (spread[:, None] * spread[None] * passes / passes**0.5)[~torch.eye(8, dtype=torch.bool)]
    assert (joint.abs() <= 3.5 * allowed).all()
    assert torch.equal(model(torch.zeros(1, 1, 1)).flatten(), torch.tensor([15.0])), "hooks are gone"


@pytest.mark.parametrize(("curriculum", "course"), [("rotational", "constant"), ("gradual", "exponential")])
def test_a_run_is_the_papers(curriculum: Any, course: Any, dense: DenseModel, tmp_path: Path) -> None:
    """With a number from 0 to 1 for each sequence and block of each update: it passes by if that is below the rate."""
    method = LayerSkip(
        drop_rate=0.8, drop_course=course, exit_scale=1.0, curriculum=curriculum, every=2, steps=12, learning_rate=3e-3, **PLAIN
    )
    made, claim = compressed(method, dense, tmp_path / "out")
    model: Any = dense.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(12):
            time = 1.0 if course == "constant" else 2 ** (step / 11) - 1
            passed = [(torch.rand(2) < 0.8 * time * (2 ** (index / 4) - 1)).tolist() for index in range(BLOCKS)]
            exits = ROTATIONAL[step % BLOCKS] if curriculum == "rotational" else GRADUAL[step]
            written_out(model, batch(cut(TOKENS.ids, 16), method, step), passed, exits, 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.named_parameters():
        torch.testing.assert_close(made[name], value.detach(), rtol=1e-3, atol=3e-4, msg=name)
    moved = [name for name, value in made.items() if not torch.equal(value, load_file(dense.path / "model.safetensors")[name])]
    assert len(moved) == len(made), "all parameters learn"
    assert claim.training_tokens == 12 * 2 * 16 and claim.trained_parameters == model.num_parameters() and claim.teacher is None
    terms = claim.details["training"]["loss_terms"]
    for index, (_, lost) in enumerate(claim.details["training"]["loss_curve"]):
        parts = [dict(terms[name]).get(index + 1, 0.0) for name in ("last block", "exits")]
        assert lost == pytest.approx(sum(parts), abs=1e-5)


@pytest.mark.parametrize("at", [5, 10])
def test_interrupted_and_resumed_equals_uninterrupted(at: int, dense: DenseModel, tmp_path: Path) -> None:
    method = LayerSkip(drop_rate=0.5, drop_course="exponential", curriculum="gradual", exit_scale=1.0, **SHORT)
    seen: list[float] = []

    def kill(done: float, total: float) -> None:
        if done == at:
            raise Killed

    kept = dataclasses.replace(dense, checkpoints=tmp_path / "kept")
    with pytest.raises(Killed):
        compressed(method, dataclasses.replace(kept, progress=kill), tmp_path / "killed")
    resumed, claim = compressed(method, dataclasses.replace(kept, progress=lambda done, _: seen.append(done)), tmp_path / "resumed")
    whole, plain = compressed(method, dense, tmp_path / "whole")
    assert seen[0] == at // 3 * 3 + 1 and seen[-1] == 12
    assert equal(resumed, whole) and claim == plain
    assert not equal(whole, compressed(method, dataclasses.replace(dense, seed=1), tmp_path / "other")[0])


def test_what_comes_out_is_an_ordinary_model_that_drafts_and_exits_follow(dense: DenseModel, tmp_path: Path) -> None:
    made, claim = compressed(LayerSkip(**SHORT), dense, tmp_path / "out")
    source = load_file(dense.path / "model.safetensors")
    assert (claim.format, claim.layers, claim.parameters) == ("huggingface", None, None)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in source.items()}
    plain = TransformersModel(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), "cpu")
    after, folder = tiny.dense_model(tmp_path / "out", "float32"), tmp_path / "drafts"
    folder.mkdir()
    SelfSpeculation(blocks=2, tokens=3).compress(after, Calibration.none(), folder)
    drafts = TransformersModel(policies.load(folder), "cpu")
    for ids in TOKENS.ids[:3].split(1):
        assert drafts.generate(ids, 12) == plain.generate(ids, 12)
    exits = plain.module
    EarlyExits(exits=(2, 4), threshold=0.1).policy(after.shape).install(exits)
    assert bool(TransformersModel(exits, "cpu").logits(TOKENS.ids[:1]).isfinite().all())


def test_first_blocks_of_a_model_that_learned_so_guess_better(tmp_path: Path) -> None:
    """Of two that learned one text from the same weights in as many updates, one with losses before the last block."""
    generator = torch.Generator().manual_seed(0)
    table, ids = (torch.randint(0, 64, size, generator=generator) for size in ((64, 64), (16, 2)))
    while ids.shape[1] < 32:
        ids = torch.cat([ids, table[ids[:, -2], ids[:, -1]][:, None]], 1)
    dense = tiny.save_model(tmp_path / "base", "float32", num_hidden_layers=4, initializer_range=0.08)
    shares = []
    for scale, rate in ((0.0, 0.0), (1.0, 0.1)):
        (out := tmp_path / str(scale)).mkdir()
        method = LayerSkip(drop_rate=rate, exit_scale=scale, every=2, steps=80, batch_size=8, length=32, learning_rate=3e-3)
        method.compress(dense, Calibration(ids, "table"), out)
        (drafts := tmp_path / f"drafts-{scale}").mkdir()
        SelfSpeculation(blocks=2, tokens=3).compress(tiny.dense_model(out, "float32"), Calibration.none(), drafts)
        model, drafted, accepted = TransformersModel(policies.load(drafts), "cpu"), 0, 0
        for text in ids[:4, :8].split(1):
            step = model.prefill(text, 24)
            while step.state.room > 0:
                step = model.decode_step(step)
            drafted, accepted = drafted + step.state.drafted, accepted + step.state.accepted
        shares.append(accepted / drafted)
    assert 1 - shares[1] < 0.5 * (1 - shares[0]), "fewer guesses are wrong"


def test_what_it_cannot_do_is_refused_in_one_line(dense: DenseModel, tmp_path: Path) -> None:
    for architecture, message in (
        ("mixtral", r"holds 4 experts in one tensor; only linear layers can be handled$"),
        ("gpt2", r"^losses before the last block are for models built like Llama, not GPT2LMHeadModel$"),
        ("gemma2", r"^Gemma2ForCausalLM does more to its logits than a head: final_logit_softcapping$"),
    ):
        with pytest.raises(Unsupported, match=message):
            LayerSkip(**SHORT).compress(tiny.saved(make(architecture), tmp_path / architecture), TOKENS, tmp_path)
    with pytest.raises(Unsupported, match="need two blocks or more, not 1"):
        LayerSkip().check(dataclasses.replace(dense.shape, num_layers=1))
    for wrong in ({"drop_rate": 1.0}, {"drop_rate": -0.1}, {"exit_scale": 1.1}, {"exit_scale": -0.1}, {"every": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            LayerSkip(**wrong)

"""LayerDrop: passes and a whole run against loops over the blocks that are left, the law of the draws, and what it is good for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.core.learning import trained
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.depth.layerdrop import EveryOther, LayerDrop, left_out
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-3, "checkpoint_every": 3}
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None, "weight_decay": 0.1}


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Four blocks."""
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=4)


def compressed(method: Any, dense: DenseModel, out: Path) -> tuple[dict[str, Tensor], Claim]:
    out.mkdir()
    method.check(dense.shape)
    claim = method.compress(dense, TOKENS if method.needs.calibration else Calibration.none(), out)
    return load_file(out / "model.safetensors"), claim


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def log_probabilities(model: Any, ids: Tensor, dropped: Sequence[bool]) -> Tensor:
    """Of a Llama's next tokens, where hidden states pass by the blocks that are dropped."""
    states, length = model.model.embed_tokens(ids), ids.shape[1]
    turns = model.model.rotary_emb(states, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for block, gone in zip(model.model.layers, dropped, strict=True):
        if not gone:
            states = block(states, attention_mask=mask, position_embeddings=turns)
    made: Tensor = model.lm_head(model.model.norm(states)).log_softmax(-1)
    return made


def loss_of(model: Any, ids: Tensor, dropped: Sequence[bool]) -> Tensor:
    """−1/n Σ log p(next)"""
    return -log_probabilities(model, ids, dropped)[:, :-1].gather(-1, ids[:, 1:, None]).mean()


def test_a_pass_is_one_over_the_blocks_that_are_left(dense: DenseModel) -> None:
    """Loss and gradient; which blocks are dropped, an observer says, who sees what each gets and what comes out of it."""
    model: Any = dense.load()
    other, seen, passes = dense.load(), [], set()
    torch.manual_seed(0)
    with left_out(model, 0.5):
        for block in model.model.layers:
            block.register_forward_hook(lambda _, args, made: seen.append(made is args[0]))
        for _ in range(8):
            seen.clear()
            model.zero_grad()
            other.zero_grad()
            logits = model(TOKENS.ids, use_cache=False).logits
            found = functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS.ids[:, 1:].flatten())
            wanted = loss_of(other, TOKENS.ids, seen)
            found.backward()
            wanted.backward()
            passes.add(tuple(seen))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
            for (name, value), twin in zip(model.named_parameters(), other.parameters(), strict=True):
                assert (value.grad is None) == (twin.grad is None), name
                if value.grad is not None:
                    torch.testing.assert_close(value.grad, twin.grad, rtol=1e-4, atol=1e-7)
    assert len(passes) > 4, "it is drawn anew"
    seen.clear()
    model(TOKENS.ids, use_cache=False)
    assert seen == [False] * 4, "afterwards all blocks run"


def written_out(dense: DenseModel, method: LayerDrop) -> dict[str, Tensor]:
    """The run, with a number from 0 to 1 for each block of each pass: the block is dropped if it is below q."""
    model: Any = dense.load()
    teacher = dense.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.learning_rate, weight_decay=method.weight_decay)
    with torch.random.fork_rng():
        torch.manual_seed(method.seed + dense.seed)
        for step in range(method.steps):
            dropped = [float(torch.rand(())) < method.drop_rate for _ in range(4)]
            ids = batch(cut(TOKENS.ids, 16), method, step)
            if method.loss == "nll":
                loss_of(model, ids, dropped).backward()
            else:
                wanted = log_probabilities(teacher, ids, [False] * 4).exp().detach()
                (-(wanted * log_probabilities(model, ids, dropped)).sum(-1).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("loss", ["nll", "distillation"])
def test_a_run_is_the_papers(loss: Any, dense: DenseModel, tmp_path: Path) -> None:
    """Trained on the text; or on the dense model's distribution, which runs all of its blocks."""
    method = LayerDrop(drop_rate=0.4, steps=8, learning_rate=3e-3, loss=loss, **PLAIN)
    made, claim = compressed(method, dense, tmp_path / "out")
    wanted = written_out(dense, method)
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-4)
    assert claim.details["blocks_removed"] == [1, 3] and claim.layers == 2 and (claim.teacher is None) == (loss == "nll")
    assert claim.training_tokens == 8 * 2 * 16 and claim.trained_parameters == dense.load().num_parameters()
    assert claim.parameters == sum(value.numel() for value in made.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


class Counting(nn.Module):
    """Block d adds 2^d, so that the sum says which blocks ran; states come in by name or by place, alone or in a tuple."""

    def __init__(self, blocks: int, named: bool) -> None:
        super().__init__()
        self.config, self.named = SimpleNamespace(num_hidden_layers=blocks), named
        self.layers = nn.ModuleList(Adding(2**d, named) for d in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(hidden_states=x)[0] if self.named else block(x)
        return x


class Adding(nn.Module):
    def __init__(self, amount: int, pair: bool) -> None:
        super().__init__()
        self.amount, self.pair = amount, pair

    def forward(self, hidden_states: Tensor) -> Any:
        made = hidden_states + self.amount
        return (made, "more") if self.pair else made


@pytest.mark.parametrize("named", [True, False])
def test_blocks_are_dropped_independently_at_the_rate(named: bool) -> None:
    """Each block, each pair of blocks in a pass, and each pair in two passes that follow: within three standard deviations."""
    blocks, passes, rate = 5, 4000, 0.2
    torch.manual_seed(3)
    model: Any = Counting(blocks, named)
    with left_out(model, rate):
        sums = torch.stack([model(torch.zeros(())) for _ in range(passes)]).long()
    dropped = 1 - (sums[:, None] >> torch.arange(blocks) & 1).double()
    tolerance = 3 * (rate * (1 - rate) / passes) ** 0.5
    assert ((dropped.mean(0) - rate).abs() < tolerance).all()
    centred = dropped - rate
    within, between = centred.T @ centred / passes, centred[1:].T @ centred[:-1] / passes
    assert (within[~torch.eye(blocks, dtype=torch.bool)].abs() < 3 * rate * (1 - rate) / passes**0.5).all()
    assert (between.abs() < 3 * rate * (1 - rate) / passes**0.5).all()
    assert torch.equal(model(torch.zeros(())), torch.tensor(2.0**blocks - 1)), "hooks are gone"


def test_without_drops_it_is_training_and_then_every_other_block(dense: DenseModel, tmp_path: Path) -> None:
    method = LayerDrop(drop_rate=0.0, **SHORT)
    model = trained.load(dense)
    trained.fit(method, model, dict(model.named_parameters()), TOKENS.ids, dense)
    (folder := tmp_path / "trained").mkdir()
    trained.save(model, dense, folder)
    wanted, _ = compressed(EveryOther(), dataclasses.replace(dense, path=folder), tmp_path / "wanted")
    made, _ = compressed(method, dense, tmp_path / "made")
    assert equal(made, wanted)
    assert not equal(made, compressed(LayerDrop(**SHORT), dense, tmp_path / "dropped")[0])


@pytest.mark.parametrize(
    ("rate", "blocks", "numbers"),
    [(0.5, 12, [2, 4, 6, 8, 10, 12]), (0.25, 30, [4, 8, 12, 16, 20, 24, 28]), (0.3, 7, [3, 6]), (0.2, 10, [5, 10])],
)
def test_every_block_at_a_multiple_of_the_period_goes(rate: float, blocks: int, numbers: list[int]) -> None:
    method = LayerDrop(drop_rate=0.1, pruning_rate=rate)
    chosen, _ = method.chosen(None, blocks, Calibration.none(), None)  # type: ignore[arg-type]
    assert [index + 1 for index in chosen] == numbers and method.count(blocks) == len(numbers)


@pytest.mark.parametrize("at", [5, 10])
def test_interrupted_and_resumed_equals_uninterrupted(at: int, tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "source", num_hidden_layers=4)
    method = LayerDrop(drop_rate=0.5, **SHORT)
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


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "gemma2"])
def test_blocks_of_other_decoders_are_dropped_too(architecture: str, tmp_path: Path) -> None:
    """A pass is one of the model without the blocks, and the artefact is what it is of Llama."""
    dense = tiny.saved(make(architecture), tmp_path / "source")
    model: Any = dense.load()
    ids, stack = TOKENS.ids[:2], next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks, seen, passes = list(stack), list[bool](), 0
    with left_out(model, 0.5), torch.inference_mode():
        for block in blocks:
            block.register_forward_hook(lambda _, args, made: seen.append((made[0] if isinstance(made, tuple) else made) is args[0]))
        while sum(seen) != 1 and (passes := passes + 1) < 50:
            seen.clear()
            found = model(ids, use_cache=False).logits
    assert sum(seen) == 1
    holder = model.get_decoder() if architecture != "gpt2" else model.transformer
    setattr(holder, "h" if architecture == "gpt2" else "layers", nn.ModuleList(b for b, gone in zip(blocks, seen, strict=True) if not gone))
    model.config.num_hidden_layers = 2
    with torch.inference_mode():
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)
    made, claim = compressed(LayerDrop(**SHORT), dense, tmp_path / "out")
    source = load_file(dense.path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert claim.layers == 2 and claim.details["blocks_removed"] == [1] and claim.parameters == loaded.num_parameters()
    first = [name for name in made if ".0." in name and source[name].dim() == 1]
    assert first and not any(torch.equal(made[name], source[name]) for name in first), "biases and gains learn too"
    assert bool(loaded(ids).logits.isfinite().all())


def test_a_model_that_learned_without_blocks_does_better_without_them(tmp_path: Path) -> None:
    """Of a model that knows a text by heart, every other block goes: at once, after more training, and after as much with drops."""
    generator = torch.Generator().manual_seed(0)
    table, ids = (torch.randint(0, 64, size, generator=generator) for size in ((64, 64), (16, 2)))
    while ids.shape[1] < 32:
        ids = torch.cat([ids, table[ids[:, -2], ids[:, -1]][:, None]], 1)
    settings: dict[str, Any] = {"batch_size": 8, "length": 32, "learning_rate": 3e-3}
    base = tiny.save_model(tmp_path / "base", "float32", num_hidden_layers=4, initializer_range=0.08)
    model = trained.load(base)
    trained.fit(LayerDrop(steps=80, **settings), model, dict(model.named_parameters()), ids, base)
    dense = tiny.saved(model, tmp_path / "knows")
    losses: list[float] = []
    for method in (EveryOther(), *(LayerDrop(drop_rate=rate, steps=60, **settings) for rate in (0.0, 0.2))):
        (out := tmp_path / str(len(losses))).mkdir()
        method.compress(dense, Calibration(ids, "table"), out)
        with torch.inference_mode():
            losses.append(float(tiny.dense_model(out, "float32").load()(ids, labels=ids).loss))
    at_once, without_drops, with_drops = losses
    assert with_drops < 0.6 * without_drops < 0.6 * at_once


def test_what_it_cannot_do_is_refused_in_one_line(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        LayerDrop(**SHORT).compress(tiny.saved(make("mixtral"), tmp_path / "source"), TOKENS, tmp_path)
    with pytest.raises(Unsupported, match=r"0 blocks cannot be removed from 1$"):
        LayerDrop().check(dataclasses.replace(dense.shape, num_layers=1))
    for wrong in ({"drop_rate": 1.0}, {"drop_rate": -0.1}, {"pruning_rate": 0.6}, {"pruning_rate": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            LayerDrop(**wrong)

"""MiniMA against masks that really multiply, and what is left of a model."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.uniform import Sizes
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.pruning.structured.minima import MiniMA, stream_gradients
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(6, 24)


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make(request.param, num_hidden_layers=4), tmp_path_factory.mktemp(request.param) / "dense")


def lost(model: Any, mask: Tensor) -> float:
    """The loss with a mask before the first block, and in each block on what both parts write and on both sums."""

    def made(_: Any, __: Any, out: Any) -> Any:
        return (out[0] * mask, *out[1:]) if isinstance(out, tuple) else out * mask

    def entering(_: Any, args: Any, kwargs: Any) -> Any:
        return ((args[0] * mask, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": kwargs["hidden_states"] * mask})

    def summed(module: Any) -> Any:
        """A block whose middle sum is masked: its second norm reads it, and so does the sum behind."""
        held: dict[str, Tensor] = {}

        def before(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            held["plain"] = args[0]
            return (args[0] * mask,)

        def after(_: Any, __: Any, out: Any) -> Any:
            rest = held["plain"] * mask - held["plain"]  # the residual connection has the unmasked sum
            first = out[0] if isinstance(out, tuple) else out
            first = (first + rest.view_as(first)) * mask
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return module.norms[1].register_forward_pre_hook(before), module.module.register_forward_hook(after)

    with ExitStack() as stack:
        blocks = anatomy(model)
        hooks = [blocks[0].module.register_forward_pre_hook(entering, with_kwargs=True)]
        for block in blocks:
            hooks += [block.attention.out.register_forward_hook(made), block.mlp.down.register_forward_hook(made), *summed(block)]
        for hook in hooks:
            stack.callback(hook.remove)
        with torch.no_grad():
            logits = model(TOKENS.ids).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), TOKENS.ids[:, 1:].flatten()))


def test_features_are_ranked_by_the_slope_of_a_mask_at_all_its_places(dense: DenseModel) -> None:
    model = dense.load().double()
    found = stream_gradients(model, TOKENS.ids)
    size = 1e-3 if "Llama" in type(model).__name__ else 1e-5  # norms of Llama compute in float32, and OPT has kinks
    for feature in range(0, len(found), 9):
        mask = torch.ones(len(found), dtype=torch.float64)
        losses = []
        for step in (size, -size):
            mask[feature] = 1 + step
            losses.append(lost(model, mask))
        assert float(found[feature]) == pytest.approx(abs(losses[0] - losses[1]) / (2 * size), rel=1e-2, abs=1e-5)
    with torch.no_grad():
        plain = functional.cross_entropy(model(TOKENS.ids).logits[:, :-1].flatten(0, 1), TOKENS.ids[:, 1:].flatten())
    assert lost(model, torch.ones(len(found))) == pytest.approx(float(plain)) and float(found.median()) > 1e-3
    assert all(value.grad is None for value in model.parameters())


def test_nothing_is_held_afterwards(dense: DenseModel) -> None:
    model, seen = dense.load(), []
    watch = anatomy(model)[0].norms[1].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    stream_gradients(model, TOKENS.ids)
    watch.remove()
    gc.collect()
    assert seen and all(of() is None for of in seen), "hidden states of all batches would fill the memory"


def test_batches_do_not_cancel_each_other(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimbench.methods.core import walk

    model = dense.load()
    monkeypatch.setattr(walk, "_BATCH_TOKENS", 24)
    alone = sum(stream_gradients(model, row[None]) for row in TOKENS.ids)
    torch.testing.assert_close(stream_gradients(model, TOKENS.ids), alone, rtol=1e-4, atol=1e-6)


def test_sizes_are_those_of_the_authors_student() -> None:
    """But for its 8,192 channels, which they set by hand."""
    assert MiniMA().sizes(Sizes(32, 4096, 32, 11008)) == Sizes(24, 3072, 24, 8256)
    assert MiniMA().sizes(Sizes(30, 576, 3, 1536)) == Sizes(22, 432, 2, 1152)
    assert MiniMA().sizes(Sizes(4, 64, 2, 128)) == Sizes(2, 48, 1, 96), "no more than the share stays"
    with pytest.raises(Unsupported, match="leaves no blocks of 4"):
        MiniMA(share=0.1).sizes(Sizes(4, 8, 2, 64))


def test_the_middle_blocks_stay_with_their_best_units_and_features(tmp_path: Path) -> None:
    """What the loss cannot depend on goes: features, heads and channels whose weights are zero."""
    model = make("llama", num_hidden_layers=6, num_key_value_heads=4, tie_word_embeddings=False)
    idle, unread, width = torch.arange(0, 64, 2)[:16], torch.arange(0, 128, 3)[:32], model.config.head_dim
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, unread] = 0
            block.self_attn.o_proj.weight[:, width : 2 * width] = 0
            for writer in (block.mlp.down_proj, block.self_attn.o_proj):
                writer.weight[idle] = 0
        model.model.embed_tokens.weight[:, idle] = 0
    dense = tiny.saved(model, tmp_path / "dense")
    out = tmp_path / "out"
    out.mkdir()
    claim = MiniMA(share=0.75).compress(dense, TOKENS, out)
    assert claim.details["blocks_removed"] == [0, 5]
    assert claim.details["sizes_left"] == {"blocks": 4, "hidden": 48, "groups": 3, "channels": 96}
    left = AutoModelForCausalLM.from_pretrained(out)
    whole = dense.load()
    assert claim.parameters == left.num_parameters() and left.config.hidden_size == 48
    stay = [column for column in range(64) if column not in idle.tolist()]
    assert torch.equal(left.model.embed_tokens.weight, whole.model.embed_tokens.weight[:, stay])
    channels = [channel for channel in range(128) if channel not in unread.tolist()]
    for ours, theirs in zip(left.model.layers, list(whole.model.layers)[1:5], strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight[channels][:, stay])
        heads = [row for row in range(4 * width) if not width <= row < 2 * width]
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[heads][:, stay])


def test_what_follows_is_half_the_text_and_half_the_teacher(tmp_path: Path) -> None:
    """The gradient of `kd` at a temperature of 1 is that of ½ CE + ½ SCE."""
    dense = tiny.saved(make("llama"), tmp_path / "dense")
    student, teacher = make("llama").requires_grad_(True), dense.load(dtype=torch.float32)
    made, ids = LogitDistillation(teacher_temperature=1.0).loss_of(student, teacher, replace(dense, dtype="float32")), TOKENS.ids[:2]
    made(ids).backward()
    found = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    q, p = student(ids).logits[:, :-1].flatten(0, 1), teacher(ids).logits[:, :-1].flatten(0, 1).detach()
    soft = -(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean()
    (0.5 * functional.cross_entropy(q, ids[:, 1:].flatten()) + 0.5 * soft).backward()
    for name, value in student.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        MiniMA(share=1.0)
    with pytest.raises(Unsupported, match="1 block has no middle"):
        MiniMA().check(ModelShape("LlamaForCausalLM", 64, 128, 1, 4, 2, 256, True))

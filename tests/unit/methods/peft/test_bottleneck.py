"""Adapter, AdapterDrop, SparseAdapter, Compacter and AdapterFusion: formulas by hand, what learns, what stays, what is claimed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import claims
from slimbench.methods.base import DenseModel, Method, Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.core.learning import trained
from slimbench.methods.core.losses import next_token, soft_cross_entropy
from slimbench.methods.core.training import batch, cut
from slimbench.methods.formats import edited
from slimbench.methods.formats.architecture.edits import Insert, apply
from slimbench.methods.formats.architecture.modules import Fusion
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.peft import adapter_variants
from slimbench.methods.peft.adapter_variants import AdapterFusion, Compacter, SparseAdapter, kronecker
from slimbench.methods.peft.bottleneck import Adapter, AdapterDrop
from tests.support import tiny
from tests.support.architectures import make

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "learning_rate": 1e-2}
TOKENS = tiny.tokens(8, 32)
METHODS: list[Any] = [
    Adapter(**SHORT),
    AdapterDrop(**SHORT),
    SparseAdapter(**SHORT | {"batches": 2}),
    Compacter(**SHORT),
    AdapterFusion(**SHORT),
]
NAMES = [method.name for method in METHODS]
ALWAYS = pytest.mark.parametrize("method", METHODS, ids=NAMES)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The pipeline began with another model, so that there is something to learn."""
    other = tiny.save_model(tmp_path_factory.mktemp("other"), "float32", seed=9)
    return dataclasses.replace(tiny.save_model(tmp_path_factory.mktemp("dense"), "float32"), original=other.path)


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, dense: DenseModel, opt: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    if request.param == "mixtral":
        make("mixtral").save_pretrained(folder := tmp_path_factory.mktemp("mixtral"))
        return tiny.dense_model(folder, "float32")
    if request.param == "bfloat16":
        return tiny.save_model(tmp_path_factory.mktemp("bfloat16"))
    return {"llama": dense, "opt": opt}[request.param]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model: Any, ids: Tensor = TOKENS.ids) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids).logits
    return found


def ends(blocks: int, architecture: str, parts: tuple[str, ...] = ("attention", "mlp"), first: int = 0) -> list[str]:
    """The modules behind which adapters stand."""
    stack, last = ("model.decoder.layers", "fc2") if architecture == "opt" else ("model.layers", "mlp")
    return [f"{stack}.{i}.{dict(attention='self_attn', mlp=last)[part]}" for i in range(first, blocks) for part in parts]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def change(tensors: dict[str, Any], prefix: str, x: Any) -> Any:
    """W_up f(W_down x + b_down) + b_up of a token, in float64 loops."""
    down, b_down, up, b_up = (tensors[f"{prefix}{name}"].double().numpy() for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
    inside = [gelu(sum(down[k, j] * x[j] for j in range(len(x))) + b_down[k]) for k in range(len(down))]
    return np.array([sum(up[i, k] * inside[k] for k in range(len(inside))) + b_up[i] for i in range(len(x))])


def watched(model: Any, place: str, ids: Tensor) -> tuple[Any, Any]:
    """What the adapter behind a module gets, and gives, of the first sequence: [tokens, width] each."""
    seen: dict[str, Any] = {}
    adapter = model.get_submodule(f"{place}.adapter")
    hook = adapter.register_forward_hook(lambda _, args, made: seen.update(x=args[0], made=made))
    logits(model, ids)
    hook.remove()
    return seen["x"].reshape(len(ids), -1, 64)[0].double().numpy(), seen["made"].reshape(len(ids), -1, 64)[0].double().numpy()


@pytest.mark.parametrize("source", ["llama", "opt"], indirect=True)
@pytest.mark.parametrize("method", METHODS[:4], ids=NAMES[:4])
def test_an_adapter_computes_the_papers_formula_behind_each_half(method: Any, source: DenseModel, tmp_path: Path) -> None:
    """Where it stands, and its outputs against loops; the block adds what the adapter gives to its residual connection."""
    method.compress(source, TOKENS, tmp_path)
    model, stored = edited.load(tmp_path), weights(tmp_path)
    blocks, kind = source.shape.num_layers, "opt" if "OPT" in source.shape.architecture else "llama"
    places = ends(blocks, kind, first=1 if method.name == "adapterdrop" else 0)
    assert sorted({name.split(".adapter.")[0] for name in stored if ".adapter." in name}) == sorted(places)
    for place in places[-2:]:
        x, made = watched(model, place, TOKENS.ids[:1])
        for token in (0, 9):
            np.testing.assert_allclose(made[token], x[token] + change(stored, f"{place}.adapter.", x[token]), rtol=1e-4, atol=1e-5)
            assert np.abs(made[token] - x[token]).max() > 1e-3
    last = model.get_submodule(places[-1].rpartition(".")[0])
    seen: dict[str, Any] = {}
    norm = "final_layer_norm" if kind == "opt" else "post_attention_layernorm"
    hooks = [
        last.get_submodule(norm).register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        last.register_forward_hook(lambda _, __, made: seen.update(after=made[0] if isinstance(made, tuple) else made)),
    ]
    _, made = watched(model, places[-1], TOKENS.ids[:1])
    for hook in hooks:
        hook.remove()
    got = (seen["after"] - seen["before"]).reshape(32, 64).numpy()
    np.testing.assert_allclose(got, made, rtol=1e-3, atol=1e-4)


@ALWAYS
@pytest.mark.parametrize("source", ["llama", "opt", "mixtral", "bfloat16"], indirect=True)
def test_what_is_claimed_is_what_is_loaded_and_all_else_stays(method: Any, source: DenseModel, tmp_path: Path) -> None:
    claim = method.compress(source, TOKENS, tmp_path)
    model, dense_model, after = edited.load(tmp_path), source.load(), weights(tmp_path)
    before = {name: value for name, value in dense_model.state_dict().items() if name != "lm_head.weight" or name in after}
    blocks = source.shape.num_layers
    first = {"adapterdrop": round(0.4 * blocks)}.get(method.name, 0)
    norms = {name for name in before if "norm" in name and ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= first}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() <= after.keys() and all(".adapter." in name for name in after.keys() - before.keys())
    assert moved <= norms and bool(moved) == (method.name not in ("sparse-adapter", "adapterfusion"))
    size = {"sparse-adapter": 16, "compacter": 4}.get(method.name, 4)
    one = 2 * 64 * size + 64 + size
    added = {
        "adapterfusion": blocks * (2 * one + 3 * 64 * 64 + 2 * 64),
        "adapterdrop": 2 * (blocks - first) * one,
    }.get(method.name, 2 * blocks * one)
    assert claim.parameters == dense_model.num_parameters() + added == surgery.counts(model)["parameters"]
    assert claim.layers == blocks and claim.format == "edited" and claim.sparsity is None
    rounds = 3 if method.name == "adapterfusion" else 1
    assert claim.training_tokens == rounds * 6 * 2 * 32
    gains = sum(after[name].numel() for name in norms) if method.name in ("adapter", "adapterdrop", "compacter") else 0
    factors = 4**3 + 2 * blocks * (64 + 2 * (4 * 16 + 4 * 1) + size)
    kept = added - round(0.75 * 2 * blocks * 2 * 64 * size)
    assert claim.trained_parameters == {"compacter": factors + gains, "sparse-adapter": kept}.get(method.name, added + gains)
    assert claims.check(TransformersModel(model, "cpu"), claim, 10**8, [method.needs]).flags == []
    if source.original is None or rounds > 1:
        return
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    lost = float(soft_cross_entropy(logits(model, ids), logits(source.load_original(), ids)))
    assert claim.details["training"]["loss_after"] == pytest.approx(lost, rel=1e-4)
    assert lost < claim.details["training"]["loss_before"]


@pytest.mark.parametrize("source", ["llama", "opt", "mixtral"], indirect=True)
@pytest.mark.parametrize(
    "method", [Adapter(**SHORT), AdapterDrop(**SHORT), Compacter(**SHORT)], ids=["adapter", "adapterdrop", "compacter"]
)
def test_training_begins_at_the_model_bit_for_bit(method: Any, source: DenseModel, tmp_path: Path) -> None:
    dataclasses.replace(method, learning_rate=1e-30).compress(source, TOKENS, tmp_path)
    model = edited.load(tmp_path)
    assert torch.equal(logits(model), logits(source.load()))
    downs = [value for name, value in weights(tmp_path).items() if name.endswith("down.weight") and ".adapter." in name]
    assert downs and all(value.abs().max() <= (0.02 if method.name != "compacter" else 1.0) and value.std() > 5e-3 for value in downs)


@pytest.mark.parametrize(("blocks", "share", "dropped"), [(12, 0.4, 5), (30, 0.4, 12), (2, 0.4, 1), (1, 0.4, 0), (12, 0.0, 0)])
def test_the_lowest_blocks_are_dropped(blocks: int, share: float, dropped: int) -> None:
    assert AdapterDrop(share=share).dropped(blocks) == dropped


def test_a_share_that_leaves_no_block_is_refused(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match=r"share 0.9 leaves none of 2 blocks an adapter$"):
        AdapterDrop(share=0.9).check(dense.shape)


def test_scores_are_those_of_snip_and_the_lowest_of_all_go(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """|w Σ ∂L/∂w| over batches, of the weights that training would begin with; exactly so many zeros in all, not in each, and they stay."""

    def watch(self: Any, given: Any, *rest: Any) -> dict[str, Tensor]:
        began.update({name: value.detach().clone() for name, value in given.items()})
        made.update(masks(self, given, *rest))
        return made

    masks, began, made = SparseAdapter.masks, dict[str, Tensor](), dict[str, Tensor]()
    monkeypatch.setattr(SparseAdapter, "masks", watch)
    method = SparseAdapter(**SHORT | {"batches": 3, "sparsity": 0.75, "loss": "nll"})
    claim = method.compress(dense, TOKENS, tmp_path)
    names = [f"{place}.adapter.{side}.weight" for place in ends(2, "llama") for side in ("down", "up")]
    assert list(made) == list(began) == names

    model = dense.load().requires_grad_(False)
    for place in ends(2, "llama"):
        apply(model, Insert(place, "adapter", "bottleneck", "after", {"width": 64, "size": 16}))
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if ".adapter." in name:
            value.data.copy_(began[name] if name in began else torch.zeros_like(value))
            value.requires_grad_(True)
    for step in range(3):
        ids = batch(cut(TOKENS.ids, 32), method, step)
        next_token(model(ids).logits, ids).backward()
    scores = {name: (parameters[name].detach() * parameters[name].grad).abs() for name in names}  # type: ignore[operator]
    order = sorted((float(score), name, index) for name in names for index, score in enumerate(scores[name].flatten()))
    gone = {(name, index) for _, name, index in order[: round(0.75 * len(order))]}
    got = {(name, index) for name in names for index, masked in enumerate(made[name].flatten()) if masked}
    assert len(got) == len(gone) == 6144 and len(got ^ gone) <= 4, "but for ties in the last digit"
    assert len({int(mask.sum()) for mask in made.values()}) > 1, "scores of all adapters are compared"
    after = weights(tmp_path)
    assert all(torch.equal(after[name] == 0, made[name]) for name in names)
    assert claim.details["adapter_sparsity"] == 0.75
    assert began[names[1]].abs().max() <= 0.02 and began[names[1]].std() > 5e-3


def test_compacter_adds_kronecker_products() -> None:
    """Σ_i A_i ⊗ (s_i t_iᵀ) against torch.kron, entry by entry, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    rule, left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3, 3), (3, 2, 1), (3, 1, 5)))
    want = sum(torch.kron(rule[i], torch.outer(left[i, :, 0], right[i, 0])) for i in range(3))
    made = kronecker(rule, left, right)
    assert made.shape == (6, 15)
    torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)
    by_hand = sum(float(rule[i, 1, 2] * left[i, 1, 0] * right[i, 0, 3]) for i in range(3))
    assert float(made[1 * 2 + 1, 2 * 5 + 3]) == pytest.approx(by_hand)
    assert torch.autograd.gradcheck(kronecker, [value.requires_grad_(True) for value in (rule, left, right)])


@pytest.mark.parametrize("source", ["llama", "opt"], indirect=True)
def test_compacter_shares_a_and_is_stored_as_the_matrices_that_it_equals(
    source: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(settings: Any, model: Any, parameters: dict[str, nn.Parameter], *rest: Any) -> Any:
        found.update(parameters)
        return fit(settings, model, parameters, *rest)

    fit, found = trained.fit, dict[str, nn.Parameter]()
    monkeypatch.setattr(trained, "fit", watch)
    claim = Compacter(**SHORT).compress(source, TOKENS, tmp_path)
    stored, kind = weights(tmp_path), "opt" if "OPT" in source.shape.architecture else "llama"
    places = ends(source.shape.num_layers, kind)
    assert [name for name in found if name.endswith("rule")] == ["rule"] and found["rule"].shape == (4, 4, 4)
    for place in places:
        for side, size in (("down", (4, 64)), ("up", (64, 4))):
            s, t = (found[f"{place}.{side}.{part}"].detach() for part in ("left", "right"))
            assert s.shape == (4, size[0] // 4, 1) and t.shape == (4, 1, size[1] // 4)
            want = sum(torch.kron(found["rule"][i].detach(), torch.outer(s[i, :, 0], t[i, 0])) for i in range(4))
            torch.testing.assert_close(stored[f"{place}.adapter.{side}.weight"], want, rtol=1e-5, atol=1e-6)
            assert torch.equal(stored[f"{place}.adapter.{side}.bias"], found[f"{place}.{side}.bias"])
            assert stored[f"{place}.adapter.{side}.weight"].any()
    own = 64 + len(places) * (64 + 4 + 2 * (4 * 16 + 4))
    assert claim.details["compacter_parameters"] == own < len(places) * (2 * 64 * 4 + 68)


def test_terms_must_divide_the_hidden_size(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match=r"5 terms do not divide the 64 features of a hidden state$"):
        Compacter(terms=5).check(dense.shape)
    assert [Compacter().size(width) for width in (64, 576, 4096)] == [4, 16, 128]


def fused(tensors: dict[str, Any], prefix: str, x: Any, count: int) -> Any:
    """x + Σ_n s_n V z_n, in float64 loops."""
    query, key, value = (tensors[f"{prefix}{name}.weight"].double().numpy() for name in ("query", "key", "value"))
    b_query, b_key = (tensors[f"{prefix}{name}.bias"].double().numpy() for name in ("query", "key"))
    changes = [change(tensors, f"{prefix}adapters.{n}.", x) for n in range(count)]
    asked = query @ x + b_query
    scores = [math.exp(asked @ (key @ z + b_key)) for z in changes]
    return x + sum(score / sum(scores) * (value @ z) for score, z in zip(scores, changes, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_a_fusion_is_attention_over_adapters(count: int) -> None:
    torch.manual_seed(count)
    fusion = Fusion(6, 3, count)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(2, 4, 6)
        made = fusion(x)
    tensors: dict[str, Any] = fusion.state_dict()
    for place in ((0, 0), (1, 3)):
        np.testing.assert_allclose(made[place].double().numpy(), fused(tensors, "", x[place].double().numpy(), count), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_a_fusion_comes_back_from_disk(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    before, (place, *_) = logits(model), ends(3, architecture, ("mlp",), first=1)
    apply(model, Insert(place, "both", "fusion", "after", {"width": 64, "size": 5, "count": 2, "activation": "silu"}))
    torch.manual_seed(0)
    for parameter in model.get_submodule(f"{place}.both").parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    want = logits(model)
    assert not torch.allclose(want, before, atol=1e-3)
    save_dense(model, tmp_path)
    (described,) = json.loads((tmp_path / "edited.json").read_text())["edits"]
    assert (described["edit"], described["kind"], described["arguments"]["count"]) == ("insert", "fusion", 2)
    assert torch.equal(logits(edited.load(tmp_path)), want)


@pytest.mark.parametrize("source", ["llama", "opt"], indirect=True)
def test_each_adapter_of_a_fusion_learns_from_its_part_alone_and_attention_from_all(
    source: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trainings: of each adapter as if there were no other, and of Q, K and V with the adapters as they came out."""
    from slimbench.methods.core import training

    def watch(settings: Any, parameters: dict[str, nn.Parameter], loss: Any, windows: Tensor, where: Any, *rest: Any) -> Any:
        before = float(loss(windows[:2]).detach())
        done = train(settings, parameters, loss, windows, where, *rest)
        stages.append((parameters, windows, before, {name: value.detach().clone() for name, value in parameters.items()}))
        return done

    train, stages = training.train, list[Any]()
    monkeypatch.setattr(training, "train", watch)
    told: list[tuple[float, float]] = []
    method = AdapterFusion(**SHORT | {"loss": "nll"})
    claim = method.compress(dataclasses.replace(source, progress=lambda *now: told.append(now)), TOKENS, tmp_path)
    stored, model = weights(tmp_path), edited.load(tmp_path)
    kind = "opt" if "OPT" in source.shape.architecture else "llama"
    places = ends(source.shape.num_layers, kind, ("mlp",))
    assert told == [(step, 18) for step in range(1, 19)] and len(stages) == 3
    assert torch.equal(torch.cat([stages[0][1], stages[1][1]]), stages[2][1]) and len(stages[0][1]) == 4
    learned = [{name.split(".adapters.")[-1][0] if ".adapters." in name else name.split(".")[-2] for name in stage[0]} for stage in stages]
    assert learned == [{"0"}, {"1"}, {"query", "key", "value"}]
    for index in (0, 1):
        base = float(next_token(logits(source.load(), stages[index][1][:2]), stages[index][1][:2]))
        assert stages[index][2] == pytest.approx(base, rel=1e-5), "it begins as the model does"
    for stage in stages:
        for name, value in stage[3].items():
            place, _, leaf = name.rpartition(f".{'fc2' if kind == 'opt' else 'mlp'}.")
            assert torch.equal(stored[f"{place}.{'fc2' if kind == 'opt' else 'mlp'}.adapter.{leaf}"], value), name
    assert not torch.equal(stored[f"{places[0]}.adapter.adapters.0.up.weight"], stored[f"{places[0]}.adapter.adapters.1.up.weight"])
    x, made = watched(model, places[-1], TOKENS.ids[:1])
    for token in (0, 20):
        np.testing.assert_allclose(made[token], fused(stored, f"{places[-1]}.adapter.", x[token], 2), rtol=1e-4, atol=1e-5)
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    apart = sum(float((stored[f"{place}.adapter.value.weight"] - torch.eye(64)).square().sum()) for place in places)
    lost = float(next_token(logits(model, ids), ids)) + 0.01 * apart
    assert claim.details["training"]["loss_after"] == pytest.approx(lost, rel=1e-4) and apart > 0.01
    assert len(claim.details["adapter_training"]) == 2


def test_attention_begins_almost_as_the_mean_of_the_adapters() -> None:
    fusion = Fusion(8, 2, 2)
    adapter_variants.attend(fusion, torch.Generator().manual_seed(0))
    value = fusion.value.weight.detach()
    assert torch.equal(value.diagonal(), torch.ones(8)) and float(value[0, 1]) == pytest.approx(1e-6)
    assert not fusion.query.bias.any() and 0.01 < float(fusion.query.weight.std()) < 0.03
    assert not torch.equal(fusion.query.weight, fusion.key.weight)


def test_a_text_of_fewer_windows_than_adapters_is_refused(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"2 windows of text are fewer than the 3 adapters$"):
        AdapterFusion(**SHORT | {"adapters": 3}).compress(dense, tiny.tokens(2, 32), tmp_path)


@ALWAYS
def test_interrupted_and_resumed_equals_uninterrupted(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    stop = 31 if method.name == "adapterfusion" else 7

    def kill(done: float, total: float) -> None:
        if done == stop:
            raise Killed

    def made(name: str, **changed: Any) -> dict[str, Tensor]:
        (out := tmp_path / name).mkdir()
        longer.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return weights(out)

    longer = dataclasses.replace(method, steps=12, checkpoint_every=3)
    kept, seen = tmp_path / "kept", list[float]()
    with pytest.raises(Killed):
        made("killed", checkpoints=kept, progress=kill)
    resumed = made("resumed", checkpoints=kept, progress=lambda done, _: seen.append(done))
    assert seen == [stop + step for step in range(6)], "what was trained is not trained again"
    assert all(torch.equal(resumed[name], value) for name, value in made("whole").items())


@ALWAYS
def test_a_cut_model_is_followed_and_what_is_gone_gets_no_adapter(method: Any, tmp_path: Path) -> None:
    model = make("llama")
    surgery.remove_part(model, "model.layers.2", "attention")
    surgery.remove_part(model, "model.layers.1", "mlp")
    for name in ("edited", "out"):
        (tmp_path / name).mkdir()
    save_dense(model, tmp_path / "edited")
    source = dataclasses.replace(tiny.dense_model(tmp_path / "edited", "float32"), format="edited")
    claim = method.compress(source, TOKENS, tmp_path / "out")
    wanted = {"model.layers.0.mlp", "model.layers.2.mlp"}
    if method.name != "adapterfusion":
        wanted |= {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    if method.name == "adapterdrop":
        wanted = {place for place in wanted if ".0." not in place}
    assert {name.split(".adapter.")[0] for name in weights(tmp_path / "out") if ".adapter." in name} == wanted
    assert claim.parameters == surgery.counts(edited.load(tmp_path / "out"))["parameters"]


@ALWAYS
def test_a_block_that_is_built_otherwise_is_refused_in_one_line(method: Method, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("gpt2").save_pretrained(source)
    with pytest.raises(Unsupported, match="GPT2Block is not built like Llama, OPT or Mixtral") as refusal:
        method.compress(tiny.dense_model(source, "float32"), TOKENS, tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_second_adapter_has_no_room(dense: DenseModel, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    Adapter(**SHORT).compress(dense, TOKENS, tmp_path / "first")
    again = dataclasses.replace(dense, path=tmp_path / "first", format="edited")
    with pytest.raises(Unsupported, match="has no room for a module named 'adapter'"):
        Adapter(**SHORT).compress(again, TOKENS, tmp_path / "second")


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (Adapter, {"reduction": 0}, "reduction must be at least 1"),
        (Adapter, {"steps": 0}, "steps must be at least 1"),
        (AdapterDrop, {"share": 1.0}, r"share must be in \[0, 1\)"),
        (SparseAdapter, {"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        (SparseAdapter, {"batches": 0}, "batches must be at least 1"),
        (Compacter, {"terms": 0}, "terms must be at least 1"),
        (AdapterFusion, {"adapters": 1}, "adapters must be at least 2"),
        (AdapterFusion, {"value_decay": -0.1}, "value_decay must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**setting)

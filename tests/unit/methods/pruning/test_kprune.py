"""K-prune against a transcription of the paper's importance, threshold and least squares, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.units import price, structures
from slimbench.methods.formats import edited
from slimbench.methods.pruning.structured.kprune import KPrune, divergence, last_states, least
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
OPT = ("self_attn.out_proj", "fc2")
GROUP, CHANNEL, NORM = 16 * 64 * (2 + 1 + 1) - 8 * 64 * 2, 3 * 64, 64
"""Parameters in the blocks of the Llama: two query heads of 8 with a key and a value head, and so on."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Eight query heads in four groups."""
    return tiny.saved(make("llama", num_attention_heads=8, num_key_value_heads=4), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("opt"), tmp_path_factory.mktemp("opt") / "model")


def compressed(dense: DenseModel, out: Path, **settings: Any) -> Claim:
    out.mkdir()
    return KPrune(tokens=150, **settings).compress(dense, CALIBRATION, out)


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def prefix(model: Any) -> str:
    return "model.decoder.layers" if hasattr(model.model, "decoder") else "model.layers"


def logits_of(model: Any, sample: Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(sample, use_cache=False).logits[0].double())


def kl(logits: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Over the vocabulary at each token, in float64 with NumPy; the mean over tokens."""
    z, t = logits / temperature, teacher / temperature
    p, q = (np.exp(v - v.max(1, keepdims=True)) for v in (z, t))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(temperature**2 * (q * np.log(q / p)).sum(1).mean())


def test_the_divergence_is_that_of_the_dense_predictions_from_the_models() -> None:
    z, t = 3 * torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = kl(z[0].numpy(), t[0].numpy(), 1.7)
    assert float(divergence(z, t, 1.7)) == pytest.approx(want, rel=1e-5) and want != pytest.approx(
        kl(t[0].numpy(), z[0].numpy(), 1.7), rel=0.1
    )


def slope(model: Any, teacher: np.ndarray, name: str, j: int, sample: Tensor, temperature: float, step: float = 1e-3) -> float:
    """∂KL / ∂m_j by a central difference."""
    found = []
    for value in (1 + step, 1 - step):
        mask = torch.ones(model.get_submodule(name).in_features, dtype=torch.float64)
        mask[j] = value
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        found.append(kl(logits_of(model, sample), teacher, temperature))
        hook.remove()
    return (found[0] - found[1]) / (2 * step)


def damaged(dense: DenseModel) -> Any:
    """The model with other weights in its first block, so that its predictions are not the dense ones."""
    model = dense.load().double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in blocks(model)[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("source", "reads", "group"), [("llama", LLAMA, 16), ("opt", OPT, 16)])
def test_importance_is_the_papers(source: str, reads: tuple[str, str], group: int, request: pytest.FixtureRequest) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    teacher, model, ids = dense.load().double(), damaged(dense), CALIBRATION.ids[:3]
    kinds = {f"{prefix(model)}.1.{name}": kind for name, kind in zip(reads, structures(anatomy(model)[1]), strict=True)}
    method = KPrune(representation=0.5, prediction=3.0, heads=7.0, temperature=1.5)
    scores = method.importance(model, kinds, ids, last_states(teacher, ids))
    wanted = [logits_of(teacher, sample) for sample in ids.split(1)]
    lower, upper = {"llama": (2, 8), "opt": (1, 16)}[source]
    for name, kind in kinds.items():
        x, weight = tiny.layer_inputs(model, name, ids).numpy(), kind.reads.weight.detach().double().numpy()

        def of_input(j: int, name: str = name, x: Any = x, weight: Any = weight) -> float:
            lost = sum(v * v for v in x[:, j]) / len(x) * sum(w * w for w in weight[:, j]) / len(weight)
            slopes = [slope(model, of, name, j, sample, 1.5) for of, sample in zip(wanted, ids.split(1), strict=True)]
            return float(0.5 * lost + 3.0 * 0.5 * sum(s * s for s in slopes) / 3)

        held = sum(layer.weight.numel() for layer in (*kind.makes, kind.reads)) + sum(
            0 if layer.bias is None else layer.bias.numel() for layer in kind.makes
        )
        for unit in (0, 3) if "attn" in name else (0, 5, 127):
            if "attn" in name:
                first = unit * group
                heads = [[first + head * upper + i for i in range(upper)] for head in range(lower)]
                want = 7.0 * sum(sum(map(of_input, head)) / upper for head in heads) / (held / 4)
            else:
                want = of_input(unit) / (held / 128)
            assert float(scores[name][unit]) == pytest.approx(want, rel=2e-3)


def test_before_anything_has_gone_representation_decides_alone(llama: DenseModel) -> None:
    model, ids = llama.load(), CALIBRATION.ids[:2]
    kinds = {"model.layers.2.mlp.down_proj": structures(anatomy(model)[2])[1]}
    both, one = (KPrune(prediction=p).importance(model, kinds, ids, last_states(model, ids)) for p in (1.0, 0.0))
    torch.testing.assert_close(*both.values(), *one.values(), rtol=1e-6, atol=0)


def streams(model: Any) -> list[Tensor]:
    """The residual stream before each attention and each MLP, and after the last, float64 [tokens, hidden]."""
    seen: list[Tensor] = []
    names = (
        ("input_layernorm", "post_attention_layernorm") if prefix(model) == "model.layers" else ("self_attn_layer_norm", "final_layer_norm")
    )
    last = model.model.norm if prefix(model) == "model.layers" else model.model.decoder.final_layer_norm
    norms = [block.get_submodule(name) for block in blocks(model) for name in names]
    hooks = [norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, -2))) for norm in (*norms, last)]
    with torch.no_grad():
        model(CALIBRATION.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("source", "reads"), [("llama", LLAMA), ("opt", OPT)])
def test_weights_are_least_squares_on_the_stream_of_the_pruned_model(
    source: str, reads: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    compressed(dense, tmp_path / "out", ratio=0.5)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    wanted, stream = streams(whole), streams(model)
    compared = 0
    for index, block in enumerate(blocks(model)):
        for half, name in enumerate(reads):
            at = 2 * index + half
            try:
                layer = block.get_submodule(name)
            except AttributeError:
                continue
            x = tiny.layer_inputs(model, f"{prefix(model)}.{index}.{name}", CALIBRATION.ids).numpy()
            bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
            want, *_ = np.linalg.lstsq(x, wanted[at + 1].numpy() - stream[at].numpy() - bias, rcond=None)
            np.testing.assert_allclose(layer.weight.detach().double().numpy().T, want, rtol=1e-4, atol=1e-4)
            compared += x.shape[1] < whole.get_submodule(f"{prefix(whole)}.{index}.{name}").in_features
    assert compared >= 3


def test_fewest_structures_of_the_lowest_scores_meet_the_budget() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = {"a": torch.randint(0, 4, (3,), generator=generator).double(), "b": torch.randint(0, 4, (9,), generator=generator).double()}
    prices = {"a": 50, "b": 7}
    flat = [(float(value), place, name, at) for place, (name, of) in enumerate(scores.items()) for at, value in enumerate(of)]
    for wanted in range(-3, 214):
        left, gone = wanted, {name: [False] * len(of) for name, of in scores.items()}
        for _, _, name, at in sorted(flat):
            if left > 0:
                gone[name][at], left = True, left - prices[name]
        assert {name: mask.tolist() for name, mask in least(scores, prices, wanted).items()} == gone


def scripted(monkeypatch: pytest.MonkeyPatch, script: Callable[[str, int], Tensor]) -> list[list[str]]:
    """Importance as a script says it; the sub-layers it was asked of, in order."""
    asked: list[list[str]] = []

    def importance(_: KPrune, model: Any, kinds: dict[str, Any], *__: Any) -> dict[str, Tensor]:
        asked.append(list(kinds))
        return {name: script(name, kind.count) for name, kind in kinds.items()}

    monkeypatch.setattr(KPrune, "importance", importance)
    return asked


def test_sublayers_go_bottom_up_and_each_threshold_meets_what_is_left(
    llama: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"count": 0}

    def script(name: str, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(calls["count"] // 6 + len(name) + int(name.split(".")[2]))
        calls["count"] += 1
        return torch.rand(count, generator=generator, dtype=torch.float64)

    asked = scripted(monkeypatch, script)
    claim = compressed(llama, tmp_path / "out", ratio=0.4)
    order = [f"model.layers.{index}.{name}" for index in range(3) for name in LLAMA]
    assert asked == [order[at:] for at in range(6)]
    calls["count"], whole = 0, llama.load()
    left = -(-sum(p.numel() for p in blocks(whole).parameters()) * 2 // 5)
    kept = {"self_attn.o_proj": [], "mlp.down_proj": []}  # type: ignore[var-annotated]
    for at in range(6):
        scores = {name: script(name, 4 if "attn" in name else 128) for name in order[at:]}
        if at == 0:
            scores[order[0]][scores[order[0]].argmax()] = torch.inf
        costs = {name: GROUP if "attn" in name else CHANNEL for name in scores}
        gone, rest = 0, left
        for _, name in sorted((float(score), name) for name, of in scores.items() for score in of):
            if rest <= 0:
                break
            rest -= costs[name]
            gone += name == order[at]
        left -= gone * costs[order[at]] + NORM * (gone == len(scores[order[at]]))
        kept[order[at].split(".", 3)[3]].append(len(scores[order[at]]) - gone)
    assert claim.details["head_groups_by_block"] == kept["self_attn.o_proj"]
    assert claim.details["channels_by_block"] == kept["mlp.down_proj"]
    assert len(set(kept["mlp.down_proj"])) > 1


@pytest.mark.parametrize(("source", "channel"), [("llama", CHANNEL), ("opt", 65 + 64)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
def test_the_budget_is_met_to_one_unit(source: str, channel: int, ratio: float, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    claim = compressed(dense, tmp_path / "out", ratio=ratio)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    lost, asked = whole.num_parameters() - model.num_parameters(), ratio * sum(p.numel() for p in blocks(whole).parameters())
    assert asked <= lost < asked + channel + NORM
    assert claim.parameters == model.num_parameters() and claim.layers == 3 and claim.format == "edited" and claim.sparsity is None
    groups, channels = claim.details["head_groups_by_block"], claim.details["channels_by_block"]
    assert claim.details["head_groups_left"] == [sum(groups), 12] and claim.details["channels_left"] == [sum(channels), 384]
    assert claim.cache_bytes_per_token == sum(groups) * (8 if source == "llama" else 16) * 2 * 4
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_whole_parts_go_where_nothing_would_be_left_but_not_the_first_attention(
    llama: DenseModel, opt: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda name, count: torch.full((count,), 0.0 if "attn" in name or ".1." in name else 9.0, dtype=torch.float64))
    wanted = 11 * GROUP + 128 * CHANNEL
    total = sum(p.numel() for p in blocks(llama.load()).parameters())
    claim = compressed(llama, tmp_path / "llama", ratio=wanted / total)
    model = edited.load(tmp_path / "llama")
    assert claim.details["head_groups_by_block"] == [1, 0, 0] and claim.details["channels_by_block"] == [128, 0, 128]
    assert claim.parameters == model.num_parameters() == llama.load().num_parameters() - wanted - 3 * NORM
    assert claim.cache_bytes_per_token == 8 * 2 * 4
    stays = compressed(opt, tmp_path / "opt", ratio=0.52)
    assert stays.details["head_groups_by_block"] == [1, 1, 1] and stays.details["channels_by_block"][1] == 1


def test_pruning_hurts_less_with_fitted_weights(llama: DenseModel, tmp_path: Path) -> None:
    compressed(llama, tmp_path / "out", ratio=0.3)
    model, whole, plain = edited.load(tmp_path / "out"), llama.load(), llama.load()
    for index, block in enumerate(anatomy(model)):
        for kind in (block.attention.out, block.mlp.down):
            name = block.name_of(kind)
            dense, left = whole.get_submodule(name), model.get_submodule(name)
            assert left.in_features <= dense.in_features and index < 3
    with torch.no_grad():
        fitted = float((model(CALIBRATION.ids).logits - whole(CALIBRATION.ids).logits).norm())
        for block in blocks(plain):
            block.mlp.down_proj.weight[:, torch.randperm(128)[:38]] = 0
        assert fitted < float((plain(CALIBRATION.ids).logits - whole(CALIBRATION.ids).logits).norm())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        KPrune().compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


def test_more_than_can_go_and_settings_out_of_range_are_refused(opt: DenseModel, tmp_path: Path) -> None:
    kept = [price(kind) for block in anatomy(opt.load()) for kind in structures(block)]
    most = 4 * sum(kept[::2]) + 128 * sum(kept[1::2]) - sum(kept)
    with pytest.raises(Unsupported, match=f"what can go from the blocks holds {most} parameters, fewer than"):
        KPrune(ratio=0.99).compress(opt, CALIBRATION, tmp_path)
    for settings in ({"ratio": 1.0}, {"representation": -1.0}, {"representation": 0.0, "prediction": 0.0}, {"heads": 0.0}, {"tokens": 0}):
        with pytest.raises(ValueError, match="must"):
            partial(KPrune, **settings)()


def test_the_same_artefact_comes_twice(llama: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(llama, tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

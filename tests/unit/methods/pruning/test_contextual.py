"""Contextual pruning against the queries of the authors' program over a table of neurons, on tiny random models."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.formats import edited
from slimbench.methods.pruning.structured.contextual import ContextualPruning
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=5, length=48)
LLAMA = {"mlp.gate_proj": "linear_output", "mlp.up_proj": "linear_output", "mlp.down_proj": "linear_input"}
OPT = {"fc1": "linear_output", "fc2": "linear_input"}
EPSILON = 0.02


def uneven(model: Any, layers: dict[str, str]) -> Any:
    """Channels of which one layer or the other makes little and the other much: some products are quiet, some alone of their factors."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for block in blocks(model):
            for name, side in layers.items():
                if side == "linear_output":
                    strength = 10 ** (4 * torch.rand(128, generator=generator) - 2.5)
                    for parameter in block.get_submodule(name).parameters():
                        parameter.mul_(strength.view(-1, *[1] * (parameter.dim() - 1)))
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(uneven(make("llama"), LLAMA), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(uneven(make("opt"), OPT), tmp_path_factory.mktemp("opt") / "model")


def compressed(dense: DenseModel, out: Path, calibration: Calibration = CALIBRATION, **settings: Any) -> Claim:
    out.mkdir()
    return ContextualPruning(**settings).compress(dense, calibration, out)


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def neurons(model: Any, layers: dict[str, str]) -> pd.DataFrame:
    """The authors' table: a row for each input or output of each layer, its mean magnitude number by number."""
    rows: list[dict[str, Any]] = []

    def note(block: int, name: str, kind: str, _: Any, args: tuple[Tensor], made: Tensor) -> None:
        values = args[0] if kind == "linear_input" else made
        for column, numbers in enumerate(values.detach().flatten(0, -2).double().T.tolist()):
            mean = sum(abs(number) for number in numbers) / len(numbers)
            rows.append({"Block": block, "Layer": name, "NeuronType": kind, "ColumnIndex": column, "AverageMagnitude": mean})

    hooks = []
    for index, block in enumerate(blocks(model)):
        for name, kind in layers.items():
            hooks.append(block.get_submodule(name).register_forward_hook(partial(note, index, name, kind)))
    with torch.inference_mode():
        model(CALIBRATION.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return pd.DataFrame(rows)


def zeroed(model: Any, table: pd.DataFrame, epsilon: float) -> Any:
    """The authors' pruning: weights that read or make quiet neurons are zero, and so are the biases that make them."""
    for _, row in table.query(f"AverageMagnitude <= {epsilon}").iterrows():
        layer: nn.Linear = blocks(model)[row["Block"]].get_submodule(row["Layer"])
        if row["NeuronType"] == "linear_input":
            layer.weight.data[:, row["ColumnIndex"]] = 0
        else:
            layer.weight.data[row["ColumnIndex"]] = 0
            if layer.bias is not None:
                layer.bias.data[row["ColumnIndex"]] = 0
    return model


@pytest.mark.parametrize(("source", "layers"), [("llama", LLAMA), ("opt", OPT)])
def test_the_cut_model_is_the_one_that_the_authors_zero(
    source: str, layers: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    claim = compressed(dense, tmp_path / "out", epsilon=EPSILON, frequency=None)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    table = neurons(whole, layers)
    quiet = table.query(f"AverageMagnitude <= {EPSILON}")
    by_layer = [set(zip(rows["Block"], rows["ColumnIndex"], strict=True)) for _, rows in quiet.groupby("Layer")]
    gone = set[tuple[int, int]]().union(*by_layer)
    assert len(by_layer) == len(layers), "each layer has quiet neurons"
    assert source == "opt" or all(found - set().union(*(other for other in by_layer if other is not found)) for found in by_layer)
    left = [128 - sum(block == index for block, _ in gone) for index in range(3)]
    assert len(set(left)) > 1
    assert claim.details["channels_by_block"] == left and claim.details["channels_left"] == [sum(left), 384]
    masked = zeroed(dense.load(), table, EPSILON)
    with torch.inference_mode():
        got, want, before = (m(CALIBRATION.ids).logits for m in (model, masked, whole))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((want - before).abs().max()) > 1e-4
    channel = 3 * 64 if source == "llama" else 2 * 64 + 1
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - channel * len(gone)
    assert claim.format == "edited" and claim.layers == 3 and claim.training_tokens == 0 and claim.sparsity is None
    assert claim.cache_bytes_per_token == 3 * 2 * (2 if source == "llama" else 4) * 16 * 4
    for index, block in enumerate(blocks(model)):
        reads = list(layers)[-1]
        columns = [column for column in range(128) if (index, column) not in gone]
        assert torch.equal(block.get_submodule(reads).weight, blocks(whole)[index].get_submodule(reads).weight[:, columns])


def test_the_loudest_channel_of_a_block_stays(llama: DenseModel, tmp_path: Path) -> None:
    claim = compressed(llama, tmp_path / "out", epsilon=1e6, frequency=None)
    assert claim.details["channels_by_block"] == [1, 1, 1]
    whole, model = llama.load(), edited.load(tmp_path / "out")
    table = neurons(whole, LLAMA).query("NeuronType == 'linear_input'")
    for index, block in enumerate(blocks(model)):
        means = table.query(f"Block == {index}")["AverageMagnitude"].tolist()
        loudest = means.index(max(means))
        assert torch.equal(block.mlp.down_proj.weight[:, 0], blocks(whole)[index].mlp.down_proj.weight[:, loudest])


@pytest.mark.parametrize("frequency", [0.0, 1.5 / 240])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_the_text_hardly_has_lose_their_rows(frequency: float, tied: bool, tmp_path: Path) -> None:
    dense = tiny.saved(make("llama", tie_word_embeddings=tied, eos_token_id=5), tmp_path / "model")
    claim = compressed(dense, tmp_path / "out", epsilon=0.0, frequency=frequency)
    times = Counter(CALIBRATION.ids.flatten().tolist())
    kept = sorted({token for token, count in times.items() if count / 240 > frequency} | {1, 5})
    assert 24 < len(kept) < 256 and 5 not in times, "the end of a text stays though it is not in this one"
    assert claim.details["vocabulary_left"] == [len(kept), 256]
    assert claim.details["token_coverage"] == pytest.approx(sum(times[token] for token in kept) / 240, abs=1e-6)
    assert (claim.details["token_coverage"] == 1) is (frequency == 0)
    assert claim.details["unseen_tokens"] == pytest.approx(sum(count == 1 for count in times.values()) / 240, abs=1e-6)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - 64 * (256 - len(kept)) * (1 if tied else 2)
    gone = [token for token in range(256) if token not in kept]
    ids = torch.tensor([kept[:12], kept[12:24]])
    with torch.inference_mode():
        got, want = (m(ids).logits for m in (model, whole))
        assert torch.equal(model(torch.tensor([[gone[0]]])).logits, model(torch.tensor([[kept[0]]])).logits), "read as the first that stays"
    torch.testing.assert_close(got[..., kept], want[..., kept])
    assert (got[..., gone] == torch.finfo(torch.float32).min).all()


def test_where_nothing_is_quiet_there_is_nothing_to_cut(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no channel has a mean magnitude of 1e-09 or less, and no token is to go") as caught:
        compressed(llama, tmp_path / "one", epsilon=1e-9, frequency=None)
    assert "\n" not in str(caught.value)
    every = Calibration(torch.arange(256).view(4, 64), "every token")
    with pytest.raises(Unsupported, match="no token is to go"):
        compressed(llama, tmp_path / "two", every, epsilon=0.0)
    with pytest.raises(ValueError, match="calibration holds no tokens"):
        compressed(llama, tmp_path / "three", Calibration.none())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        ("gemma", "GemmaForCausalLM has no embedding of the usual class"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        compressed(tiny.saved(make(architecture), tmp_path / "source"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"epsilon": -0.1}, {"epsilon": float("nan")}, {"frequency": 1.0}, {"frequency": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least 0"):
            ContextualPruning(**settings)


def test_the_same_artefact_comes_twice(opt: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(opt, tmp_path / name, epsilon=EPSILON) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

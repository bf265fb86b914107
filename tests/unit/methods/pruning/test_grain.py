"""GRAIN against its formulas written out, on tiny random models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.formats import edited
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.pruning.structured.dimensions import cut, masked, units_of
from slimbench.methods.pruning.structured.grain import GRAIN, Inside
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 20, "batch_size": 2, "length": 16}
VALUE, CHANNEL = {"llama": 64 + 2 * 64, "opt": 65 + 64}, {"llama": 3 * 64, "opt": 65 + 64}
FRAME = {"llama": 16 * 64 * 3, "opt": 16 * 65 * 2}
GROUPS = {"llama": 2, "opt": 4}


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    return request.param, tiny.saved(make(request.param), tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("llama"), tmp_path_factory.mktemp("plain") / "model")


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def kinds_of(model: Any) -> dict[str, Any]:
    return {name: kind for block in anatomy(model) for name, kind in units_of(block).items()}


def inside(model: Any, ratio: float = 0.25, growth: Cubic | None = None) -> Inside:
    return Inside(kinds_of(model), ratio, growth or Cubic(0.0, 1.0, 1, 5), 0.75, 0.5)


def test_importance_is_summed_over_all_inputs_of_a_unit_before_the_absolute_value() -> None:
    """Four query heads of 16 share two value heads: dimension d of group g is read at the places (2 g) 16 + d and (2 g + 1) 16 + d."""
    model = make("llama", num_hidden_layers=1)
    hooks = inside(model)
    ids = CALIBRATION.ids[:3, :12]
    losses = [model(part, labels=part).loss for part in (ids[:2], ids[2:])]
    total: dict[str, Tensor] = {}
    for loss in losses:
        for name in hooks.kinds:
            weight = model.get_submodule(name).weight
            total[name] = total.get(name, 0) + weight.detach() * torch.autograd.grad(loss, weight, retain_graph=True)[0]
        hooks.see(loss)
    name, other = hooks.kinds
    gone = torch.zeros(32, dtype=torch.bool)
    gone[[0, 1, 2, 3, 20]] = True
    hooks.gone[name] = gone
    hooks.gone[other][:32] = True
    hooks.after_backward(0)
    product = total[name].tolist()
    want = []
    for group in range(2):
        kept = (16 - (4, 1)[group]) / 16
        density = math.tanh(kept / 0.5) * math.tanh((32 - 5) / 32 / 0.5)
        for d in range(16):
            places = [(2 * group + head) * 16 + d for head in range(2)]
            want.append(0.25 * density * abs(sum(row[place] for row in product for place in places)))
    torch.testing.assert_close(hooks.averages[name], torch.tensor(want), rtol=1e-4, atol=1e-9)
    channels = 0.25 * math.tanh(0.75 / 0.5) * total[other].sum(0).abs()
    torch.testing.assert_close(hooks.averages[other], channels, rtol=1e-4, atol=1e-9)
    assert not any(bool(found.any()) for found in hooks.sums.values()), "each step begins anew"
    before = hooks.averages[other].clone()
    hooks.after_backward(1)
    torch.testing.assert_close(hooks.averages[other], 0.75 * before)


def test_units_go_by_one_threshold_and_queries_and_keys_with_the_last_of_a_head() -> None:
    model = make("llama", num_hidden_layers=2)
    hooks = inside(model, 0.4)
    generator = torch.Generator().manual_seed(0)
    for name, values in hooks.averages.items():
        values.copy_(torch.rand(values.shape, generator=generator) + (0.4 if "mlp" in name else 0.0))
    first = next(iter(hooks.averages))
    hooks.averages[first][:16] *= 0.1
    whole = 2 * (2 * (16 * 192 + 3072) + 128 * 192)
    assert hooks.whole == whole
    optimizer: Any = None
    order = sorted((float(value), name, index) for name, values in hooks.averages.items() for index, value in enumerate(values))
    best = {max(entry for entry in order if entry[1] == name) for name in hooks.averages}
    for step in range(6):
        hooks.after_step(step, optimizer)
        share = 1 - (1 - min(1.0, max(0.0, step / 4))) ** 3
        left, gone = whole, set()
        for _, name, index in order:
            if left <= whole - round(share * round(0.4 * whole)):
                break
            if (_, name, index) in best:
                continue
            gone.add((name, index))
            group = {(name, 16 * (index // 16) + d) for d in range(16)}
            left -= 192 + (3072 if "mlp" not in name and group <= gone else 0)
        assert {(name, i) for name, mask in hooks.gone.items() for i in mask.nonzero().flatten().tolist()} == gone
    assert bool(hooks.gone[first][:16].all()), "a whole head goes"
    held = {name: mask.clone() for name, mask in hooks.gone.items()}
    for values in hooks.averages.values():
        values.neg_()
    hooks.growth = Cubic(0.0, 1.0, 1, 7)
    hooks.after_step(6, optimizer)
    assert all(bool((hooks.gone[name] >= mask).all()) for name, mask in held.items()), "what has gone stays so"


def test_the_cut_model_computes_what_the_masked_one_did(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    model = dense.load()
    kinds = kinds_of(model)
    generator = torch.Generator().manual_seed(2)
    gone = {name: torch.rand(kind.count, generator=generator) < 0.3 for name, kind in kinds.items()}
    names = list(gone)
    gone[names[0]][16:32] = True
    gone[names[2]].zero_()
    with torch.no_grad():
        with masked(kinds, gone):
            want = model(CALIBRATION.ids).logits
        before = model.num_parameters()
        cut(model, kinds, gone)
        got = model(CALIBRATION.ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    lost = 0
    for name, mask in gone.items():
        if "attn" in name:
            groups = int(mask.view(GROUPS[architecture], 16).all(1).sum())
            lost += VALUE[architecture] * int(mask.sum()) + FRAME[architecture] * groups
        else:
            lost += CHANNEL[architecture] * int(mask.sum())
    assert model.num_parameters() == before - lost
    (tmp_path / "out").mkdir()
    save_dense(model, tmp_path / "out")
    with torch.inference_mode():
        read = edited.load(tmp_path / "out")
        torch.testing.assert_close(read(CALIBRATION.ids).logits, got, rtol=1e-6, atol=1e-6)
        alone = read.generate(CALIBRATION.ids[:1, :8], max_new_tokens=4, do_sample=False)
        whole = read.generate(CALIBRATION.ids[:1, :8], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(alone, whole)


def test_the_artefact_has_the_parameters_that_were_asked_for(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(GRAIN(**FEW), dense, tmp_path / "out")
    before, model = dense.load().num_parameters(), edited.load(tmp_path / "out")
    whole = 3 * (GROUPS[architecture] * (16 * VALUE[architecture] + FRAME[architecture]) + 128 * CHANNEL[architecture])
    lost = before - model.num_parameters()
    assert (
        round(0.25 * whole) <= lost < round(0.25 * whole) + VALUE[architecture] + FRAME[architecture] and claim.parameters == before - lost
    )
    heads = [count for counts in claim.details["dimensions_by_head"].values() for count in counts]
    empty = heads.count(0)
    values = VALUE[architecture] * (16 * len(heads) - sum(heads)) + FRAME[architecture] * empty
    assert lost == values + CHANNEL[architecture] * (3 * 128 - sum(claim.details["channels_by_block"]))
    assert len(heads) == 3 * GROUPS[architecture] and 0 < sum(heads) < 16 * len(heads)
    assert claim.cache_bytes_per_token == (len(heads) - empty) * 2 * 16 * 4
    assert claim.teacher == "the model that the pipeline began with" and claim.layers == 3
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_hidden_states_pull_at_weights_and_not_at_the_choice(llama: DenseModel) -> None:
    ids, sums, gradients = CALIBRATION.ids[:2, :12], [], []
    for hidden in (0.0, 5.0):
        model = llama.load().requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        hooks = inside(model)
        GRAIN(hidden=hidden).objective(model, hooks, llama)(ids).backward()
        sums.append(torch.cat([found.flatten() for found in hooks.sums.values()]))
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad)
    assert torch.equal(sums[0], sums[1]) and bool(sums[0].any())
    assert not torch.allclose(gradients[0], gradients[1])


def test_other_decoders_and_settings_are_refused_in_one_line(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts in one tensor") as caught:
        GRAIN(**FEW).compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match=r"parameters are fewer than the .* that 6 layers take at least"):
        GRAIN(**FEW, ratio=0.99).compress(llama, CALIBRATION, tmp_path)
    settings: list[dict[str, Any]] = [{"begin": 0.9}, {"memory": 1.0}, {"density": 0.0}, {"hidden": -1.0}, {"ratio": 0.0}]
    for wrong in settings:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GRAIN(**wrong)


def test_the_same_artefact_comes_twice_and_after_an_interruption(llama: DenseModel, tmp_path: Path) -> None:
    def stop(done: float, total: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    method = GRAIN(**FEW | {"steps": 12, "checkpoint_every": 3})
    first, second = (compressed(method, llama, tmp_path / name) for name in ("one", "two"))
    assert first == second
    kept = replace(llama, checkpoints=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        compressed(method, replace(kept, progress=stop), tmp_path / "broken")
    compressed(method, kept, tmp_path / "resumed")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "resumed")]
    assert files[0] == files[1] == files[2]

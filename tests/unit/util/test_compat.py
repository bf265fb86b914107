"""A probe for each thing that is used of a library without its promise: it exists, and it does what is relied on.

A release that fails here is kept out by the upper bounds of pyproject until `slimbench.util.compat` fits it.
"""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from slimbench.util import compat
from slimbench.util.compat import torch as private
from tests.support import tiny
from tests.support.paths import ROOT

DISTRIBUTIONS = {"inductor": "torch", "profiler": "torch", "wandb_workspaces": "wandb-workspaces"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("module", sorted(path.stem for path in Path(compat.__path__[0]).glob("[!_]*.py")))
def test_a_library_of_which_private_names_are_used_has_an_upper_bound(module: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"]))
    name = DISTRIBUTIONS.get(module, module)
    found = [requirement for requirement in required if requirement.name == name]
    assert found
    for requirement in found:
        assert any(specifier.operator == "<" for specifier in requirement.specifier), requirement
        assert requirement.specifier.contains(version(name), prereleases=True), requirement


def test_int8_products_are_exact() -> None:
    left, right = integers(24, 32), integers(32, 16, seed=1)
    product = private.int_mm(left, right)
    assert product.dtype is torch.int32 and torch.equal(product, (left.long() @ right.long()).int())


def test_scaled_products_of_8_bit_floats_take_a_scale_for_each_row_and_column() -> None:
    left, right = random(32, 32).to(torch.float8_e4m3fn), random(16, 32, seed=1).to(torch.float8_e4m3fn)
    rows, columns = random(32, 1, seed=2).abs(), random(1, 16, seed=3).abs()
    try:
        product = private.scaled_mm(left, right.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"needs a card: {str(error).splitlines()[0]}")
    torch.testing.assert_close(product.float(), (left.float() @ right.float().t()) * rows * columns, rtol=2e-2, atol=2e-2)


def test_products_with_8_bit_weights_rescale_each_row() -> None:
    inputs, codes = random(3, 32).bfloat16(), integers(16, 32, seed=1)
    scales = random(16, seed=2).abs().bfloat16()
    product = private.weight_int8pack_mm(inputs, codes, scales)
    expected = inputs.float() @ (codes.float() * scales.float()[:, None]).t()
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=0.5)


def test_products_with_4_bit_weights_read_codes_less_8_times_the_scale_plus_the_offset() -> None:
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0))
    steps = random(2, 32, 2, seed=1).bfloat16()
    inputs = random(3, 64, seed=2).bfloat16()
    product = private.weight_int4pack_mm_cpu(inputs, private.pack_int4_cpu(codes.to(torch.int32), 1), 32, steps)
    scales, offsets = (steps[..., index].t().float().repeat_interleave(32, 1) for index in (0, 1))
    expected = inputs.float() @ ((codes - 8) * scales + offsets).t()
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=0.6)
    assert private.pack_int4 and private.weight_int4pack_mm, "of a card, where tests/gpu holds them"


def test_operators_inside_a_redispatched_one_are_seen() -> None:
    class Seen(private.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.name())
            if function.name() == "slimbench_probe::composed":
                with self:
                    return private.redispatch(function, "cpu", args, kwargs or {})
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    library = torch.library.Library("slimbench_probe", "DEF")
    library.define("composed(Tensor a, Tensor b) -> Tensor")
    library.impl("composed", lambda a, b: torch.mm(a, b) + 1, "CPU")
    left, right = random(2, 3), random(3, 2, seed=1)
    with Seen():
        product = torch.ops.slimbench_probe.composed(left, right)
    assert names[:2] == ["slimbench_probe::composed", "aten::mm"]
    torch.testing.assert_close(product, left @ right + 1)


def test_leaves_of_nested_arguments_are_found() -> None:
    assert list(private.tree_iter(([1, {"a": 2}], (3,)))) == [1, 2, 3]


def test_what_a_module_holds_is_parted_into_buffers_and_attributes() -> None:
    module = nn.BatchNorm1d(2)
    module.note = held = object()  # type: ignore[assignment]
    assert set(private.buffers(module)) == {"running_mean", "running_var", "num_batches_tracked"}
    attributes = private.attributes(module)
    assert any(value is held for value in attributes)
    assert not any(value is owned for value in attributes for owned in (*module.parameters(), *module.buffers()))


def test_the_compiler_shows_a_pass_its_graph_and_takes_the_options_of_a_step() -> None:
    from torch._inductor import config  # noqa: TID251 - whether it has the options

    from slimbench.util.compat import inductor

    assert hasattr(config, "realize_opcount_threshold") and hasattr(config.triton, "cudagraphs")

    class Names(inductor.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            names.update(inductor.operator_name(node) for node in graph.nodes)

        def uuid(self) -> bytes:
            return inductor.get_hash_for_files((__file__,)) + os.urandom(8)  # no graph that was kept by an earlier run

    names: set[str | None] = set()
    options = inductor.pass_options(Names()) | inductor.step_options(8, cuda_graphs=False)
    weight, inputs = random(4, 4), random(3, 4, seed=1)
    step = torch.compile(lambda x: torch.mm(x, weight).relu(), fullgraph=True, options=options)
    torch.testing.assert_close(step(inputs), (inputs @ weight).relu())
    assert {"mm", "relu", None} <= names
    assert inductor.pass_options(None) == {}
    assert torch.compiler.skip_all_guards_unsafe([object()] * 2) == [False, False]


def test_a_model_says_how_it_attends_and_what_is_not_moved(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from slimbench.util.compat import transformers as of

    model = tiny.save_model(tmp_path).load()
    assert of.attention_implementation(model) == "sdpa"
    model.set_attn_implementation("eager")
    assert of.attention_implementation(model) == "eager"
    assert "past_key_values" in of.keys_left_in_place(model)
    assert of.blocks_kept_whole(model) == {"LlamaDecoderLayer"}
    assert of.attends_through_interface(model)
    state_space = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8))
    assert not of.attends_through_interface(state_space)


def test_a_weight_that_is_kept_elsewhere_has_a_hook_that_brings_it_in() -> None:
    from accelerate.hooks import attach_align_device_hook

    from slimbench.util.compat.accelerate import device_hook

    linear = nn.Linear(4, 4)
    assert device_hook(linear) is None
    weights = {name: tensor.detach().clone() for name, tensor in linear.state_dict().items()}
    attach_align_device_hook(linear, torch.device("cpu"), offload=True, weights_map=weights)
    hook = device_hook(linear)
    assert linear.weight.is_meta and hook.offload and not hook.place_submodules and not hook.offload_buffers
    hook.pre_forward(linear)
    assert torch.equal(linear.weight, weights["weight"])
    hook.post_forward(linear, None)
    assert linear.weight.is_meta and hook.weights_map["weight"] is not None


def test_a_quantized_cache_keeps_its_history_where_it_is_looked_for() -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import LlamaConfig
    from transformers.cache_utils import QuantizedCache

    from slimbench.util.compat.transformers import quantized_states

    config = LlamaConfig(num_hidden_layers=1)
    cache = QuantizedCache("quanto", config, nbits=4, axis_key=0, axis_value=0, q_group_size=32, residual_length=8)
    cache.update(random(1, 2, 40, 32), random(1, 2, 40, 32, seed=1), 0)
    keys, values = quantized_states(cache.layers[0])
    assert tuple(keys.shape) == tuple(values.shape) == (1, 2, 40, 32)


def test_layers_whose_hessian_has_no_inverse_are_counted(tmp_path: Path) -> None:
    """They were recorded as 0 whatever happened, since the modifier forgets them as it ends."""
    pytest.importorskip("llmcompressor")
    from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT
    from slimbench.methods.quantization.weight.gptq import GPTQ

    dense, calibration = tiny.save_model(tmp_path / "dense", num_hidden_layers=1), tiny.tokens()
    calibration.ids.zero_()
    for method, expected in ((GPTQ(group_size=32, dampening=1e-12), 7), (GPTQ(group_size=32), 0)):
        (out := tmp_path / str(expected)).mkdir()
        assert method.compress(dense, calibration, out).details["layers_rounded_without_hessian"] == expected
    (out := tmp_path / "sparse").mkdir()
    assert SparseGPT(dampening=1e-12).compress(dense, calibration, out).details["failed_inverses"] > 0


def test_a_dashboard_is_shown_as_it_is_sent() -> None:
    pytest.importorskip("wandb_workspaces")
    from slimbench.leaderboard.tracking.dashboard import workspace
    from slimbench.util.compat.wandb_workspaces import definition

    assert definition(workspace("team", "project"))["spec"]


def test_a_prepared_data_set_is_found_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from slimbench.util.compat.datasets import cached_hash

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert cached_hash("org/Some-Set", "small", {}) is None
    prepared = tmp_path / "org___some-set" / "small" / "0.0.0" / "c0ffee"
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").write_text('{"config_name": "small"}')
    assert cached_hash("org/Some-Set", "small", {}) == cached_hash("org/Some-Set", None, {}) == "c0ffee"
    assert cached_hash("org/Some-Set", "large", {}) is None
    assert cached_hash("org/Some-Set", "small", {"data_files": "part.json"}) is None

"""Configuration: what is accepted, and that each mistake is one line with the nearest valid choice."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from slimbench.harness.config.compose import jobs, resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entries, entry
from slimbench.harness.config.sources import choice, choice_path, shipped, shipped_method
from slimbench.harness.launch.sweep import plan
from slimbench.harness.run.cell import make_cell, step_label
from slimbench.harness.schema.identity import Stage
from slimbench.methods.base import ModelShape, Unsupported


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle=smollm2-135m", "model"),
        ("method=gtpq", "did you mean 'gptq'"),
        ("model=smolm2-135m", "did you mean 'smollm2-135m'"),
        ("suite.limt=3", "did you mean 'suite.limit'"),
        ("suite.limit=many", "suite.limit"),
        ("suite.limit=0", "suite.limit"),
        ("calibration_sample=3", "did you mean 'calibration_samples'"),
        ("method.dense.bits=4", "method.dense"),
        ("on_existing=kep", "did you mean 'keep'"),
        ("model.dtype=bfloat61", "did you mean 'bfloat16'"),
        ("speed.grid=[]", "speed.grid"),
        ("method=[gptq", "cannot read the override"),
        ("method=[gptq,rtn-4bit]", "cannot follow 'gptq'"),
        ("+suite.colour=red", "unknown key 'suite.colour'"),
        ("model=custom", "model.name"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_choice(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_cell(resolve([override]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_method_settings_are_checked_for_name_type_and_range() -> None:
    for override, expected in (
        ("method.rtn-4bit.bits=5", "method.rtn-4bit.bits"),
        ("+method.rtn-4bit.bit=4", "did you mean 'bits'"),
        ("method.rtn-4bit.group_size=many", "method.rtn-4bit.group_size"),
    ):
        with pytest.raises(ConfigError, match="rtn-4bit") as caught:
            resolve(["method=rtn-4bit", override])
        assert expected in str(caught.value)


def test_calibration_on_the_test_text_is_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match="test text"):
        resolve(["method=gptq", f"suite.corpus=file:{text}", f"calibration=file:{text}"])


@pytest.mark.parametrize("group", ["model", "method", "engine", "suite", "speed", "device"])
def test_every_shipped_choice_composes(group: str) -> None:
    names = [name for name in shipped(group) if (group, name) != ("model", "custom")]
    words = [entry(name).pipeline for name in names] if group == "method" else names
    found = jobs([f"{group}={','.join(words)}"])
    assert len(found) == len(names) and all(config.pipeline for _, config in found)
    assert resolve(["model=custom", "model.name=x", "model.source=hf:a/b"]).pipeline


def test_every_shipped_experiment_composes() -> None:
    for name in shipped("experiment"):
        assert len(jobs([f"experiment={name}"])) > 1


@pytest.mark.parametrize("name", ["attention", "caches", "early_exit", "linear", "speculation"])
def test_every_cell_of_an_experiment_of_policies_and_what_its_comments_say_can_be_run(name: str) -> None:
    lines = choice_path("experiment", name).read_text().splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("# "))
    said = [shlex.split(command) for command in re.findall(r"`slimbench sweep ([^`]+)`", comment)]
    assert len(said) >= {"attention": 0, "caches": 2, "early_exit": 2, "linear": 1, "speculation": 2}[name]
    for words in ([f"experiment={name}"], *said):
        assert words[0] == f"experiment={name}" and jobs(words)


def test_budgets_of_the_caches_are_those_that_all_of_them_take() -> None:
    with pytest.raises(ConfigError, match="budget must be at least 65 for 'snapkv', not 64"):
        resolve(["experiment=caches", "method=snapkv", "settings.budget=64"])
    cells = [config for _, config in jobs(["experiment=caches"])]
    assert {cell.pipeline[0].settings["budget"] for cell in cells} == {96, 128, 256, 512} and len(cells) == 36
    assert all(cell.suite.retrieval and min(cell.suite.retrieval.lengths) >= 2 * 512 for cell in cells), "each lets many tokens leave"


def test_experiments_of_experiments_are_all_of_their_cells() -> None:
    parts = ["draws", "fitted", "once"]
    alone = [jobs([f"experiment=equal_grid/{part}"]) for part in parts]
    whole = jobs(["experiment=equal_grid"])
    assert [job for job, _ in whole] == [job for part in alone for job, _ in part]
    assert [job for job, _ in jobs([f"experiment={','.join(f'equal_grid/{part}' for part in parts)}"])] == [job for job, _ in whole]
    assert {job[-1] for job, _ in whole} == {f"experiment=equal_grid/{part}" for part in parts}, "each cell can be run by its own words"
    few = jobs(["experiment=equal_grid", "method=hqq", "calibration_seed=7"])
    assert {(config.pipeline[0].name, config.calibration.seed) for _, config in few} == {("hqq", 7)}


def test_an_experiment_that_sweeps_over_itself_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    for name, other in (("one", "two"), ("two", "one")):
        text = f"# @package _global_\nhydra: {{sweeper: {{params: {{experiment: {other}}}}}}}\n"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^experiment=one sweeps over itself$"):
        jobs(["experiment=one"])


def test_a_choice_that_an_experiment_gives_as_a_value_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nengine: compiled\n")
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^an experiment chooses 'compiled' in its defaults: write '- override /engine: compiled' there$"
    ):
        jobs(["experiment=mine"])


def test_the_equal_grid_experiment_has_each_method_on_each_grid_that_it_has(tmp_path: Path) -> None:
    found = plan(["experiment=equal_grid", f"results={tmp_path}"], several=True)
    cells: dict[tuple[str, float, str], set[int]] = {}
    refused: dict[str, str] = {}
    shape = ModelShape("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, True)
    for planned in found.cells:
        (method,) = planned.cell.methods
        bits = getattr(method, "bits", getattr(method, "average_bits", 16))
        assert planned.identity.suite == "screen" and planned.stages[0] is Stage.COMPRESS and Stage.SPEED not in planned.stages
        assert getattr(method, "group_size", 64) == 64
        try:
            method.check(shape)
        except Unsupported as reason:
            refused[planned.identity.pipeline] = str(reason)
            continue
        cells.setdefault((method.name, bits, method.weight_grid), set()).add(planned.config.calibration.seed)
    symmetric, offsets = (
        ("symmetric, min-max", "symmetric, searched", "symmetric, learned"),
        ("with offsets, min-max", "with offsets, learned"),
    )
    four = {key: seeds for key, seeds in cells.items() if key[1] == 4}
    assert four == {
        **{("rtn", 4, grid): {0} for grid in (*symmetric[:2], offsets[0])},
        **{(name, 4, grid): {0, 1, 2} for name in ("gptq", "gptaq") for grid in (*symmetric[:2], offsets[0])},
        **{("awq", 4, grid): {0, 1, 2} for grid in (*symmetric[:2], offsets[0])},
        **{("awq-clip", 4, grid): {0, 1, 2} for grid in (symmetric[1], "with offsets, searched")},
        **{("signround", 4, grid): {0, 1, 2} for grid in (symmetric[0], symmetric[2], offsets[1])},
        **{("mixed-precision", 4, grid): {0} for grid in (*symmetric[:2], offsets[0])},
        **{("omniquant", 4, grid): {0} for grid in (symmetric[2], offsets[1])},
        ("hqq", 4, "with offsets, searched"): {0},
    }
    assert {(name, grid) for name, bits, grid in cells if bits == 3} == {
        *((name, symmetric[1]) for name in ("rtn", "gptq", "gptaq", "awq", "awq-clip", "mixed-precision")),
        *((name, symmetric[2]) for name in ("signround", "omniquant")),
    }
    assert set(refused) == {"hqq(symmetric=True)", "hqq(symmetric=True,clip=False)", "omniquant(symmetric=True,clip=False)"}
    assert all("fits" in reason for reason in refused.values())
    assert len(found.cells) == 63 and sum(planned.identity.pipeline == "dense" for planned in found.cells) == 1


def test_the_quantization_experiment_has_every_technique_that_its_engine_loads() -> None:

    names = choice("experiment", "quantization_all")["hydra"]["sweeper"]["params"]["method"].split(",")
    swept = [choice("method", name.strip())["_target_"] for name in names]
    offered = {item.name: item for item in entries() if item.method.family == "quantization" and "transformers" in item.engines}
    targets = {f"{type(item.method).__module__}.{type(item.method).__qualname__}": name for name, item in offered.items()}
    assert [name for target, name in targets.items() if target not in swept] == []


def test_sweep_jobs_are_the_product_and_the_command_line_wins_over_the_experiment() -> None:
    found = jobs(["experiment=demo", "method=rtn-4bit,dense", "seed=0,1"])
    assert len(found) == 4
    assert {config.pipeline[0].name for _, config in found} == {"rtn-4bit", "dense"}


def test_pipeline_order_is_the_order_given() -> None:
    config = resolve(["method=[magnitude,rtn-4bit]"])
    assert [step.name for step in config.pipeline] == ["magnitude", "rtn-4bit"]


def test_a_label_names_only_what_differs_from_the_shipped_settings() -> None:
    plain, changed = resolve(["method=rtn-4bit"]), resolve(["method=rtn-4bit", "method.rtn-4bit.group_size=32"])
    assert step_label(plain.pipeline[0]) == "rtn-4bit"
    assert step_label(changed.pipeline[0]) == "rtn-4bit(group_size=32)"


def test_keys_follow_what_defines_the_work_and_nothing_else(overrides: list[str]) -> None:
    base = make_cell(resolve([*overrides, "method=rtn-4bit"])).identity.keys

    def keys(*more: str):  # type: ignore[no-untyped-def]
        return make_cell(resolve([*overrides, "method=rtn-4bit", *more])).identity.keys

    assert keys("results=elsewhere", "limits.wall_s=9", "suite.batch_tokens=7", "calibration_samples=5") == base
    assert keys("method.rtn-4bit.group_size=32").compress != base.compress
    other = keys("suite.seqlen=32")
    assert (other.compress, other.speed) == (base.compress, base.speed)
    assert other.quality != base.quality
    assert keys("speed.min_repeats=3").speed != base.speed
    assert keys("model.dtype=bfloat16").compress != base.compress


def test_the_reference_shares_everything_but_the_method(overrides: list[str]) -> None:
    cell = make_cell(resolve([*overrides, "method=rtn-4bit"]), (*overrides, "method=rtn-4bit"))
    reference = cell.reference()
    assert reference.config.is_reference
    assert reference.identity.keys == cell.identity.reference
    assert reference.command.endswith("method=dense")
    assert "rtn-4bit" not in reference.command


def test_settings_are_given_to_every_step_that_has_them() -> None:
    config = resolve(["method=[magnitude,rtn-4bit]", "settings.group_size=32"])
    assert [step.settings.get("group_size") for step in config.pipeline] == [None, 32]
    assert config == resolve(["method=[magnitude,rtn-4bit]", "method.rtn-4bit.group_size=32"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=nf4", "settings.bits=3"], "settings.bits: 'nf4' has no setting 'bits'; choices: double_quant"),
        (["method=rtn-4bit", "+settings.symetric=true"], "did you mean 'symmetric'"),
        (["method=rtn-4bit", "settings.bits=5"], "method.rtn-4bit.bits: 5 is no valid choice"),
        (["method=rtn-4bit", "settings.group_siz=32"], "did you mean 'settings.group_size'"),
    ],
)
def test_shared_settings_that_no_step_has_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_sweep_over_shared_settings_is_the_product_and_each_cell_has_its_own_key(overrides: list[str]) -> None:
    found = jobs([*overrides, "method=rtn-4bit,rtn-8bit", "settings.bits=2,3", "settings.group_size=32,64"])
    cells = [make_cell(config, tuple(job)) for job, config in found]
    assert len({cell.identity.keys.compress for cell in cells}) == 4  # the two YAMLs differ in nothing else
    reference = cells[0].reference()
    assert reference.identity.keys == cells[-1].identity.reference and "settings" not in reference.command


def test_a_folder_of_ones_own_offers_choices_beside_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, transformers = tmp_path / "it's [my], own folder", "slimbench.harness.engines.transformers.TransformersEngine"
    for group, name, text in (
        ("method", "mine", "# @package method.mine\n_target_: slimbench.methods.quantization.weight.rtn.RTN\nbits: 3\ngroup_size: 32\n"),
        ("suite", "mine", "name: mine\nseqlen: 32\ncorpus: [lee-news]\n"),
        (
            "engine",
            "mine",
            f"name: mine\n_target_: {transformers}\nloaders: {{packed: slimbench.methods.formats.packed.load}}\n",
        ),
    ):
        (own / group).mkdir(parents=True)
        (own / group / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("SLIMBENCH_CONF", str(own))
    config = resolve(["method=mine", "suite=mine", "engine=mine"])
    assert (config.pipeline[0].settings["bits"], config.suite.seqlen, config.engine.name) == (3, 32, "mine")
    assert [c.pipeline[0].name for _, c in jobs(["method=mine,dense"])] == ["mine", "dense"]
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        resolve(["method=mime"])
    (own / "method" / "gptq.yaml").write_text("# @package method.gptq\n_target_: slimbench.methods.dense.Dense\n")
    with pytest.raises(ConfigError, match="'gptq' is a name of slimbench's own"):
        resolve(["method=mine"])
    (own / "method" / "gptq.yaml").unlink()
    for content, reason in (
        ("", "holds no settings"),
        ("# @package method.bad\nbits: 3\n", "no '_target_'"),
        ("bits: [3\n", "is no YAML"),
        ("3\n", "holds no settings"),
    ):
        (own / "method" / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=reason):
            shipped_method("bad")
    (own / "method" / "bad.yaml").write_text("_target_: slimbench.methods.dense.Dense\n")
    for ask in (lambda: resolve(["method=bad"]), lambda: jobs(["method=bad,dense"]), lambda: entry("bad")):
        with pytest.raises(ConfigError, match=r"method/bad\.yaml: the first line must be `# @package method\.bad`"):
            ask()
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="SLIMBENCH_CONF: no folder"):
        resolve(["method=dense"])

"""Composing: what slimbench merges equals what Hydra composes, and 500 cells take a second or two."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimbench.harness.config import compose
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.overrides import products, read
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sources import CONF_DIR, read_yaml, shipped, shipped_method

LISTS = 200

OWN = {
    "method/derived.yaml": (
        "# @package method.derived\ndefaults: [derived_base@_here_, _self_]\nbits: 3\n"
        "_target_: slimbench.methods.quantization.weight.rtn.RTN\n"
    ),
    "method/derived_base.yaml": "group_size: 32\nsymmetric: false\n",
    "model/sized.yaml": ("name: sized-${seed}\nsource: random\nshape: {hidden_size: 64, layers: [1, 2]}\nparameters: null\n"),
    "suite/global.yaml": "# @package _global_\nsuite: {name: global, windows: 3}\nlimits: {wall_s: 5}\n",
    "speed/lists.yaml": "name: lists\ngrid: [{batch: [1, 2], prompt: 8}]\nbudget_s: ${limits.wall_s}\n",
    "experiment/own.yaml": (
        "# @package _global_\ndefaults:\n  - override /model: sized\n  - override /method: [magnitude, rtn-4bit]\n"
        "  - override /suite: local\n"
        "suite: {windows: 2, corpus: [a, b]}\nmethod: {rtn-4bit: {bits: 8}}\nsettings: {group_size: 128}\n"
        "hydra:\n  sweeper:\n    params:\n      seed: 1,2\n      suite.seqlen: 16,32\n"
    ),
    "experiment/nested.yaml": "# @package _global_\ndefaults: [own, {override /speed: lists}, _self_]\nseed: 9\nlimits: {wall_s: 7}\n",
    "experiment/wrong.yaml": "# @package _global_\ndefaults: [{override /suite: nothing}]\n",
}


@pytest.fixture(scope="module")
def own_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of choices of one's own, with defaults lists, other packages and interpolations."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def stated_conf(tmp_path_factory: pytest.TempPathFactory, own_conf: Path) -> Path:
    """The shipped and the own choices in one folder for Hydra alone, every default in a file: of methods in theirs, of the rest first."""
    folder = tmp_path_factory.mktemp("stated")
    for source in (CONF_DIR, own_conf):
        for path in source.rglob("*.yaml"):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source == CONF_DIR and path.parent.name == "method":
                target.write_text(f"# @package method.{path.stem}\n{yaml.safe_dump(shipped_method(path.stem))}")
            else:
                target.write_text(path.read_text())
    defaults = RunConfig.defaults() | {name: part.defaults() for name, part in RunConfig.parts().items() if name in compose._HELD}
    (folder / "schema.yaml").write_text(yaml.safe_dump(defaults))
    main = folder / "config.yaml"
    main.write_text(main.read_text().replace("defaults:\n", "defaults:\n  - schema\n"))
    base = folder / "method" / "derived_base.yaml"  # the class behind `derived` has one more setting
    base.write_text(base.read_text() + "head_bits: null\n")
    return folder


@pytest.fixture
def own(own_conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CONF", str(own_conf))


def by_hydra(conf: Path, overrides: Sequence[str]) -> Any:
    """What Hydra itself composes, or None where it refuses."""
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(conf), version_base="1.3"):
        try:
            return OmegaConf.to_container(_hydra_compose(overrides), resolve=True, throw_on_missing=True)
        except Exception:
            return None


def _hydra_compose(overrides: Sequence[str], **kwargs: Any) -> Any:
    from hydra import compose as hydra_compose

    return hydra_compose("config", overrides=list(overrides), **kwargs)


def by_slimbench(overrides: Sequence[str], cells: Sequence[Sequence[str]]) -> Any:
    with compose._hydra() as loader:
        try:
            composer = compose._Composer([read(cell, loader) for cell in cells])
            return composer.compose(read(overrides, loader))
        except ConfigError as error:
            assert "\n" not in str(error)
            return None


class Lists:
    """Random override lists, each key once."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        plain = [name for name in shipped("method") if name not in ("derived", "derived_base")]
        self.choices = {
            "model": ["sized", "smollm2-135m", "opt-125m", "random-135m", "llama2-7b"],
            "method": [
                *self.random.sample(plain, 30),
                "derived",
                "[magnitude,rtn-4bit]",
                "[sparsegpt-2of4,gptq]",
                "[gptq]",
                "gtpq",
                "null",
            ],
            "engine": ["transformers", "compiled", "vllm", "openvino"],
            "suite": ["quick", "local", "paper", "global"],
            "speed": ["quick", "standard", "lists"],
            "device": ["cpu", "cuda"],
            "experiment": ["own", "nested", "demo", "bits", "paper/awq", "paper/gptq"],
        }
        self.values = {
            "suite.windows": ["1", "7", "null", "many", "${seed}", "'4'"],
            "suite.corpus": ["lee-news", "[a,b]", "'file:/no/ü.txt'", "[]", "['x, y','it\\'s']"],
            "suite.tasks": ["[piqa,arc]", "null"],
            "suite": ["{windows: 5, corpus: [z]}", "3"],
            "speed.grid": ["[{batch: [1,4], prompt: 16}]", "[]"],
            "speed.grid.0.batch": ["2", "[3,4]"],
            "speed.budget_s": ["${limits.wall_s}", "2.5", "1e3"],
            "settings.bits": ["3", "null"],
            "settings.alpha": ["0.5"],
            "method.rtn-4bit.bits": ["3", "2"],
            "method.rtn-4bit.group_size": ["null", "32"],
            "method.gptq.dampening": ["0.1"],
            "method.derived.head_bits": ["8"],
            "method.rtn-4bit": ["{bits: 2}", "null"],
            "method.magnitude": ["null"],
            "method.own._target_": ["slimbench.methods.dense.Dense"],
            "model.name": ["mine", "'a b'", '"x=y"'],
            "model.source": ["'hf:a/b'", "file:/tmp/x"],
            "model.shape": ["{hidden_size: 8}", "null"],
            "model.shape.layers": ["[3]"],
            "engine.environment": ["vllm", "null"],
            "device.threads": ["2"],
            "on_existing": ["stale"],
            "model.revision": ["abc", "null", "true", "007"],
            "seed": ["3", "-1", "${suite.windows}"],
            "results": ["runs/${model.name}", "out"],
            "limits.wall_s": ["9", "${calibration_samples}"],
            "limits": ["{memory_gb: 4}"],
            "calibration": ["lee-news", "null"],
            "stages": ["[speed]", "[]"],
        }
        self.wrong = ["model=no-such", "model=custom", "method=gtpq", "method=null", "experiment=wrong", "hydra_free=1", "suite.limt=3"]
        self.wrong += ["limits.wall_s=${nothing.there}", "suite.windows.x=1", "~suite.none", "+suite.windows=1", "experiment=null"]
        self.odd = [
            "~method",
            "+method=dense",
            "~model=smollm2-135m",
            "+experiment/paper=gptq",
            "model@other=opt-125m",
            "+new.key={a: [1]}",
        ]

    def one(self) -> list[str]:
        """Choices and values in a random order, most of them legal."""
        pick, texts = self.random, []
        for group in pick.sample(sorted(self.choices), pick.choices(range(5), (1, 3, 4, 3, 1))[0]):
            texts.append(f"{group}={pick.choice(self.choices[group])}")
        methods = next((text for text in texts if text.startswith("method=")), "")
        for key in pick.sample(sorted(self.values), pick.choices(range(6), (2, 3, 4, 3, 2, 1))[0]):
            prefix = pick.choices(("", "++", "+", "~"), (20, 2, 1, 1))[0]
            step = key.split(".")[1] if key.startswith("method.") else ""
            if step == "own":
                prefix = "+"
            elif step not in methods and pick.random() < 0.9:
                continue
            texts.append(f"~{key}" if prefix == "~" else f"{prefix}{key}={pick.choice(self.values[key])}")
        if pick.random() < 0.3:
            texts.append(pick.choice(self.wrong if pick.random() < 0.5 else self.odd))
        pick.shuffle(texts)
        return list({text.partition("=")[0].lstrip("+~"): text for text in texts}.values())

    def sweep(self) -> list[str]:
        """Such a list with several values for one or two keys."""
        texts = self.one()
        for key in self.random.sample(["model", "method", "engine", "seed", "suite.windows", "settings.bits", "suite.corpus"], 2):
            offered = self.choices.get(key) or self.values[key]
            texts = [t for t in texts if not t.lstrip("+~").startswith(f"{key}=")]
            texts.append(f"{key}={','.join(self.random.sample(offered, 2))}")
        return texts


def is_ours_alone(overrides: Sequence[str]) -> bool:
    """Whether slimbench refuses what Hydra accepts: a setting of a method beside `settings.` of the same name."""
    return any(o.lstrip("+").startswith("method.") for o in overrides) and any("settings" in o or "experiment" in o for o in overrides)


def test_200_random_lists_compose_to_what_hydra_composes(own: None, stated_conf: Path) -> None:
    lists, refused = Lists(seed=7), 0
    for _ in range(LISTS):
        overrides = lists.one()
        ours, theirs = by_slimbench(overrides, [overrides]), by_hydra(stated_conf, overrides)
        if ours is None and theirs is not None and is_ours_alone(overrides):
            continue
        assert ours == theirs, f"{overrides}: {ours and theirs and [(k, ours[k], theirs[k]) for k in ours if ours[k] != theirs.get(k)]}"
        refused += ours is None
    assert LISTS / 10 < refused < LISTS * 2 / 3  # both kinds are there


def test_the_cells_of_random_sweeps_are_those_of_hydras_sweeper(own: None, stated_conf: Path) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    lists, compared, parser = Lists(seed=11), 0, OverridesParser.create()
    for _ in range(12):
        overrides = lists.sweep()
        (theirs,) = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
        ours = [[str(o.input_line) for o in cell] for cell in products(read(overrides))]
        assert ours == theirs
        with compose._hydra() as loader:
            read_cells = [read(cell, loader) for cell in ours]
            composer = compose._Composer(read_cells)
            composed = []
            for cell in read_cells:
                try:
                    composed.append(composer.compose(cell))
                except ConfigError:
                    composed.append(None)
        for cell, found in zip(ours, composed, strict=True):
            expected = by_hydra(stated_conf, cell)
            if found is None and expected is not None and is_ours_alone(cell):
                continue
            assert found == expected, cell
            compared += found is not None
    assert compared > 20


def test_what_an_experiment_sweeps_over_and_the_command_line_are_multiplied(own: None) -> None:
    found = [
        job for job, _ in compose.jobs(["experiment=own", "seed=5", "limits.wall_s=1,2", "~method.magnitude", "settings.group_size=null"])
    ]
    assert len(found) == 4 and all("seed=5" in job for job in found)
    assert [(job[1], job[3]) for job in found] == [
        (f"suite.seqlen={n}", f"limits.wall_s={s}") for n, s in itertools.product((16, 32), (1, 2))
    ]


def test_a_cell_shares_no_container_with_another(own: None) -> None:
    first, second = (config for _, config in compose.jobs(["method=rtn-4bit", "method.rtn-4bit.bits=3,8"]))
    assert (first.pipeline[0].settings["bits"], second.pipeline[0].settings["bits"]) == (3, 8)
    assert first.pipeline[0].settings["group_size"] == second.pipeline[0].settings["group_size"] == 64


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sequence[str]]]:
    """The overrides of every composition that Hydra makes."""
    calls: list[Sequence[str]] = []
    original = compose._hydra_compose

    def counting(overrides: Sequence[str], **kwargs: Any) -> Any:
        calls.append(overrides)
        return original(overrides, **kwargs)

    monkeypatch.setattr(compose, "_hydra_compose", counting)
    yield calls


def test_500_cells_are_one_composition(counted: list[Sequence[str]]) -> None:
    methods, models = "dense,awq,gptq,hqq,rtn-4bit,rtn-3bit,nf4,fp4,bcq,kmeans-3bit", "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b"
    began = time.process_time()
    found = compose.jobs([f"method={methods}", f"model={models}", "suite.windows=1,2,3,4,5", "calibration_seed=0,1"])
    spent = time.process_time() - began
    assert len(found) == 500 and len(counted) == 1
    assert spent < 5  # about 1 s on an idle core; Hydra alone takes 35 s
    assert {(c.pipeline[0].name, c.model.name, c.suite.windows, c.calibration.seed) for _, c in found} == set(
        itertools.product(methods.split(","), models.split(","), range(1, 6), range(2))
    )


def test_no_name_of_a_choice_of_ones_own_can_be_the_empty_one() -> None:
    for group in read_yaml(CONF_DIR / "config.yaml")["defaults"]:
        for name in group if isinstance(group, dict) else ():
            assert compose._EMPTY not in shipped(name)

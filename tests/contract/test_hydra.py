"""The contract with Hydra: what slimbench merges for a cell of a sweep equals what Hydra composes for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimbench.harness.config import compose
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.overrides import products, read
from slimbench.harness.config.registry import entry
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sources import CONF_DIR, shipped, shipped_method
from tests.support.own_conf import own, own_conf

__all__ = ["own", "own_conf"]

LISTS = 200


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
    base = folder / "method" / "derived_base.yaml"  # the class behind `derived` has two more settings
    base.write_text(base.read_text() + "head_bits: null\nclip: null\n")
    return folder


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
        plain = [name for name in shipped("method") if name not in ("derived", "derived_base") and not entry(name).method.after]
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


@pytest.mark.parametrize("count", [LISTS // 3, pytest.param(LISTS, marks=pytest.mark.full)])
def test_random_lists_compose_to_what_hydra_composes(count: int, own: None, stated_conf: Path) -> None:
    lists, refused = Lists(seed=7), 0
    for _ in range(count):
        overrides = lists.one()
        ours, theirs = by_slimbench(overrides, [overrides]), by_hydra(stated_conf, overrides)
        if ours is None and theirs is not None and is_ours_alone(overrides):
            continue
        assert ours == theirs, f"{overrides}: {ours and theirs and [(k, ours[k], theirs[k]) for k in ours if ours[k] != theirs.get(k)]}"
        refused += ours is None
    assert count / 10 < refused < count * 2 / 3  # both kinds are there


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

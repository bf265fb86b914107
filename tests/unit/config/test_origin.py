"""`slimbench config`: each key has its value, where that comes from, and a meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import composed, resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.origin import Key, keys
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.config.sources import CONF_DIR, shipped
from tests.unit.cli.test_cli import slimbench


def found(*overrides: str) -> dict[str, Key]:
    return {key.key: key for key in keys(list(overrides))}


def leaves(config: dict[str, Any]) -> set[str]:
    """The keys of a composed configuration that `slimbench config` has a line for."""
    parts = {name for name in RunConfig.parts() if isinstance(config[name], dict)} | {"settings"}
    flat = {f"{name}.{key}" for name in parts for key in config[name]}
    flat |= {f"method.{step}.{key}" for step, settings in config["method"].items() for key in settings}
    return flat | (config.keys() - parts - {"method"})


@pytest.mark.parametrize("overrides", [[], ["experiment=paper/awq", "method=[magnitude,gptq-3bit]"], ["model=random-135m", "engine=vllm"]])
def test_every_key_has_a_meaning_a_source_and_its_value(overrides: list[str]) -> None:
    config, _ = composed(overrides)
    listed = found(*overrides)
    assert leaves(config) <= listed.keys()
    for name, key in listed.items():
        assert key.meaning and key.source, name
        node: Any = config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if "." in name and not name.startswith("method."):
            assert key.value == node, name


def test_the_source_is_the_last_that_says_something() -> None:
    overrides = ["experiment=paper/awq", "method=gptq-3bit", "suite.windows=3", "suite.tasks=[piqa]", "speed={budget_s: 9}"]
    listed = found(*overrides)
    sources = {
        "suite.windows": "suite.windows=3",
        "suite.tasks": "suite.tasks=[piqa]",
        "suite.seqlen": "conf/suite/paper.yaml",
        "suite.divergence": "conf/experiment/paper/awq.yaml",
        "suite.chunk": "default of SuiteConfig",
        "suite": "conf/experiment/paper/awq.yaml",
        "speed": "conf/config.yaml",
        "speed.budget_s": "speed={budget_s: 9}",
        "speed.max_repeats": "conf/speed/quick.yaml",
        "calibration": "conf/experiment/paper/awq.yaml",
        "calibration_seed": "conf/config.yaml",
        "method": "method=gptq-3bit",
        "method.gptq-3bit.bits": "conf/method/gptq-3bit.yaml",
        "method.gptq-3bit.dampening": "default of GPTQ",
        "method.gptq-3bit.group_size": "conf/experiment/paper/awq.yaml",
        "seed": "default of RunConfig",
        "experiment": "experiment=paper/awq",
    }
    assert {name: re.sub(r"(?<=\.yaml):\d+$", "", listed[name].source) for name in sources} == sources
    for key in listed.values():
        if written := re.fullmatch(r"(conf/.*\.yaml):(\d+)", key.source):
            line = (CONF_DIR.parent / written[1]).read_text().splitlines()[int(written[2]) - 1]
            assert key.key.rpartition(".")[2] in line, key
    assert listed["method.gptq-3bit.group_size"].value == resolve(overrides).pipeline[0].settings["group_size"] == 128


def test_a_file_of_ones_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text("# mine\nname: mine\ncorpus: lee-news\n")
    monkeypatch.setenv("SLIMBENCH_CONF", str(tmp_path))
    assert found("suite=mine")["suite.corpus"].source == f"{tmp_path}/suite/mine.yaml:3"


def test_the_settings_of_every_method_are_told() -> None:
    names = shipped("method")
    told = keys([f"method=[{','.join(names)}]"], "method")
    assert [key.key for key in keys([], "method.gptq")] == [key.key for key in told if key.key.startswith("method.gptq.")], "chosen or not"
    assert {f"{name}._target_" for name in names} <= {key.key.removeprefix("method.") for key in told}
    for key in told[1:]:
        assert key.meaning and key.source and (key.values or key.key.endswith("_target_")), key


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("suit", "did you mean 'suite'"), ("method.gptq.bit", "did you mean 'method.gptq.bits'"), ("method.gtpq", "did you mean 'gptq'")],
)
def test_a_key_that_is_not_there_is_one_line(wanted: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        keys([], wanted)


def test_the_command_prints_one_key_or_many(tmp_path: Path) -> None:
    one = slimbench("config", "method.gptq.bits", "settings.bits=3", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    for line in ("value    3", "source   settings.bits=3", "may be   2, 3, 4 or 8", "meaning  Bits of a weight, before scales."):
        assert line in one.stdout
    rows = json.loads(slimbench("config", "suite", "--format", "json").stdout)
    assert {"key", "value", "source", "values", "meaning"} == rows[0].keys() and "suite.windows" in {row["key"] for row in rows}
    assert "suite.windows" in slimbench("config", "suite").stdout
    wrong = slimbench("config", "suite", "speed")
    assert wrong.returncode == 2 and "one key at a time" in wrong.stderr

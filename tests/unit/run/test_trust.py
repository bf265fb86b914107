"""What a record may make an audit do: run shipped code on public data, and nothing else unless it is trusted."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.engines import get
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sources import shipped_method
from slimbench.harness.run.trust import Distrusted, configuration
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def honest() -> dict[str, Any]:
    """The configuration of a record of a shipped cell."""
    config: dict[str, Any] = resolve(["method=gptq"]).model_dump(mode="json")
    return config


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    place: Any = config
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[int(name) if name.isdigit() else name] = value
    return config


def test_a_shipped_cell_needs_no_trust(honest: dict[str, Any]) -> None:
    assert configuration(honest, trusted=False).pipeline[0].target == shipped_method("gptq")["_target_"]
    assert configuration(changed(honest, "calibration.source", "self"), trusted=False).calibration.source == "self"
    prompted = configuration(changed(honest, "speed.prompts", {"corpus": "bigbench-mysteries", "count": 12}), trusted=False)
    assert prompted.speed.prompts is not None and prompted.speed.prompts.corpus == "bigbench-mysteries"
    asked = configuration(changed(honest, "suite.retrieval", {"corpus": "bigbench-mysteries"}), trusted=False)
    assert asked.suite.retrieval is not None and asked.suite.texts[-1] == "bigbench-mysteries"


REFUSED: dict[str, tuple[Any, ...]] = {
    "model.trust_remote_code": (True, "yes", 1),
    "model.source": ("file:/tmp/model", "hf:/tmp/model", "hf:../model", "/tmp/model", "http://host/model", ["hf:a/b"], None),
    "model.revision": ("../../refs", "/etc/passwd"),
    "model.shape": (
        {"auto_map": {"AutoModelForCausalLM": "a.B"}},
        {"_attn_implementation": "x"},
        {"attn_implementation": "a"},
        {"x": "a/b"},
    ),
    "suite.include_path": ("/tmp/tasks", "file:/tmp/tasks", "tasks", ["asset:bigbench", "/tmp/tasks"]),
    "suite.corpus": (
        ["file:/etc/passwd"],
        ["wikitext2", "hf:text:/etc/passwd:train:text"],
        ["hf:a/b:../../c/d:train:text"],
        "file:x",
        [3],
        ["self"],
    ),
    "speed.prompts": (
        {"corpus": "file:/etc/passwd"},
        {"corpus": "hf:text:/etc/passwd:train:text"},
        {"corpus": None},
        ["file:/etc/passwd"],
    ),
    "suite.retrieval": (
        {"corpus": "file:/etc/passwd"},
        {"corpus": "hf:text:/etc/passwd:train:text"},
        {"corpus": None},
        ["file:/etc/passwd"],
    ),
    "suite.tasks": (["/tmp/task.yaml"], ["../task"], "a/b"),
    "calibration.source": ("file:calibration.txt", "hf:json:/home/x.json:train:text", None),
    "pipeline.0.settings": ({"observer": "/tmp/x"}, {"observer": {"deep": ["file:x"]}}),
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in REFUSED.items() for value in values])
def test_what_brings_code_files_or_hosts_is_refused(honest: dict[str, Any], path: str, value: Any) -> None:
    with pytest.raises(Distrusted) as reason:
        configuration(changed(honest, path, value), trusted=False)
    assert "\n" not in str(reason.value)


def test_a_folder_of_the_name_of_a_data_set_is_not_read(honest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = changed(honest, "suite.corpus", ["hf:my/texts:default:train:text"])
    assert configuration(named, trusted=False).suite.corpus == ["hf:my/texts:default:train:text"]
    (tmp_path / "my" / "texts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Distrusted):
        configuration(named, trusted=False)


def test_with_trust_too_classes_and_loaders_are_shipped_ones(honest: dict[str, Any]) -> None:
    forged = changed(changed(honest, "pipeline.0.target", "forged.Method"), "reference.target", "forged.Dense")
    forged = changed(
        forged, "engine", honest["engine"] | {"target": "forged.Engine", "loaders": {"packed": "forged.load"}, "modules": ["forged"]}
    )
    forged = changed(forged, "limits", {"wall_s": 1e9})
    for trusted in (False, True):
        assert configuration(forged, trusted) == configuration(honest, trusted)
        assert configuration(forged, trusted).engine == get("transformers")
    for path in ("pipeline.0.name", "engine.name", "reference.name"):
        with pytest.raises(ConfigError, match=r"no (method|engine) 'forged'"):
            configuration(changed(honest, path, "forged"), trusted=True)


def test_the_configuration_of_a_record_imports_what_its_names_mean_here_and_nothing_heavy(honest: dict[str, Any]) -> None:
    import subprocess

    code = """
import json, sys
from slimbench.harness.run.trust import configuration
configuration(json.loads(sys.stdin.read()), False)
print(sorted({"this", "torch", "slimbench.harness.engines"} & set(sys.modules)))"""
    given = json.dumps(changed(honest, "pipeline.0.target", "this.Module"))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"

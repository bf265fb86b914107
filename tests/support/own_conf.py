"""A folder of choices of one's own, as fixtures: `own_conf` is the folder, with `own` commands read it."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.fixture
def own(own_conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CONF", str(own_conf))

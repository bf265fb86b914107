"""What is cut alike in all blocks is an ordinary checkpoint: engines that know nothing of pruning load it and give the same predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slimbench.harness.config import engines
from slimbench.harness.config.parse import build_method
from slimbench.harness.measure import claims
from slimbench.harness.store import artefact
from slimbench.methods.base import HUGGINGFACE, DenseModel, Unsupported
from tests.contract.shipped import CALIBRATION, CHEAP, Made, make, opened
from tests.support import tiny
from tests.unit.methods.test_methods import shipped_step


@pytest.fixture(scope="module", params=["minitron-width-25", "minitron-depth-25", "shortgpt", "sheared-25"])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    dense = tiny.save_model(folder / "dense", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    method: Any = build_method(shipped_step(request.param))
    made = make(replace(method, **CHEAP.get(method.name, {})), dense, folder / "artefact")
    assert made.claim.parameters is not None and made.claim.parameters < whole(dense)
    return made


def whole(dense: DenseModel) -> int:
    return int(dense.load().num_parameters())


@pytest.mark.parametrize("name", ["openvino", "ctranslate2"])
def test_other_engines_load_it_as_they_load_any_checkpoint(name: str, cut: Made) -> None:
    engine, transformers = engines.get(name), engines.get("transformers")
    if reason := engines.missing(engine):
        pytest.skip(reason)
    assert cut.claim.format == HUGGINGFACE
    ids = CALIBRATION.ids[:2]
    if name == "ctranslate2" and cut.method.name == "minitron" and cut.claim.details["sizes_left"]["hidden"] < 128:
        with pytest.raises(Unsupported, match="its heads are 32 wide, and the converter takes 24"):
            opened(engine, cut.folder)
        return
    theirs, ours = (opened(each, cut.folder) for each in (engine, transformers))
    assert (theirs.token_logprobs(ids) - ours.token_logprobs(ids)).abs().max() < 0.05
    flags = claims.check(theirs, cut.claim, artefact.disk_bytes(cut.folder)).flags
    assert [flag for flag in flags if "parameters" in flag or "layers" in flag] == []

"""What tests of recovery share."""

from __future__ import annotations

import pytest
import torch

from slimbench.methods.base import DenseModel
from tests.support import tiny
from tests.support.architectures import make


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The pipeline began with another model, so that there is something to learn."""
    folder, original = tmp_path_factory.mktemp("opt"), tmp_path_factory.mktemp("original")
    model = make("opt")
    model.save_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(original)
    return tiny.dense_model(folder, "float32", original=original)

"""What the server does before it forks."""

from __future__ import annotations

import sys

import pytest
import torch

from slimbench.harness.run import server


def test_with_a_card_only_torch_is_loaded_before_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(server.importlib, "import_module", loaded.append)
    server._preload()
    assert loaded == list(server._PRELOAD)
    loaded.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server._preload()
    assert loaded == [] and "torch" in sys.modules


def test_a_server_that_has_initialised_cuda_refuses_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA was initialised"):
        server._preload()

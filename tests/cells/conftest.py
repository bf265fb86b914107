"""The tiny model, its text and a cache of their own, as unit tests have them; one runner, and so one worker, for all."""

from __future__ import annotations

from tests.support.running import runner, shared
from tests.unit.conftest import cache, overrides, text, tiny

__all__ = ["cache", "overrides", "runner", "shared", "text", "tiny"]

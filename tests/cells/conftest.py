"""Whole cells run as unit tests do: in a cache of their own, on few threads."""

from __future__ import annotations

from tests.unit.conftest import own_cache

__all__ = ["own_cache"]

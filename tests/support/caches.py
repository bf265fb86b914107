"""Caches of the tests' own, with what is the same for all of them."""

from __future__ import annotations

from pathlib import Path

from slimbench.util.files import cache_dir


def with_kernels(folder: Path) -> Path:
    """Make a cache that is empty but for the user's compiled kernels, which take many seconds to build; its folder."""
    kernels = cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels.resolve())
    return folder

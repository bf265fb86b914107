"""datasets: which prepared data set of its cache it takes where nothing may be asked."""

from __future__ import annotations

import logging
from typing import Any


def cached_hash(path: str, name: str | None, settings: dict[str, Any]) -> str | None:
    """The last part of the folder of a prepared data set in the library's cache, a commit if it is of the hub; None without one.

    Args:
        settings: What else `load_dataset` is given that makes another configuration, such as `data_files`.
    """
    from datasets.packaged_modules.cache.cache import _find_hash_in_cache

    logger = logging.getLogger("datasets.packaged_modules.cache.cache")  # warns of each data set that it finds
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return str(_find_hash_in_cache(path, name, None, dict(settings), None)[-1])
    except (ValueError, OSError):
        return None
    finally:
        logger.setLevel(level)

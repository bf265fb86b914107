"""Whether what a cell needs from the hub is in the cache or can be fetched."""

from __future__ import annotations

import functools
import os

from slimbench.harness.config.schema import RunConfig
from slimbench.tasks import assets

_TIMEOUT_S = 5.0


def unavailable(config: RunConfig) -> str | None:
    """What of a cell lies on the hub and can be neither found in the cache nor fetched, in one line; None where nothing does.

    Corpora and tasks are counted as cached only where the libraries' own caches serve them, which is not looked into: with the hub out
    of reach they are named.
    """
    model = config.model
    uri = f"{model.source}@{model.revision}" if model.revision else model.source
    wanted = [f"model {model.name}"] if uri.startswith("hf:") and not assets.is_fetched(uri) else []
    wanted += [f"corpus {spec}" for spec in config.suite.corpus if _on_hub(spec)]
    if wanted and not reachable():
        return f"the hub cannot be reached for {', '.join(wanted)}"
    return None


@functools.cache
def reachable() -> bool:
    """Whether the hub answers within seconds; asked once."""
    import httpx

    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return False
    try:
        return (
            httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=_TIMEOUT_S, follow_redirects=True).status_code < 500
        )
    except httpx.HTTPError:
        return False


def _on_hub(spec: str) -> bool:
    from slimbench.tasks import corpora

    known = corpora.catalogue()
    return (known[spec].source if spec in known else spec).startswith("hf:")

"""Whether what a cell needs from the hub is in the cache or can be fetched."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from slimbench.harness.config.schema import RunConfig
from slimbench.tasks import assets, hub
from slimbench.tasks.errors import DataError, HubError

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


@functools.cache
def commit_of(repository: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub model names: from the cache, else from the hub; None where neither tells. Asked once."""
    from huggingface_hub import constants

    name = revision or "main"
    if hub.is_commit(name):
        return name
    ref = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / name
    if ref.is_file() and hub.is_commit(commit := ref.read_text().strip()):
        return commit
    if not reachable():
        return None
    try:
        return _ask(repository, revision)
    except DataError:
        return None


def require_commits(configs: Iterable[RunConfig]) -> None:
    """See that the commit of each hub model is known: without it the same command would give its stages other keys the next time.

    Raises:
        HubError: A hub that may be asked did not tell one, and neither does now or only now. What it refuses is left to the stages.
    """
    for model in {(config.model.source, config.model.revision) for config in configs}:
        kind, _, repository = model[0].partition(":")
        if kind == "hf" and not hub.is_commit(model[1]) and os.environ.get("HF_HUB_OFFLINE", "") in ("", "0"):
            try:
                commit = _ask(repository, model[1])
            except HubError:
                raise
            except DataError:
                continue
            raise HubError(f"the hub tells only now that {model[1] or 'main'} of {repository} is {commit}; the same command goes on")


def _ask(repository: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    name = f"the commit of {repository}"
    return hub.patiently(name, lambda: HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha)

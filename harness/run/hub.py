"""Whether what a cell needs from the hub is in the cache or can be fetched."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from slimbench.harness.config.schema import RunConfig
from slimbench.harness.run.planning import supplies
from slimbench.tasks import hub
from slimbench.tasks.errors import DataError, HubError
from slimbench.util import offline
from slimbench.util.files import write_atomically

_TIMEOUT_S = 5.0


def unavailable(config: RunConfig) -> str | None:
    """What of a cell can be neither found in a cache nor fetched, in one line; None where all can."""
    absent = supplies.missing([config])
    if absent and offline.is_offline():
        return supplies.told_missing(absent)
    of_hub = [supply for supply in absent if supply.is_on_hub]
    return f"the hub cannot be reached for {', '.join(map(str, of_hub))}" if of_hub and not reachable() else None


def is_needed(config: RunConfig) -> bool:
    """Whether something of a cell is still to be fetched from the hub; else its stages ask nobody."""
    return any(supply.is_on_hub for supply in supplies.missing([config]))


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


@functools.cache
def commit_of(repository: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub model names: from the hub client's cache, else from the hub; None where neither tells.

    What the hub told is kept in that cache: a branch that moves is another model only after `slimbench assets fetch hf:REPOSITORY`.
    """
    if hub.is_commit(revision):
        return revision
    ref = _ref(repository, revision)
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
    drafts = [(step.draft.source, step.draft.revision) for config in configs for step in config.pipeline if step.draft]
    for model in {*((config.model.source, config.model.revision) for config in configs), *drafts}:
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
    commit = hub.patiently(name, lambda: HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha)
    if commit:
        write_atomically(_ref(repository, revision), commit.encode())  # so that a sweep that goes on later, or offline, means the same
    return commit


def _ref(repository: str, revision: str | None) -> Path:
    """Where the hub client's cache keeps the commit of a branch or tag."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / (revision or "main")

"""Task keys: what a stage's numbers depend on, as one hash of names, versions and settings.

No import path and no hardware goes in: moving a file changes no key, and a machine without the card can plan for one that has it. What
is absent is left out, so that a new kind of part changes no key of a cell that does not have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.schema.identity import Keys
from slimbench.util.hashing import digest


@dataclass(frozen=True)
class Parts:
    """Everything that the keys of a cell hash, as plain data.

    Attributes:
        model: Content or source with its resolved revision, dtype, shape of random weights.
        pipeline: For each step `name` and `version` of its method, and its `settings`.
        calibration: Fingerprint of text and sampling; None where no method reads it.
        taught: Key of the text that a teacher writes, for each method that trains on one; None where none does.
        drafts: Name and content of each model that a method names to guess by; None where none does.
        compress_device: Kind of device that compression runs on: `cpu` or `cuda`.
        engine: `name` and `version`.
        device: Kind of device that quality and speed are measured on.
        suite: Settings of the suite, its texts and tasks by fingerprint, the versions of its protocols.
        speed: Settings and version of the speed protocol.
        threads: CPU threads that the user asked for; None: all that the machine gives.
        cards: Cards among which the model is spread; None where one holds it.
    """

    model: Mapping[str, Any]
    pipeline: Sequence[Mapping[str, Any]]
    calibration: str | None
    seed: int
    compress_device: str
    engine: Mapping[str, Any]
    device: str
    suite: Mapping[str, Any]
    speed: Mapping[str, Any]
    threads: int | None = None
    cards: int | None = None
    taught: Sequence[str] | None = None
    drafts: Sequence[str] | None = None

    def keys(self) -> Keys:
        """The keys of the three stages; quality and speed build on what was compressed."""
        compress = digest(
            present(
                model=present(**self.model),
                pipeline=[dict(step) | {"settings": present(**step["settings"])} for step in self.pipeline],
                calibration=self.calibration,
                taught=self.taught,
                drafts=self.drafts,
                seed=self.seed,
                device=self.compress_device,
            )
        )
        run = present(compress=compress, engine=dict(self.engine), device=self.device, cards=self.cards)
        return Keys(
            compress=compress,
            quality=digest(present(**run, suite=present(**self.suite))),
            speed=digest(present(**run, speed=present(**self.speed), threads=self.threads)),
        )


def present(**parts: Any) -> dict[str, Any]:
    """The parts that are there: what is None is off or absent, and moves no key."""
    return {name: value for name, value in parts.items() if value is not None}


def model_part(
    source: str,
    content: str | None,
    revision: str | None,
    dtype: str,
    shape: Mapping[str, Any] | None,
    code: bool = False,
    converter: int | None = None,
) -> dict[str, Any]:
    """What a dense source is.

    Args:
        content: Hash of an asset or a local folder, which then stands for its name and place.
        revision: The commit of a hub model.
        code: Python code of the checkpoint runs.
        converter: Version of what makes weights of an asset; the first is left out, as it was before there were others.
    """
    what = {"content": content} if content else {"source": source, "revision": revision}
    return present(**what, dtype=dtype, shape=shape, code=code or None, converter=converter if converter != 1 else None)


def suite_part(
    settings: Mapping[str, Any],
    corpora: Sequence[str],
    tasks: str | None,
    versions: Mapping[str, Any],
    prompts: str | None = None,
) -> dict[str, Any]:
    """What a suite measures.

    Args:
        settings: Its configuration; texts and tasks stand in the other arguments.
        corpora: Fingerprints of its texts, the headline first.
        tasks: Fingerprint of its tasks.
        versions: Versions of its protocols by name.
        prompts: Hash of the prompts that are continued; None where none are.
    """
    own = {name: value for name, value in settings.items() if name not in ("name", "batch_tokens", "corpus", "include_path", "tasks")}
    return present(**own, corpora=list(corpora) or None, tasks=tasks, versions=dict(versions), prompts_sha256=prompts)


def speed_part(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """How speed is measured: its configuration but for what changes no figure, and the version of the protocol."""
    return present(**{name: value for name, value in settings.items() if name not in ("name", "ledger")}, version=version)

"""The result of the stage `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.work import TeachingFacts
from slimbench.methods.base import Claim


class ArtefactFile(Schema):
    name: str
    bytes: int
    sha256: str | None = None


def content(files: Sequence[ArtefactFile]) -> str | None:
    """What identifies the bytes of an artefact: SHA-256 of its files' names and hashes, as `sha256sum * | sha256sum` prints it.

    None where there is no file, or one has no hash.
    """
    lines = [f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name) if file.sha256]
    return sha256("".join(lines).encode()).hexdigest() if lines and len(lines) == len(files) else None


class CalibrationFacts(Schema):
    """The calibration text of a cell and how it was sampled.

    Attributes:
        source: Spec of the corpus, or `self` where the dense model wrote it.
        text_sha256: Hash of the whole text that was sampled from; of the tokens where a model wrote them.
        tokens_sha256: Hash of the token ids in the order in which the method saw them (int64, little-endian).
        written_seconds: What a model took to write the text, in whichever run that was; None where it is a corpus.
    """

    source: str
    samples: int
    length: int
    seed: int
    fingerprint: str
    text_sha256: str
    tokens_sha256: str
    written_seconds: float | None = None


class Spent(Schema):
    """What a compression took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: User and system time of the process, threads and children included.
        device_seconds: Wall time × accelerators used; None where nothing ran on one.
        peak_device_bytes: Peak of the accelerator's allocator; None on the CPU, whose peak is the record's.
    """

    seconds: float = 0.0
    cpu_seconds: float | None = None
    device_seconds: float | None = None
    peak_device_bytes: int | None = None

    def __add__(self, later: Spent) -> Spent:
        """What both took; the peak is the higher one."""
        times = {name: _sum(getattr(self, name), getattr(later, name)) for name in ("cpu_seconds", "device_seconds")}
        peak = max((p for p in (self.peak_device_bytes, later.peak_device_bytes) if p is not None), default=None)
        return Spent(seconds=self.seconds + later.seconds, peak_device_bytes=peak, **times)

    def since(self, then: Spent) -> Spent:
        """What was taken since then; the peak is that of all."""
        times = {
            name: getattr(self, name) - (getattr(then, name) or 0.0) for name in ("cpu_seconds", "device_seconds") if getattr(self, name)
        }
        return Spent(seconds=self.seconds - then.seconds, peak_device_bytes=self.peak_device_bytes, **times)


def _sum(first: float | None, second: float | None) -> float | None:
    return second if first is None else first if second is None else first + second


class CompressResult(Schema):
    """What `compress` wrote: the claim, the files, and what it cost.

    Attributes:
        seconds: Wall time of the pipeline, source download excluded; `step_seconds` splits it.
        cpu_seconds: User and system time of the process, threads and children included.
        device_seconds: Wall time × accelerators used; None where the pipeline ran on the CPU.
        peak_device_bytes: Peak of the accelerator's allocator; None on the CPU, whose peak is the record's.
        calibration_tokens: Tokens handed to the methods as calibration.
        teaching: The text that a teacher wrote for it, None without one.
        reused_steps: Steps whose artefact another cell had left; what they took then is counted here too.
        training_tokens: Tokens of all gradient steps, as the methods claim them.
        trained_parameters: Parameters updated by gradient descent, as the methods claim them.
        tuning_free: No method of the pipeline trains.
        load: What else ran on the machine meanwhile.
        flags: One line for each fact that makes the times doubtful.
    """

    claim: Claim
    files: list[ArtefactFile]
    disk_bytes: int
    dense_bytes: int
    seconds: float
    step_seconds: dict[str, float]
    cpu_seconds: float | None = None
    device_seconds: float | None = None
    peak_device_bytes: int | None = None
    teaching: TeachingFacts | None = None
    reused_steps: list[str] = []
    calibration_tokens: int = 0
    calibration: CalibrationFacts | None = None
    training_tokens: int = 0
    trained_parameters: int = 0
    tuning_free: bool = True
    load: dict[str, float] = {}
    flags: list[str] = []

    @property
    def artefact(self) -> str | None:
        """What identifies the bytes that it wrote, see `content`."""
        return content(self.files)

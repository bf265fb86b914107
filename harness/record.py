"""The schema of a record: the JSON result of one stage of one cell, success or failure.

Records are versioned: a reader accepts every version up to its own, through `migrate`. Raw samples are kept, so that
every interval on the board can be computed again from the records alone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Stage(StrEnum):
    COMPRESS = "compress"
    QUALITY = "quality"
    SPEED = "speed"


class Status(StrEnum):
    """How a stage ended. Everything but `ok` stays on the board as a row of its own."""

    OK = "ok"
    FAILED = "failed"
    OOM = "oom"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    DIVERGED = "diverged"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="null")


class Keys(_Schema):
    """Content keys of the three stages of a cell: equal keys mean equal work."""

    compress: str
    quality: str
    speed: str

    def of(self, stage: Stage) -> str:
        return str(getattr(self, stage.value))


class CellIdentity(_Schema):
    """Which cell a record belongs to, in words, and the keys of its reference."""

    model: str
    source_precision: str | None = None
    dtype: str
    parameters: int | None = None
    pipeline: str
    steps: list[dict[str, Any]]
    family: str
    engine: str
    device: str
    suite: str
    speed: str
    calibration: str | None = None
    seed: int = 0
    keys: Keys
    reference: Keys


class ArtefactFile(_Schema):
    name: str
    bytes: int


class CompressResult(_Schema):
    """What `compress` wrote: the claim, the files, and what it cost.

    `seconds` is the wall time of the pipeline, source download excluded; `step_seconds` splits it.
    """

    claim: dict[str, Any]
    files: list[ArtefactFile]
    disk_bytes: int
    dense_bytes: int
    seconds: float
    step_seconds: dict[str, float]
    calibration_tokens: int = 0


class PerplexityResult(_Schema):
    """Negative log-likelihoods of one corpus under the `window` protocol.

    Attributes:
        window_nll: Mean NLL of each window in nats, over `seqlen - 1` labels (`seqlen` with BOS).
        corpus_sha256: Hash of the text that was tokenized.
    """

    corpus: str
    protocol: str
    corpus_sha256: str
    seqlen: int
    window_nll: list[float]
    labels_per_window: int
    perplexity: float


class ZeroshotItem(_Schema):
    """One item: its id in the task, a hash of its prompt, whether the answer was right. Never its text."""

    id: int
    hash: str
    correct: float
    loglikelihoods: list[float] = []


class ZeroshotResult(_Schema):
    """One task. `chance` is the mean of 1 / number of choices; `stderr` is lm-eval's."""

    task: str
    version: str
    metric: str
    accuracy: float
    stderr: float | None = None
    chance: float | None = None
    num_fewshot: int
    items: list[ZeroshotItem]


class LayerEvidence(_Schema):
    """What was found in the layers of one class of the loaded artefact.

    Attributes:
        parameters: Weights that the layers stand for (in × out features).
        bytes: Bytes that they hold in memory, scales and zeros included.
        bits_per_weight: 8 · bytes / parameters.
        zeros: Fraction of exact zeros of the effective weights that were probed, None where they were not.
        pattern: `2:4` where every group of four inputs of every probed layer has at least two zeros.
    """

    layer: str
    role: str
    count: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    bits_per_weight: float
    zeros: float | None = None
    pattern: str | None = None


class Evidence(_Schema):
    """What was measured on the loaded artefact, to be held against the claim.

    Attributes:
        weight_bytes: Sum of all resident tensors of the model.
        effective_bits: Bits per weight of the compressed linear layers (head and embeddings apart).
        sparsity: Fraction of zeros of the linear layers inside the blocks.
        kernel: Operators that did the matrix products of one decode step, the heaviest first.
        materialised_bytes: Dense-weight-sized tensors written during one decode step: 0 where weights are used packed.
        flags: One line for each mismatch of claim and evidence.
    """

    weight_bytes: int
    parameters: int
    effective_bits: float | None = None
    sparsity: float | None = None
    layers: list[LayerEvidence]
    kernel: str | None = None
    operators: dict[str, int] = {}
    materialised_bytes: int | None = None
    flags: list[str] = []


class QualityResult(_Schema):
    perplexity: list[PerplexityResult] = []
    zeroshot: list[ZeroshotResult] = []
    evidence: Evidence
    load_seconds: float
    forward_tokens: int
    seconds: dict[str, float] = {}


class Samples(_Schema):
    """Samples of one point, in the order taken: milliseconds of prefill and mean milliseconds per decoded token of each run."""

    prefill_ms: list[float]
    decode_ms: list[float]


class SpeedPointResult(_Schema):
    """One point of the grid. Sample i of `candidate` and sample i of `reference` were taken one right after the other.

    `probes` are readings of the machine's copy bandwidth in GB/s between bursts.
    """

    batch: int
    prompt: int
    new_tokens: int
    candidate: Samples
    reference: Samples | None = None
    warmup_ms: float
    probes: list[float] = []
    stopped: str


class MemoryResult(_Schema):
    """Bytes: resident tensors, KV cache at the headline point, what the OS or driver sees of the process, and its peak."""

    weight_bytes: int
    kv_cache_bytes: int | None = None
    process_bytes: int
    process_peak_bytes: int
    reserved_bytes: int | None = None


class SpeedResult(_Schema):
    points: list[SpeedPointResult]
    memory: MemoryResult
    evidence: Evidence
    copy_bandwidth_gbs: float
    load: dict[str, float] = {}
    flags: list[str] = []


class Failure(_Schema):
    """Why a stage did not end in `ok`; `interrupted` if the process was killed from outside, and so is to be run again."""

    type: str
    message: str
    traceback: str = ""
    stderr_tail: str = ""
    interrupted: bool = False


class Record(_Schema):
    """One stage of one cell."""

    schema_version: int = SCHEMA_VERSION
    stage: Stage
    status: Status
    key: str
    cell: CellIdentity
    phase: str = ""
    started: str
    wall_seconds: float
    peak_memory_bytes: int | None = None
    compress: CompressResult | None = None
    quality: QualityResult | None = None
    speed: SpeedResult | None = None
    failure: Failure | None = None
    config: dict[str, Any]
    command: str
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def result(self) -> CompressResult | QualityResult | SpeedResult | None:
        return self.compress or self.quality or self.speed


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Bring the contents of a record file to the current schema.

    Raises:
        ValueError: The record is of a newer version than this program reads.
    """
    version = data.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"record schema {version!r} is newer than {SCHEMA_VERSION}; update slimbench")
    return data

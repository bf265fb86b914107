"""The schema of a record: the JSON result of one stage of one cell, success or failure.

Records are versioned: a reader accepts every version up to its own, through `migrate`. Raw samples are kept, so that
every interval on the board can be computed again from the records alone.
"""

from __future__ import annotations

from array import array
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 5


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
    sha256: str | None = None


class CalibrationFacts(_Schema):
    """The calibration text of a cell and how it was sampled.

    Attributes:
        source: Spec of the corpus.
        text_sha256: Hash of the whole text that was sampled from.
        tokens_sha256: Hash of the token ids in the order in which the method saw them (int64, little-endian).
    """

    source: str
    samples: int
    length: int
    seed: int
    fingerprint: str
    text_sha256: str
    tokens_sha256: str


class CompressResult(_Schema):
    """What `compress` wrote: the claim, the files, and what it cost.

    Attributes:
        seconds: Wall time of the pipeline, source download excluded; `step_seconds` splits it.
        cpu_seconds: User and system time of the process, threads and children included.
        device_seconds: Wall time × accelerators used; None where the pipeline ran on the CPU.
        peak_device_bytes: Peak of the accelerator's allocator; None on the CPU, whose peak is the record's.
        calibration_tokens: Tokens handed to the methods as calibration.
        training_tokens: Tokens of all gradient steps, as the methods claim them.
        trained_parameters: Parameters updated by gradient descent, as the methods claim them.
        tuning_free: No method of the pipeline trains.
        load: What else ran on the machine meanwhile.
        flags: One line for each fact that makes the times doubtful.
    """

    claim: dict[str, Any]
    files: list[ArtefactFile]
    disk_bytes: int
    dense_bytes: int
    seconds: float
    step_seconds: dict[str, float]
    cpu_seconds: float | None = None
    device_seconds: float | None = None
    peak_device_bytes: int | None = None
    calibration_tokens: int = 0
    calibration: CalibrationFacts | None = None
    training_tokens: int = 0
    trained_parameters: int = 0
    tuning_free: bool = True
    load: dict[str, float] = {}
    flags: list[str] = []


class DivergenceResult(_Schema):
    """Distance of the next-token distributions from the reference's, on the tokens of a perplexity result.

    Attributes:
        top_k: Tokens of the reference's distribution kept one by one; the others count as one tail.
        kl: Mean KL(reference ‖ candidate) in nats of each window.
        kl_mean: Mean over all positions, in nats.
        kl_p99: 99th percentile over all positions, in nats.
        top1_agreement: Fraction of positions of each window at which both choose the same token.
        delta_p: Mean |difference of the probability of the true token| of each window.
        exact_positions: Positions, spread evenly, whose whole distribution is kept to measure what the tail hides.
        tail_error: Exact minus approximate mean KL over those positions, in nats: never below 0 but for rounding.
    """

    top_k: int
    kl: list[float]
    kl_mean: float
    kl_p99: float
    top1_agreement: list[float]
    delta_p: list[float]
    exact_positions: int = 0
    tail_error: float | None = None


class PerplexityResult(_Schema):
    """Negative log-likelihoods of one corpus under a protocol of windows with equally many labels.

    Attributes:
        protocol: Name and version: `window-1`, `incremental-1`, `llamacpp-1`.
        window_nll: Mean NLL of each window in nats, over `labels_per_window` labels.
        corpus_sha256: Hash of the text that was tokenized.
        divergence: Distance from the reference on the same tokens; None for the reference itself or where it was not asked for.
        calibration_overlap: Fraction of the scored n-grams that also stand in the cell's calibration tokens; None without calibration.
    """

    corpus: str
    protocol: str
    corpus_sha256: str
    seqlen: int
    window_nll: list[float]
    labels_per_window: int
    perplexity: float
    divergence: DivergenceResult | None = None
    calibration_overlap: float | None = None


class DocumentResult(_Schema):
    """Rolling log-likelihood of whole documents, as lm-eval measures it (protocol `document-1`).

    Attributes:
        nll: Sum of the negative log-likelihoods of each document in nats.
        tokens: Tokens, words (lm-eval's split at white space) and UTF-8 bytes of each document; no tokens where they were not counted.
        word_perplexity: exp(sum nll / sum words).
        byte_perplexity: exp(sum nll / sum bytes).
        bits_per_byte: sum nll / (sum bytes · ln 2).
    """

    corpus: str
    protocol: str
    corpus_sha256: str
    nll: list[float]
    tokens: list[int] = []
    words: list[int]
    bytes: list[int]
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float


class ZeroshotItems(_Schema):
    """The items of a task, column by column and equally many in each. Never their text.

    Attributes:
        ids: Number of the item in the task.
        hashes: Hash of its prompt.
        correct: Whether the answer was right, 0..1.
        loglikelihoods: Of each of its choices, in nats; no column where they were not kept.
    """

    ids: list[int] = []
    hashes: list[str] = []
    correct: list[float] = []
    loglikelihoods: list[list[float]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, id_: int, hash_: str, correct: float, loglikelihoods: list[float]) -> None:
        """Put an item after the others."""
        self.ids.append(id_)
        self.hashes.append(hash_)
        self.correct.append(correct)
        self.loglikelihoods.append(loglikelihoods)

    @model_validator(mode="after")
    def _rectangular(self) -> ZeroshotItems:
        if not len(self.ids) == len(self.hashes) == len(self.correct) or len(self.loglikelihoods) not in (0, len(self.ids)):
            raise ValueError("the columns of the items differ in length")
        return self


class ZeroshotResult(_Schema):
    """One task. `chance` is the mean of 1 / number of choices; `stderr` is lm-eval's; `calibration_overlap` as of a perplexity.

    `items` is empty where an imported file has none: then nothing is paired.
    """

    task: str
    version: str
    metric: str
    accuracy: float
    stderr: float | None = None
    chance: float | None = None
    num_fewshot: int
    items: ZeroshotItems
    calibration_overlap: float | None = None

    @cached_property
    def asked(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Ids and hashes of the items; read once, after which the items stay as they are."""
        return tuple(self.items.ids), tuple(self.items.hashes)

    @cached_property
    def correctness(self) -> array[float]:
        """Whether each item was right, 0..1; read once, after which the items stay as they are."""
        return array("d", self.items.correct)


class LayerEvidence(_Schema):
    """What was found in the layers of one class and role of the loaded artefact.

    Attributes:
        role: `linear` (inside the blocks), `head`, `embedding` or `other`.
        parameters: Weights that the layers stand for (in × out features).
        bytes: Bytes that they hold in memory, or where they are offloaded to, scales and zeros included.
        dtypes: Those bytes by storage dtype.
        bits_per_weight: 8 · bytes / parameters.
        zeros: Fraction of exact zeros of the effective weights that were probed, None where they were not.
        pattern: Pattern of the zeros that all probed layers share, see `harness.measure.zeros`; None without zeros or a shared one.
        patterns: Probed layers that have zeros, by their pattern.
        compute: Layers by the dtype in which they multiplied in one decode step.
        operators: Layers by the operators that multiplied; `unseen` where a kernel was called past torch's dispatcher.
        fallback_layers: Layers that hold a packed weight and expanded it to a dense one for the product.
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
    patterns: dict[str, int] = {}
    compute: dict[str, int] = {}
    operators: dict[str, int] = {}
    fallback_layers: int = 0


class Evidence(_Schema):
    """What was measured on the loaded artefact, to be held against the claim.

    Attributes:
        weight_bytes: Sum of all resident tensors of the model: those that it holds where it computes, between calls too.
        offloaded_bytes: Bytes of its other tensors: they lie on disk or in host memory and are brought in for the call of their layer.
        effective_bits: Bits per weight of the compressed linear layers (head and embeddings apart), after the first call.
        loaded_bits: The same before the first call, as the artefact's files were read; None where the engine repacks while it loads.
        sparsity: Fraction of zeros of the linear layers inside the blocks.
        kernel: Operators that did the matrix products of one decode step, the heaviest first.
        operators: How often each operator that multiplies was called in that step; library operators beside those inside them.
        kernels: Device kernels of that step in microseconds, the heaviest first; None on a CPU or where profiling is not allowed.
        materialised_bytes: Dense weights that the step expanded from packed ones, in bytes: 0 where weights are used packed.
        missing_kernels: Faster kernels that the artefact could have used, with the reason why they cannot be had.
        flags: One line for each mismatch of claim and evidence.
    """

    weight_bytes: int
    offloaded_bytes: int = 0
    parameters: int
    effective_bits: float | None = None
    loaded_bits: float | None = None
    sparsity: float | None = None
    layers: list[LayerEvidence]
    kernel: str | None = None
    operators: dict[str, int] = {}
    kernels: dict[str, float] | None = None
    materialised_bytes: int | None = None
    missing_kernels: list[str] = []
    flags: list[str] = []


class QualityResult(_Schema):
    """Quality of one artefact. The first perplexity result is the headline.

    Attributes:
        forward_tokens: Tokens that went through the model, padding included; 0 where they were not counted.
        seconds: Wall time of each part, by name.
        flags: One line for each fact that makes a number doubtful, such as calibration text inside the test text.
    """

    perplexity: list[PerplexityResult] = []
    documents: list[DocumentResult] = []
    zeroshot: list[ZeroshotResult] = []
    evidence: Evidence | None = None
    load_seconds: float | None = None
    forward_tokens: int = 0
    seconds: dict[str, float] = {}
    flags: list[str] = []


class Samples(_Schema):
    """Samples of one point in the order taken: milliseconds of prefill, and mean milliseconds of a decode step, of each run.

    A run is one prompt and `new_tokens` greedy tokens. Its decode steps are kept as their mean, not one by one: steps of one
    run are not independent of each other, runs nearly are, and only independent samples carry an interval.
    """

    prefill_ms: list[float]
    decode_ms: list[float]


class Probe(_Schema):
    """What the machine could do between two bursts of runs.

    Attributes:
        copy_gbs: Copy bandwidth in GB/s, bytes read and bytes written counted.
        matmul_gflops: Product of float32 matrices in GFLOP/s; None in records of schema 1.
        seconds: Since the first counted run of the point; None in records of schema 1.
    """

    copy_gbs: float
    matmul_gflops: float | None = None
    seconds: float | None = None


class GpuState(_Schema):
    """A card at the end of one run, as NVML sees it. `slowdowns` are the reasons for which the run is dropped, if any."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowdowns: list[str] = []


class Roofline(_Schema):
    """The least time of a decode step, if all that must be read came at the measured copy bandwidth.

    Attributes:
        weight_bytes: Weights that every step reads, offloaded ones too: all but an embedding table apart from the head.
        cache_bytes: KV cache of the batch halfway through decoding.
        bound_ms: Their sum / best copy bandwidth of the stage.
        fraction: `bound_ms` / median decode time: the share of the bandwidth that was reached.
        reason: Why there is no bound.
    """

    weight_bytes: int
    cache_bytes: int | None = None
    bound_ms: float | None = None
    fraction: float | None = None
    reason: str | None = None


class EnergyResult(_Schema):
    """Energy of the candidate's decode steps, over all its kept runs: counters are too coarse for a single one.

    Attributes:
        joules_per_token: Joules / tokens; None with a `reason`.
        tokens: Tokens decoded while the counter was read, those of all sequences.
        source: `NVML` or `RAPL`.
    """

    joules_per_token: float | None = None
    tokens: int = 0
    source: str | None = None
    reason: str | None = None


class SpeedPointResult(_Schema):
    """One point of the grid. Sample i of `candidate` and sample i of `reference` were taken one right after the other.

    Attributes:
        reference: The dense model on the same engine; for the reference itself the same loaded model in a second role (A/A).
        first_call_ms: The candidate's first prefill and decode at this point: compilation, autotuning, repacking. None where it had
            run before.
        probes: Readings of the machine before, between and after bursts of runs.
        half_widths: Larger distance from the median to a bound of its 95 % interval, over the median, of `decode`, `prefill`,
            `reference_decode` and `speedup`; None where there are too few samples for an interval.
        stopped: What ended repetition: `target`, `max_repeats` or `budget`; `imported` where another tool decided.
        dropped: Pairs that were dropped because the card was throttled in one of their runs.
        kv_cache_bytes: KV cache of the batch halfway through decoding.
        load: What else ran on the machine meanwhile.
        gpu: State of the card at the end of each run, dropped ones included.
    """

    batch: int
    prompt: int
    new_tokens: int
    candidate: Samples
    reference: Samples | None = None
    first_call_ms: float | None = None
    probes: list[Probe] = []
    half_widths: dict[str, float | None] = {}
    stopped: str
    dropped: int = 0
    kv_cache_bytes: int | None = None
    roofline: Roofline | None = None
    energy: EnergyResult | None = None
    load: dict[str, float] = {}
    gpu: list[GpuState] = []


class MemoryResult(_Schema):
    """Bytes in use while the headline point runs with the candidate alone. What is used stands apart from what is reserved.

    Attributes:
        weight_bytes: Sum of all resident tensors of the model.
        kv_cache_bytes: KV cache after the last step of the headline point.
        activation_bytes: Peak of one steady run above what was in use before it, less the KV cache; None where the system keeps no
            peak that can be reset.
        process_bytes: Resident set of the process, children included, before the run.
        process_peak_bytes: Highest resident set of the process so far, loading included.
        device_used_bytes: CUDA: peak of the tensors that the allocator holds during the run.
        reserved_bytes: CUDA: what the allocator holds, used or not.
        device_process_bytes: CUDA: what NVML sees of the process, context and libraries included.
    """

    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    activation_bytes: int | None = None
    process_bytes: int | None = None
    process_peak_bytes: int | None = None
    device_used_bytes: int | None = None
    reserved_bytes: int | None = None
    device_process_bytes: int | None = None


class LargestBatch(_Schema):
    """The largest batch that was seen to run: one prefill of the headline's prompt and one decode step, batches doubled from 1.

    Attributes:
        batch: 0 where not even one sequence fits.
        limited_by: `memory`: twice as many do not fit; `cap` or `budget`: they were not tried.
        bytes_per_sequence: What the last batch took at its peak more than the last but one, for each sequence; None below two batches.
    """

    batch: int
    limited_by: Literal["memory", "cap", "budget"]
    bytes_per_sequence: int | None = None


class SpeedResult(_Schema):
    """Speed and memory of one artefact. The first point is the headline.

    Attributes:
        copy_bandwidth_gbs: Best reading of all probes. In schema 1 the source of the copy was untouched memory, so that the figure may
            be that of a cache.
        load: Highest reading of the points, by name.
        flags: One line for each fact that makes a figure doubtful.
    """

    points: list[SpeedPointResult]
    memory: MemoryResult = MemoryResult()
    evidence: Evidence | None = None
    copy_bandwidth_gbs: float | None = None
    largest_batch: LargestBatch | None = None
    load: dict[str, float] = {}
    flags: list[str] = []


class Failure(_Schema):
    """Why a stage did not end in `ok`; `interrupted` if the process was killed from outside, and so is to be run again."""

    type: str
    message: str
    traceback: str = ""
    stderr_tail: str = ""
    interrupted: bool = False


class Imported(_Schema):
    """Where a result comes from that another tool measured.

    Attributes:
        tool: Its name, such as `lm-eval`, and its version where the file has it.
        file: Name of the file without its folder; `sha256` is that of its bytes.
        run: When it was run, as the file says (ISO 8601); None where it does not.
    """

    tool: str
    version: str | None = None
    file: str
    sha256: str
    run: str | None = None

    @property
    def label(self) -> str:
        return f"{self.tool} {self.version}" if self.version else self.tool


class Record(_Schema):
    """One stage of one cell.

    What slimbench measured itself has evidence, memory and times; what is imported has of these what its file has.
    """

    schema_version: int = SCHEMA_VERSION
    stage: Stage
    status: Status
    key: str
    cell: CellIdentity
    phase: str = ""
    started: str
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    compress: CompressResult | None = None
    quality: QualityResult | None = None
    speed: SpeedResult | None = None
    failure: Failure | None = None
    config: dict[str, Any]
    command: str
    provenance: dict[str, Any] = Field(default_factory=dict)
    imported: Imported | None = None

    @model_validator(mode="after")
    def _measured_here(self) -> Record:
        if self.imported is None:
            measured: dict[str, Any] = {"wall_seconds": self.wall_seconds}
            if self.quality:
                measured |= {name: getattr(self.quality, name) for name in ("evidence", "load_seconds")}
            if self.speed:
                memory = {name: getattr(self.speed.memory, name) for name in ("weight_bytes", "process_bytes", "process_peak_bytes")}
                measured |= memory | {name: getattr(self.speed, name) for name in ("evidence", "copy_bandwidth_gbs")}
            if missing := [name for name, value in measured.items() if value is None]:
                raise ValueError(f"no {missing[0]}, and the record is not imported")
        return self

    @property
    def simulated(self) -> bool:
        """The artefact holds rounded numbers in dense storage: no speed may be claimed for it, so none is measured."""
        return bool(self.compress and self.compress.claim.get("simulated"))

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
    if version < 2:
        speed = data.get("speed")
        for point in speed.get("points", []) if isinstance(speed, dict) else []:
            _point_of_schema_1(point)
    if version < 3:
        quality = data.get("quality")
        for task in quality.get("zeroshot", []) if isinstance(quality, dict) else []:
            _items_of_schema_2(task)
    if version < 4:
        _memory_of_schema_3(data)
    if version < 5:
        _prompts_of_schema_4(data)
        data.get("config", {}).pop("results", None)  # a folder of the machine that measured
    return data


def _point_of_schema_1(point: dict[str, Any]) -> None:
    """Give the fields of a speed point their present names; fields that have them already are left alone."""
    if "warmup_ms" in point:
        point["first_call_ms"] = point.pop("warmup_ms")
    point["probes"] = [{"copy_gbs": probe} if isinstance(probe, int | float) else probe for probe in point.get("probes", [])]


_KEPT_CACHES = ("compiled", "llamacpp", "vllm", "vllm-cpu")


def _memory_of_schema_3(data: dict[str, Any]) -> None:
    """Forget the activations of engines that keep their KV cache: it was taken off them though it had been there before the run."""
    speed, cell = data.get("speed"), data.get("cell")
    memory = speed.get("memory") if isinstance(speed, dict) else None
    if isinstance(memory, dict) and isinstance(cell, dict) and cell.get("engine") in _KEPT_CACHES:
        memory["activation_bytes"] = None


def _prompts_of_schema_4(data: dict[str, Any]) -> None:
    """Flag what was measured while the last token of a prompt made a copy of a dense head that shares its weight with the embedding."""
    speed = data.get("speed") if isinstance(data.get("speed"), dict) else None
    if not speed or not isinstance(speed.get("evidence"), dict) or not isinstance(speed.get("memory"), dict):
        return
    layers = speed["evidence"].get("layers", [])
    copied = sum(layer["bytes"] for layer in layers if layer["layer"] == "Embedding")
    own = any(layer["layer"].startswith(("Packed", "Codebook", "Adapted")) for layer in layers)
    if own and 0 < copied <= (speed["memory"].get("activation_bytes") or 0):
        speed.setdefault("flags", []).append("prefill and activations are with a copy of the dense head that is no longer made")


def _items_of_schema_2(task: dict[str, Any]) -> None:
    """Turn a list of items into their columns; items that are columns already are left alone."""
    items = task.get("items")
    if isinstance(items, list):
        columns = {"ids": "id", "hashes": "hash", "correct": "correct"}
        task["items"] = {name: [item[field] for item in items] for name, field in columns.items()}
        task["items"]["loglikelihoods"] = [item.get("loglikelihoods", []) for item in items]

"""The result of the stage `speed`."""

from __future__ import annotations

from typing import Literal

from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.generation import TimedTokens
from slimbench.harness.schema.ledger import Ledger
from slimbench.harness.schema.work import WorkResult


class Samples(Schema):
    """Samples of one point in the order taken: milliseconds of prefill, and mean milliseconds of a decode step, of each run.

    A run is one prompt and `new_tokens` tokens. Its decode steps are kept as their mean, not one by one: steps of one
    run are not independent of each other, runs nearly are, and only independent samples carry an interval.
    """

    prefill_ms: list[float]
    decode_ms: list[float]


class TextPrompts(Schema):
    """Prompts that were texts, since what runs depends on them.

    Attributes:
        corpus: Where they are from.
        count: How many.
        sha256: Hash of their token ids.
        pairs: Of each pair of samples the number of its prompt.
    """

    corpus: str
    count: int
    sha256: str
    pairs: list[int] = []


class Probe(Schema):
    """What the machine could do between two bursts of runs.

    Attributes:
        copy_gbs: Copy bandwidth in GB/s, bytes read and bytes written counted.
        read_gbs: Read bandwidth in GB/s, of as many bytes as a decode step reads; None in records of schema 7.
        matmul_gflops: Product of float32 matrices in GFLOP/s; None in records of schema 1.
        seconds: Since the first counted run of the point; None in records of schema 1.
    """

    copy_gbs: float
    read_gbs: float | None = None
    matmul_gflops: float | None = None
    seconds: float | None = None


class GpuState(Schema):
    """A card at the end of one run, as NVML sees it. `slowdowns` are the reasons for which the run is dropped, if any."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowdowns: list[str] = []


class Roofline(Schema):
    """The least time of a decode step, if all that must be read came at the measured bandwidth.

    Attributes:
        weight_bytes: Weights that every step reads, offloaded ones too: all but an embedding table apart from the head.
        cache_bytes: KV cache of the batch halfway through decoding.
        bandwidth: Which one that is. A step only reads, so it is that of reads; in records of schema 7 it is that of copies, which a
            step may exceed.
        bound_ms: Their sum / best such bandwidth of the stage.
        fraction: `bound_ms` / middle decode time: the share of the bandwidth that was reached.
        reason: Why there is no bound.
    """

    weight_bytes: int
    cache_bytes: int | None = None
    bandwidth: Literal["read", "copy"] = "copy"
    bound_ms: float | None = None
    fraction: float | None = None
    reason: str | None = None


class EnergyResult(Schema):
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


class SpeedPointResult(Schema):
    """One point of the grid. Sample i of `candidate` and sample i of `reference` were taken one right after the other.

    Attributes:
        reference: The dense model on the same engine; for the reference itself the same loaded model in a second role (A/A).
        first_call_ms: The candidate's first prefill and decode at this point: compilation, autotuning, repacking. None where it had
            run before.
        probes: Readings of the machine before, between and after bursts of runs.
        half_widths: Larger distance from the median to a bound of its 95 % interval, over the median, of `decode`, `prefill`,
            `reference_decode` and `speedup`; None where there are too few samples for an interval. Where prompts differ, of `repeats` of
            the same prompts alone.
        processes: Pairs that each process took, in order: the samples are those of the first process, then those of the second, and so
            on. Empty in records of schema 7, whose samples are of one process.
        stopped: What ended repetition: `target`, `max_repeats` or `budget`; `spread` where each process reached the target and the
            processes differ by more; `imported` where another tool decided.
        dropped: Pairs that were dropped because the card was throttled in one of their runs.
        kv_cache_bytes: KV cache of the batch halfway through decoding.
        load: What else ran on the machine meanwhile.
        gpu: State of the card at the end of each run, dropped ones included.
        tokens: What was chosen in the counted runs; None in records from before it was kept.
        prompts: Texts that were gone on with; None: one prompt of random ids, the same for all.
    """

    batch: int
    prompt: int
    new_tokens: int
    candidate: Samples
    reference: Samples | None = None
    first_call_ms: float | None = None
    probes: list[Probe] = []
    half_widths: dict[str, float | None] = {}
    processes: list[int] = []
    stopped: str
    dropped: int = 0
    kv_cache_bytes: int | None = None
    roofline: Roofline | None = None
    energy: EnergyResult | None = None
    load: dict[str, float] = {}
    gpu: list[GpuState] = []
    tokens: TimedTokens | None = None
    prompts: TextPrompts | None = None

    @property
    def prompt_of_pairs(self) -> list[int]:
        """Of each pair of samples the number of its prompt; empty where all have the same."""
        return self.prompts.pairs if self.prompts else []


class MemoryResult(Schema):
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


class LargestBatch(Schema):
    """The largest batch that was seen to run: one prefill of the headline's prompt and one decode step, batches doubled from 1.

    Attributes:
        batch: 0 where not even one sequence fits.
        limited_by: `memory`: twice as many do not fit; `cap` or `budget`: they were not tried.
        bytes_per_sequence: What the last batch took at its peak more than the last but one, for each sequence; None below two batches.
    """

    batch: int
    limited_by: Literal["memory", "cap", "budget"]
    bytes_per_sequence: int | None = None


class SpeedResult(Schema):
    """Speed and memory of one artefact. The first point is the headline.

    Attributes:
        copy_bandwidth_gbs: Best reading of all probes. In schema 1 the source of the copy was untouched memory, so that the figure may
            be that of a cache.
        read_bandwidth_gbs: The same of reads; None in records of schema 7.
        load: Highest reading of the points, by name.
        rows_ms: Milliseconds of the candidate's passes by number of tokens, behind a prompt of the headline; empty where not asked for.
        reference_row_ms: Of the reference's passes of one token, in turns with these; None without a reference beside the candidate.
        parts_ms: Milliseconds of calls of the parts that `work.part_calls` tells apart, by part and number of rows.
        work: What ran for a token of those of the headline's texts that were timed, counted apart from the timed runs; None where prompts
            are random ids, or nothing acts while the model runs.
        temperature: At which tokens were drawn, those of the reference too; None where the likeliest ones were written.
        build: What the code of the engine is compiled for, and its version; None where it does not say.
        ledgers: The parts of a decode step and of a prefill of the headline; empty where not asked for.
        reference_ledgers: Those of the reference.
        flags: One line for each fact that makes a figure doubtful.
    """

    points: list[SpeedPointResult]
    memory: MemoryResult = MemoryResult()
    evidence: Evidence | None = None
    copy_bandwidth_gbs: float | None = None
    read_bandwidth_gbs: float | None = None
    largest_batch: LargestBatch | None = None
    load: dict[str, float] = {}
    rows_ms: dict[str, float] = {}
    reference_row_ms: float | None = None
    parts_ms: dict[str, dict[str, float]] = {}
    work: WorkResult | None = None
    temperature: float | None = None
    build: str | None = None
    ledgers: list[Ledger] = []
    reference_ledgers: list[Ledger] = []
    flags: list[str] = []

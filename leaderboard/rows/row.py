"""What the board knows of one cell: a flat row with documented keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimbench.harness.schema.identity import Keys
from slimbench.util.text import plain

_BREAKS = re.compile(r"[\n\t]+")


class Row(BaseModel):
    """One cell of the board. A number is finite or None, a text is one line; intervals are 95 %."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Dense source checkpoint.")
    pipeline: str = Field(description="Methods applied one after the other, with the settings that differ from the shipped ones.")
    family: str = Field(description="Branch of the survey; several where the pipeline joins them.")
    methods: list[str] = Field([], description="Class of each step of the pipeline: what its settings have in common.")
    parameters: int | None = Field(None, description="Parameters of the dense source.")
    engine: str = Field(description="What loaded and ran the artefact.")
    format: str | None = Field(None, description="Format of the artefact on disk: huggingface, packed, gguf and so on.")
    kernel: str | None = Field(None, description="Operators that did the matrix products of one decode step, the heaviest first.")
    device: str = Field(description="Kind of device: cpu or cuda.")
    status: str = Field(
        description="Worst end of the stages: failed, oom, timeout, diverged, unsupported, incomplete (a stage has no record), ok."
    )
    perplexity: float | None = Field(
        None, description="Exponential of the mean negative log-likelihood over the windows of the first corpus."
    )
    perplexity_low: float | None = Field(None, description="Lower bound of the perplexity, bootstrap over windows.")
    perplexity_high: float | None = Field(None, description="Upper bound of the perplexity, bootstrap over windows.")
    perplexity_delta_percent: float | None = Field(None, description="Perplexity above the reference in per cent, paired over windows.")
    perplexity_ratio_low: float | None = Field(None, description="Lower bound of perplexity / reference perplexity, paired bootstrap.")
    perplexity_ratio_high: float | None = Field(None, description="Upper bound of perplexity / reference perplexity, paired bootstrap.")
    perplexity_p: float | None = Field(
        None, description="p-value of the difference in NLL to the reference, paired t-test over windows, not corrected for several rows."
    )
    perplexities: dict[str, float | None] = Field({}, description="Perplexity of each corpus of the suite under the first protocol.")
    perplexity_by_protocol: dict[str, float | None] = Field(
        {}, description="Perplexity under each protocol: `CORPUS window TOKENS`, `CORPUS document (word)` and so on."
    )
    ood_perplexity_delta_percent: dict[str, float | None] = Field(
        {}, description="Perplexity above the reference in per cent on each further corpus, under the first protocol, paired over windows."
    )
    rank: int | None = Field(
        None,
        description="1 + number of rows of the table with a significantly lower perplexity: paired t-tests over windows, Holm's correction "
        "over all pairs, 5 %. Rows that do not differ significantly may share a rank.",
    )
    accuracy_rank: int | None = Field(
        None,
        description="1 + number of rows of the table that have a significantly higher accuracy: paired tests over items within tasks, "
        "Holm's correction over all pairs, 5 %.",
    )
    kl_mean: float | None = Field(
        None, description="KL(reference ‖ row) of the next-token distributions in nats, mean over the tokens of the first corpus."
    )
    kl_low: float | None = Field(None, description="Lower bound of the KL, bootstrap over windows.")
    kl_high: float | None = Field(None, description="Upper bound of the KL, bootstrap over windows.")
    kl_p99: float | None = Field(None, description="99th percentile of the KL over tokens, in nats.")
    top1_agreement: float | None = Field(
        None, description="Fraction of tokens at which row and reference hold the same token most likely, 0..1."
    )
    delta_p: float | None = Field(None, description="Mean absolute difference to the reference in the probability of the true token, 0..1.")
    calibration_overlap: float | None = Field(
        None, description="Fraction of the first corpus' scored n-grams that also stand in the calibration text, 0..1."
    )
    accuracy: float | None = Field(
        None, description="Mean of the accuracies of the suite's zero-shot tasks, 0..1; each task weighs the same."
    )
    accuracy_se: float | None = Field(None, description="Standard error of the accuracy, from the variance over items.")
    accuracy_delta: float | None = Field(None, description="Accuracy above that of the reference on the same items.")
    accuracy_delta_low: float | None = Field(None, description="Lower bound of the accuracy difference, paired over items.")
    accuracy_delta_high: float | None = Field(None, description="Upper bound of the accuracy difference, paired over items.")
    accuracy_p: float | None = Field(None, description="p-value of the accuracy difference, not corrected for several rows.")
    task_accuracy: dict[str, float | None] = Field({}, description="Accuracy of each task.")
    task_delta: dict[str, float | None] = Field({}, description="Accuracy of each task above that of the reference on the same items.")
    task_p: dict[str, float | None] = Field(
        {}, description="p-value of each task's difference to the reference: McNemar's exact test, Holm's correction over the tasks."
    )
    flips_to_wrong: int | None = Field(None, description="Items that the reference has right and the row wrong.")
    flips_to_right: int | None = Field(None, description="Items that the reference has wrong and the row right.")
    mcnemar_p: float | None = Field(
        None, description="p-value of McNemar's exact test of the flips over the items of all tasks, not corrected for several rows."
    )
    group_accuracy: dict[str, float | None] = Field(
        {}, description="Mean accuracy of the tasks of each group: knowledge, language, reasoning, social, other."
    )
    group_delta: dict[str, float | None] = Field({}, description="Mean accuracy of each group above that of the reference.")
    group_spread: float | None = Field(None, description="Largest less smallest of the groups' accuracy differences.")
    worst_task: str | None = Field(None, description="Task whose accuracy fell most, or rose least, against the reference.")
    worst_task_delta: float | None = Field(None, description="Accuracy of that task above that of the reference.")
    worst_task_low: float | None = Field(
        None, description="Lower bound of that difference, from the changed answers; holds for all tasks at once (Bonferroni)."
    )
    worst_task_high: float | None = Field(None, description="Upper bound of that difference.")
    speed_point: str | None = Field(None, description="Batch, prompt tokens and new tokens at which speed was measured.")
    prefill_ms: float | None = Field(None, description="Median milliseconds from prompt to first token.")
    prefill_low: float | None = Field(None, description="Lower bound of the prefill time, order statistics.")
    prefill_high: float | None = Field(None, description="Upper bound of the prefill time, order statistics.")
    decode_tokens_per_s: float | None = Field(None, description="Tokens per second while decoding, of one sequence, at the median time.")
    decode_low: float | None = Field(None, description="Lower bound of the decode rate, order statistics.")
    decode_high: float | None = Field(None, description="Upper bound of the decode rate, order statistics.")
    speedup: float | None = Field(
        None, description="Decode time of the reference / decode time, median over pairs of adjacent runs on the same engine."
    )
    speedup_low: float | None = Field(None, description="Lower bound of the speed-up, order statistics of the paired ratios.")
    speedup_high: float | None = Field(None, description="Upper bound of the speed-up, order statistics of the paired ratios.")
    throughput_tokens_per_s: float | None = Field(
        None, description="Tokens per second while decoding, of all sequences of the batch together, at the median time."
    )
    roofline_fraction: float | None = Field(
        None,
        description="Least time of a decode step, if weights and KV cache came at the measured copy bandwidth, over the median time; "
        "above 1 the measurement is defective.",
    )
    copy_bandwidth_gbs: float | None = Field(
        None, description="Median of the copy-bandwidth probes while the headline point was measured, bytes read and written, GB/s."
    )
    energy_reason: str | None = Field(None, description="Why there is no figure of energy.")
    energy_j_per_token: float | None = Field(
        None, description="Joules for each decoded token, of the whole card (NVML) or processor package (RAPL), idle power included."
    )
    speed_points: list[dict[str, float | int | str | None]] = Field(
        [], description="Every point of the speed grid: batch, prompt, new_tokens, and its numbers under the names used here."
    )
    weight_bytes: int | None = Field(None, description="Bytes of all tensors of the loaded artefact that stay in memory.")
    offloaded_bytes: int | None = Field(
        None, description="Bytes of its other tensors: on disk or in host memory, brought in while their layer computes."
    )
    kv_cache_bytes: int | None = Field(None, description="Bytes of the KV cache after the last step of the first speed point.")
    activation_bytes: int | None = Field(
        None, description="Peak of one run of the first speed point above weights and KV cache: activations and workspace."
    )
    process_peak_bytes: int | None = Field(
        None, description="Highest resident memory of the process that ran the artefact, loading included."
    )
    largest_batch: int | None = Field(
        None, description="Largest batch that was run with the first speed point's prompt before memory, a cap or the time ended."
    )
    disk_bytes: int | None = Field(None, description="Bytes of the artefact's files.")
    compression_ratio: float | None = Field(None, description="Bytes of the dense source / bytes of the artefact's files.")
    effective_bits: float | None = Field(
        None, description="Bits stored for each weight of the compressed layers, scales and zeros included."
    )
    sparsity: float | None = Field(None, description="Fraction of zeros among the weights of the linear layers, 0..1.")
    compress_seconds: float | None = Field(None, description="Wall time of the compression.")
    compress_cpu_seconds: float | None = Field(None, description="Processor time of the compression, over all threads and children.")
    compress_device_hours: float | None = Field(
        None, description="Hours of the compression times accelerators used; none where it ran on the processor."
    )
    peak_memory_bytes: int | None = Field(None, description="Peak resident memory of the compression.")
    peak_device_bytes: int | None = Field(None, description="Peak memory of the accelerator during the compression.")
    calibration_tokens: int | None = Field(None, description="Tokens of calibration text that the methods were given.")
    training_tokens: int | None = Field(None, description="Tokens of all gradient steps, as the methods claim them.")
    trained_parameters: int | None = Field(None, description="Parameters updated by gradient descent, as the methods claim them.")
    tuning_free: bool | None = Field(None, description="No method of the pipeline trains.")
    source_precision: str | None = Field(None, description="Precision of the dense source where it was not full.")
    dtype: str = Field(description="Storage and compute type of the dense source.")
    suite: str = Field(description="What quality was measured on.")
    suite_changes: str | None = Field(None, description="Settings of the suite that differ from the shipped one of its name.")
    suite_protocol: str = Field(
        description="Hash of the suite's protocol and texts: only rows with the same hash may be compared in quality."
    )
    speed: str = Field(description="How speed was measured.")
    speed_protocol: str = Field(description="Hash of the speed protocol: only rows with the same hash may be compared in speed.")
    hardware: str = Field(description="Card, or processor with threads and memory, on which speed was measured.")
    seed: int = Field(description="Seed of the cell.")
    flags: list[str] = Field([], description="Mismatches of claim and evidence, and disturbances of the measurement.")
    imported: str | None = Field(None, description="The tool that measured the row, where its results were imported.")
    reason: str | None = Field(None, description="Why the status is not ok.")
    is_reference: bool = Field(description="The uncompressed model with which the others are compared.")
    keys: Keys = Field(description="Content keys of the stages compress, quality and speed.")
    corpus: str | None = Field(None, description="Corpus of the perplexity.")
    calibration: str | None = Field(None, description="Fingerprint of the calibration text, where it was used.")
    calibration_text: str | None = Field(None, description="Calibration corpus and how much of it, where it was used.")
    calibration_seed: int | None = Field(None, description="Seed by which the calibration text was drawn, where it was used.")
    replicate: str | None = Field(
        None, description="What tells the row from others of its pipeline and engine: calibration text, seeds, or its quality key."
    )
    replicates: int | None = Field(None, description="Perplexities of rows that differ in nothing but seeds, that of this one included.")
    perplexity_seed_sd: float | None = Field(None, description="Standard deviation of those perplexities.")
    perplexity_seed_min: float | None = Field(None, description="Lowest of those perplexities.")
    perplexity_seed_max: float | None = Field(None, description="Highest of those perplexities.")
    command: str = Field("", description="Command that makes the row again, with all its stages.")
    provenance: dict[str, str] = Field({}, description="Versions, commit and time of measurement.")

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        return clean(data)

    @property
    def perplexity_delta_low(self) -> float | None:
        """Lower bound of `perplexity_delta_percent`."""
        return None if self.perplexity_ratio_low is None else 100 * (self.perplexity_ratio_low - 1)

    @property
    def perplexity_delta_high(self) -> float | None:
        """Upper bound of `perplexity_delta_percent`."""
        return None if self.perplexity_ratio_high is None else 100 * (self.perplexity_ratio_high - 1)

    @property
    def engine_label(self) -> str:
        return f"{self.engine} · {self.dtype}"

    @property
    def path_label(self) -> str:
        """Engine and kernel: what a speed or a speed-up belongs to."""
        return f"{self.engine_label} · {self.kernel}" if self.kernel else self.engine_label

    @property
    def label(self) -> str:
        """The pipeline, with its calibration text or seeds where other rows of it have others."""
        return f"{self.pipeline} · {self.replicate}" if self.replicate else self.pipeline

    @property
    def quality_key(self) -> tuple[str, ...]:
        """What rows must share to be compared in quality: model, suite and kind of device."""
        return self.model, self.suite, self.suite_protocol, self.device

    @property
    def table_key(self) -> tuple[str, ...]:
        """What rows must share to stand in one table: model, suite, speed protocol, device and hardware."""
        return self.model, self.suite, self.suite_protocol, self.speed, self.speed_protocol, self.device, self.hardware


def named(names: str, estimator: Callable[..., Sequence[float]], *samples: Any) -> dict[str, float]:
    """The results of an estimator by name, for the fields of a row; nothing where the samples do not allow an estimate."""
    try:
        return dict(zip(names.split(), estimator(*samples), strict=True))
    except ValueError:
        return {}


def clean(value: Any) -> Any:
    """The same value with non-finite numbers as None and each text on one line, without control characters."""
    kind = type(value)
    if value is None or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value if _plain(value) else _BREAKS.sub(" ", plain(value))
    if kind is dict:
        return {k if type(k) is str and _plain(k) else clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable()

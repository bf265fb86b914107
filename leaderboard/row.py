"""What the board knows of one cell: a flat row with documented keys."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.record import Keys

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class Row(BaseModel):
    """One cell of the board. A number is finite or None, a text is one line; intervals are 95 %."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Dense source checkpoint.")
    pipeline: str = Field(description="Methods applied one after the other, with the settings that differ from the shipped ones.")
    family: str = Field(description="Branch of the survey; several where the pipeline joins them.")
    engine: str = Field(description="What loaded and ran the artefact.")
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
    perplexities: dict[str, float | None] = Field({}, description="Perplexity of each corpus of the suite.")
    accuracy: float | None = Field(
        None, description="Mean of the accuracies of the suite's zero-shot tasks, 0..1; each task weighs the same."
    )
    accuracy_se: float | None = Field(None, description="Standard error of the accuracy, from the variance over items.")
    accuracy_delta: float | None = Field(None, description="Accuracy above that of the reference on the same items.")
    accuracy_delta_low: float | None = Field(None, description="Lower bound of the accuracy difference, paired bootstrap over items.")
    accuracy_delta_high: float | None = Field(None, description="Upper bound of the accuracy difference, paired bootstrap over items.")
    task_accuracy: dict[str, float | None] = Field({}, description="Accuracy of each task.")
    task_delta: dict[str, float | None] = Field({}, description="Accuracy of each task above that of the reference on the same items.")
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
    weight_bytes: int | None = Field(None, description="Bytes of all tensors of the loaded artefact.")
    disk_bytes: int | None = Field(None, description="Bytes of the artefact's files.")
    compression_ratio: float | None = Field(None, description="Bytes of the dense source / bytes of the artefact's files.")
    effective_bits: float | None = Field(
        None, description="Bits stored for each weight of the compressed layers, scales and zeros included."
    )
    sparsity: float | None = Field(None, description="Fraction of zeros among the weights of the linear layers, 0..1.")
    compress_seconds: float | None = Field(None, description="Wall time of the compression.")
    peak_memory_bytes: int | None = Field(None, description="Peak resident memory of the compression.")
    source_precision: str | None = Field(None, description="Precision of the dense source where it was not full.")
    dtype: str = Field(description="Storage and compute type of the dense source.")
    suite: str = Field(description="What quality was measured on.")
    suite_protocol: str = Field(
        description="Hash of the suite's protocol and texts: only rows with the same hash may be compared in quality."
    )
    speed: str = Field(description="How speed was measured.")
    speed_protocol: str = Field(description="Hash of the speed protocol: only rows with the same hash may be compared in speed.")
    hardware: str = Field(description="Card, or processor with threads and memory, on which speed was measured.")
    seed: int = Field(description="Seed of the cell.")
    flags: list[str] = Field([], description="Mismatches of claim and evidence, and disturbances of the measurement.")
    reason: str | None = Field(None, description="Why the status is not ok.")
    is_reference: bool = Field(description="The uncompressed model with which the others are compared.")
    keys: Keys = Field(description="Content keys of the stages compress, quality and speed.")
    corpus: str | None = Field(None, description="Corpus of the perplexity.")
    calibration: str | None = Field(None, description="Fingerprint of the calibration text, where it was used.")
    command: str = Field("", description="Command that makes the row again.")
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


def clean(value: Any) -> Any:
    """The same value with non-finite numbers as None and each text on one line, without control characters."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _CONTROL.sub(" ", value).encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value

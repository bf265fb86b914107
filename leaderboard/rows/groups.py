"""The groups of numbers of which a row is made, each frozen and filled by one function; every field says what it means."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimbench.harness.schema.identity import Keys
from slimbench.leaderboard.rows.clean import clean


class Group(BaseModel):
    """Numbers of one kind. A number is finite or None, a text is one line; intervals are 95 %."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        return clean(data)


class Identity(Group):
    """Which cell it is, where and how it was measured, and how it ended."""

    model: str = Field(description="Dense source checkpoint.")
    pipeline: str = Field(description="Methods applied one after the other, with the settings that differ from the shipped ones.")
    family: str = Field(description="Branch of the survey; several where the pipeline joins them.")
    methods: list[str] = Field(default=[], description="Class of each step of the pipeline: what its settings have in common.")
    parameters: int | None = Field(default=None, description="Parameters of the dense source.")
    engine: str = Field(description="What loaded and ran the artefact.")
    kernel: str | None = Field(default=None, description="Operators that did the matrix products of one decode step, the heaviest first.")
    device: str = Field(description="Kind of device: cpu or cuda.")
    status: str = Field(
        description="Worst end of the stages: failed, oom, timeout, diverged, unsupported, incomplete (a stage has no record), ok."
    )
    source_precision: str | None = Field(default=None, description="Precision of the dense source where it was not full.")
    dtype: str = Field(description="Storage and compute type of the dense source.")
    suite: str = Field(description="What quality was measured on.")
    suite_changes: str | None = Field(default=None, description="Settings of the suite that differ from the shipped one of its name.")
    suite_protocol: str = Field(
        description="Hash of the suite's protocol and texts: only rows with the same hash may be compared in quality."
    )
    speed: str = Field(description="How speed was measured.")
    speed_protocol: str = Field(description="Hash of the speed protocol: only rows with the same hash may be compared in speed.")
    hardware: str = Field(description="Card, or processor with threads and memory, on which speed was measured.")
    fingerprint: str = Field(description="What tells that hardware from others that are called the same: a hash of what a kernel can see.")
    seed: int = Field(description="Seed of the cell.")
    flags: list[str] = Field(
        default=[], description="What a reader must know of the row: a line for each thing, that are invalid, noise or notes."
    )
    foreign: bool = Field(default=False, description="It was recorded in another results folder, and has not been adopted.")
    imported: str | None = Field(default=None, description="The tool that measured the row, where its results were imported.")
    reason: str | None = Field(default=None, description="Why the status is not ok.")
    is_reference: bool = Field(description="The uncompressed model with which the others are compared.")
    keys: Keys = Field(description="Content keys of the stages compress, quality and speed.")
    calibration: str | None = Field(default=None, description="Fingerprint of the calibration text, where it was used.")
    command: str = Field(default="", description="Command that makes the row again, with all its stages.")
    provenance: dict[str, str] = Field(default={}, description="Versions, commit and time of measurement.")


class Perplexity(Group):
    """Perplexities, alone and paired with the reference."""

    perplexity: float | None = Field(
        default=None, description="Exponential of the mean negative log-likelihood over the windows of the first corpus."
    )
    perplexity_low: float | None = Field(default=None, description="Lower bound of the perplexity, bootstrap over windows.")
    perplexity_high: float | None = Field(default=None, description="Upper bound of the perplexity, bootstrap over windows.")
    perplexity_delta_percent: float | None = Field(
        default=None, description="Perplexity above the reference in per cent, paired over windows."
    )
    perplexity_ratio_low: float | None = Field(
        default=None, description="Lower bound of perplexity / reference perplexity, paired bootstrap."
    )
    perplexity_ratio_high: float | None = Field(
        default=None, description="Upper bound of perplexity / reference perplexity, paired bootstrap."
    )
    perplexity_p: float | None = Field(
        default=None,
        description="p-value of the difference in NLL to the reference, paired t-test over windows, not corrected for several rows.",
    )
    perplexities: dict[str, float | None] = Field(
        default={}, description="Perplexity of each corpus of the suite under the first protocol."
    )
    perplexity_by_protocol: dict[str, float | None] = Field(
        default={}, description="Perplexity under each protocol: `CORPUS window TOKENS`, `CORPUS document (word)` and so on."
    )
    ood_perplexity_delta_percent: dict[str, float | None] = Field(
        default={},
        description="Perplexity above the reference in per cent on each further corpus, under the first protocol, paired over windows.",
    )
    calibration_overlap: float | None = Field(
        default=None,
        description="Fraction of the first corpus' scored n-grams that also stand in the calibration text or in one that was taught, 0..1.",
    )
    corpus: str | None = Field(default=None, description="Corpus of the perplexity.")
    stretches: list[float] = Field(default=[], description="Perplexity of each stretch of 1,024 tokens of a stream, in order.")
    recomputed: list[float] = Field(
        default=[],
        description="Of the reference, the same where each token has 512 to 1,023 tokens before it that are computed anew for it.",
    )
    stretch_bytes: list[int] = Field(default=[], description="Mean bytes that the cache held in each stretch.")


class Divergence(Group):
    """Distance of the next-token distributions from the reference's."""

    kl_mean: float | None = Field(
        default=None, description="KL(reference ‖ row) of the next-token distributions in nats, mean over the tokens of the first corpus."
    )
    kl_low: float | None = Field(default=None, description="Lower bound of the KL, bootstrap over windows.")
    kl_high: float | None = Field(default=None, description="Upper bound of the KL, bootstrap over windows.")
    kl_p99: float | None = Field(default=None, description="99th percentile of the KL over tokens, in nats.")
    kl_noise: float | None = Field(
        default=None,
        description="Noise floor of the KL: the largest of the reference's from itself in other batches, in float32, on another engine.",
    )
    top1_agreement: float | None = Field(
        default=None, description="Fraction of tokens at which row and reference hold the same token most likely, 0..1."
    )
    delta_p: float | None = Field(
        default=None, description="Mean absolute difference to the reference in the probability of the true token, 0..1."
    )


class Fidelity(Group):
    """What the row writes freely after prompts, held against what the reference writes."""

    continuations: int | None = Field(default=None, description="Prompts that row and reference have both continued greedily.")
    continuation_tokens: int | None = Field(default=None, description="Tokens of a continuation.")
    first_divergent: float | None = Field(
        default=None,
        description="Tokens of a continuation before the first that differs from the reference's, mean over prompts; all of them "
        "where none does.",
    )
    first_divergent_low: float | None = Field(default=None, description="Lower bound of that number, bootstrap over prompts.")
    first_divergent_high: float | None = Field(default=None, description="Upper bound of that number, bootstrap over prompts.")
    divergent_share: float | None = Field(
        default=None,
        description="Share of the tokens of a continuation that differ from the reference's at the same place, mean over prompts, 0..1.",
    )
    divergent_low: float | None = Field(default=None, description="Lower bound of that share, bootstrap over prompts.")
    divergent_high: float | None = Field(default=None, description="Upper bound of that share, bootstrap over prompts.")
    same_continuations: float | None = Field(default=None, description="Share of the prompts whose continuation is the reference's, 0..1.")
    divergent_at_ties: float | None = Field(
        default=None,
        description="Of the continuations that part from the reference's, the share that part where its two likeliest tokens are at most "
        "two units in the last place apart, 0..1.",
    )
    divergent_by_kind: dict[str, float | None] = Field(default={}, description="Share of divergent tokens for each kind of prompt.")
    continuations_reason: str | None = Field(default=None, description="Why the row's continuations are compared with none.")


class Accuracy(Group):
    """Zero-shot tasks, alone and paired with the reference."""

    accuracy: float | None = Field(
        default=None, description="Mean of the accuracies of the suite's zero-shot tasks, 0..1; each task weighs the same."
    )
    accuracy_se: float | None = Field(default=None, description="Standard error of the accuracy, from the variance over items.")
    accuracy_delta: float | None = Field(default=None, description="Accuracy above that of the reference on the same items.")
    accuracy_delta_low: float | None = Field(default=None, description="Lower bound of the accuracy difference, paired over items.")
    accuracy_delta_high: float | None = Field(default=None, description="Upper bound of the accuracy difference, paired over items.")
    accuracy_p: float | None = Field(default=None, description="p-value of the accuracy difference, not corrected for several rows.")
    task_accuracy: dict[str, float | None] = Field(default={}, description="Accuracy of each task.")
    task_delta: dict[str, float | None] = Field(
        default={}, description="Accuracy of each task above that of the reference on the same items."
    )
    task_p: dict[str, float | None] = Field(
        default={},
        description="p-value of each task's difference to the reference: McNemar's exact test, Holm's correction over the tasks.",
    )
    flips_to_wrong: int | None = Field(default=None, description="Items that the reference has right and the row wrong.")
    flips_to_right: int | None = Field(default=None, description="Items that the reference has wrong and the row right.")
    mcnemar_p: float | None = Field(
        default=None,
        description="p-value of McNemar's exact test of the flips over the items of all tasks, not corrected for several rows.",
    )
    group_accuracy: dict[str, float | None] = Field(
        default={}, description="Mean accuracy of the tasks of each group: knowledge, language, reasoning, social, other."
    )
    group_delta: dict[str, float | None] = Field(default={}, description="Mean accuracy of each group above that of the reference.")
    group_spread: float | None = Field(default=None, description="Largest less smallest of the groups' accuracy differences.")
    worst_task: str | None = Field(default=None, description="Task whose accuracy fell most, or rose least, against the reference.")
    worst_task_delta: float | None = Field(default=None, description="Accuracy of that task above that of the reference.")
    worst_task_low: float | None = Field(
        default=None, description="Lower bound of that difference, from the changed answers; holds for all tasks at once (Bonferroni)."
    )
    worst_task_high: float | None = Field(default=None, description="Upper bound of that difference.")


class Equivalence(Group):
    """What the row is against its reference at a margin, and what its windows and items can show at all."""

    perplexity_verdict: str | None = Field(
        default=None,
        description="equivalent, worse, better or unresolved at ± 1 % of the reference's perplexity: two one-sided tests over paired "
        "windows at 5 %, Holm's correction over the rows of the table.",
    )
    perplexity_verdict_p: float | None = Field(
        default=None, description="Corrected p-value of the verdict; of the nearest one where the row is unresolved."
    )
    perplexity_windows: int | None = Field(default=None, description="Windows that the row shares with its reference.")
    perplexity_needed: int | None = Field(
        default=None,
        description="Windows that would resolve the row with 80 % power, if its difference and their spread are the true ones; none where "
        "the row is resolved, or lies so near the margin that no number will do.",
    )
    perplexity_detectable_percent: float | None = Field(
        default=None, description="Perplexity above the reference, in per cent, that a paired test of these windows finds with 80 % power."
    )
    perplexity_apart: bool | None = Field(
        default=None,
        description="Whether the perplexity differs significantly from the next lower one of the table: paired t-test, Holm's correction "
        "over the pairs of neighbours, 5 %; none for the lowest.",
    )
    accuracy_verdict: str | None = Field(
        default=None,
        description="equivalent, worse, better or unresolved at ± 3 points of accuracy: two one-sided tests over paired items within tasks "
        "at 5 %, Holm's correction over the rows of the table.",
    )
    accuracy_verdict_p: float | None = Field(
        default=None, description="Corrected p-value of the verdict; of the nearest one where the row is unresolved."
    )
    accuracy_items: int | None = Field(default=None, description="Items that the row shares with its reference, over all tasks.")
    accuracy_needed: int | None = Field(
        default=None,
        description="Items that would resolve the row with 80 % power, if its difference and the share of changed answers are the true "
        "ones; none where the row is resolved, or lies so near the margin that no number will do.",
    )
    accuracy_detectable: float | None = Field(
        default=None, description="Difference in accuracy to the reference that a paired test of these items finds with 80 % power."
    )
    accuracy_apart: bool | None = Field(
        default=None,
        description="Whether the accuracy differs significantly from the next higher one of the table: paired test over items, "
        "Holm's correction over the pairs of neighbours, 5 %; none for the highest.",
    )


class Timing(Group):
    """One point of the speed grid."""

    prefill_ms: float | None = Field(default=None, description="Median milliseconds from prompt to first token.")
    prefill_low: float | None = Field(default=None, description="Lower bound of the prefill time, order statistics.")
    prefill_high: float | None = Field(default=None, description="Upper bound of the prefill time, order statistics.")
    prefill_speedup: float | None = Field(
        default=None, description="Prefill time of the reference / prefill time, median over pairs of adjacent runs on the same engine."
    )
    prefill_speedup_low: float | None = Field(default=None, description="Lower bound of the prefill's speed-up, order statistics.")
    prefill_speedup_high: float | None = Field(default=None, description="Upper bound of the prefill's speed-up, order statistics.")
    decode_tokens_per_s: float | None = Field(
        default=None, description="Tokens per second while decoding, of one sequence, at the median time; over texts at the mean."
    )
    decode_low: float | None = Field(default=None, description="Lower bound of the decode rate, order statistics.")
    decode_high: float | None = Field(default=None, description="Upper bound of the decode rate, order statistics.")
    speedup: float | None = Field(
        default=None,
        description="Decode time of the reference / decode time, median over pairs of adjacent runs on the same engine; of all "
        "texts together where prompts are texts.",
    )
    speedup_low: float | None = Field(default=None, description="Lower bound of the speed-up, order statistics of the paired ratios.")
    speedup_high: float | None = Field(default=None, description="Upper bound of the speed-up, order statistics of the paired ratios.")
    throughput_tokens_per_s: float | None = Field(
        default=None, description="Tokens per second while decoding, of all sequences of the batch together, at the median time."
    )
    roofline_fraction: float | None = Field(
        default=None,
        description="Least time of a decode step, if weights and KV cache came at the measured bandwidth (`roofline_bandwidth`), over the "
        "median time; above 1 the measurement is defective.",
    )


class Speed(Timing):
    """Time, memory and energy of the speed stage; the timing is that of the first point, the headline."""

    speed_point: str | None = Field(default=None, description="Batch, prompt tokens and new tokens at which speed was measured.")
    speedup_by_prompt: dict[str, float | None] = Field(
        default={},
        description="Speed-ups of the single texts of the headline, where these were several: `least`, `p10`, `median`, `p90`, `most`, and "
        "the share of them that are below 1 (`slower`).",
    )
    timed_equal: float | None = Field(
        default=None,
        description="Share of the tokens chosen in the timed runs of the first speed point that are the reference's at the same place, "
        "mean over pairs of runs, 0..1.",
    )
    temperature: float | None = Field(
        default=None, description="At which tokens were drawn while speed was measured; None where the likeliest ones were written."
    )
    roofline_bandwidth: str | None = Field(
        default=None,
        description="Whose bandwidth the roof is: `read`, or in older records `copy`, which a step may exceed.",
    )
    read_bandwidth_gbs: float | None = Field(
        default=None, description="Median of the read-bandwidth probes while the headline point was measured, GB/s."
    )
    copy_bandwidth_gbs: float | None = Field(
        default=None, description="Median of the copy-bandwidth probes while the headline point was measured, bytes read and written, GB/s."
    )
    energy_reason: str | None = Field(default=None, description="Why there is no figure of energy.")
    energy_j_per_token: float | None = Field(
        default=None,
        description="Joules for each decoded token, of the whole card (NVML) or processor package (RAPL), idle power included.",
    )
    speed_points: list[dict[str, float | int | str | None]] = Field(
        default=[], description="Every point of the speed grid: batch, prompt, new_tokens, and its numbers under the names used here."
    )
    kv_cache_bytes: int | None = Field(default=None, description="Bytes of the KV cache after the last step of the first speed point.")
    activation_bytes: int | None = Field(
        default=None, description="Peak of one run of the first speed point above weights and KV cache: activations and workspace."
    )
    process_peak_bytes: int | None = Field(
        default=None, description="Highest resident memory of the process that ran the artefact, loading included."
    )
    largest_batch: int | None = Field(
        default=None, description="Largest batch that was run with the first speed point's prompt before memory, a cap or the time ended."
    )


class Size(Group):
    """Bytes and bits of the artefact, on disk and loaded."""

    format: str | None = Field(default=None, description="Format of the artefact on disk: huggingface, packed, gguf and so on.")
    weight_bytes: int | None = Field(default=None, description="Bytes of all tensors of the loaded artefact that stay in memory.")
    offloaded_bytes: int | None = Field(
        default=None, description="Bytes of its other tensors: on disk or in host memory, brought in while their layer computes."
    )
    disk_bytes: int | None = Field(default=None, description="Bytes of the artefact's files.")
    compression_ratio: float | None = Field(default=None, description="Bytes of the dense source / bytes of the artefact's files.")
    grid: str | None = Field(
        default=None,
        description="What weights were rounded to by the last step that rounds them: symmetric or with offsets, and its range (min-max, "
        "searched, learned, fixed); codebook, float, or another grid of the method's own.",
    )
    effective_bits: float | None = Field(
        default=None, description="Bits stored for each weight of the compressed layers, scales and zeros included."
    )
    sparsity: float | None = Field(default=None, description="Fraction of zeros among the weights of the linear layers, 0..1.")
    removed: float | None = Field(
        default=None,
        description="Share of the dense model's parameters, embeddings and head included, that the loaded model has fewer; negative where "
        "it has more.",
    )


class Cache(Group):
    """The key-value cache: its bytes where a method rounds it, and of the reference beside such rows; how much of it stayed exact."""

    exact_keys: float | None = Field(
        default=None,
        description="Share of the pairs of a scored token and one before it, or itself, whose key was neither rounded nor left out nor "
        "summed up, 0..1, in the windows of the first perplexity; none where no policy decides on keys, and in older records.",
    )
    cache_bytes_1k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 1,024 tokens.")
    cache_bytes_2k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 2,048 tokens.")
    cache_bytes_4k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 4,096 tokens.")
    cache_bytes_8k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 8,192 tokens.")
    cache_bytes_16k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 16,384 tokens.")
    cache_bytes_32k: int | None = Field(default=None, description="Bytes of the KV cache of one sequence of 32,768 tokens.")

    @classmethod
    def of_sizes(cls, sizes: object, exact_keys: float | None = None) -> Cache:
        """From the bytes by number of tokens, as a claim tells them; what is no such number is left out."""
        known = sizes if isinstance(sizes, dict) else {}
        told = {f"cache_bytes_{int(tokens) // 1024}k": known[tokens] for tokens in CACHE_TOKENS if isinstance(known.get(tokens), int)}
        return cls(exact_keys=exact_keys, **told)


CACHE_TOKENS = ("1024", "2048", "4096", "8192", "16384", "32768")
"""Lengths at which a claim tells the bytes of a cache."""


class Cost(Group):
    """What the compression took."""

    compress_seconds: float | None = Field(default=None, description="Wall time of the compression.")
    compress_cpu_seconds: float | None = Field(
        default=None, description="Processor time of the compression, over all threads and children."
    )
    compress_device_hours: float | None = Field(
        default=None, description="Hours of the compression times accelerators used; none where it ran on the processor."
    )
    peak_memory_bytes: int | None = Field(default=None, description="Peak resident memory of the compression.")
    peak_device_bytes: int | None = Field(default=None, description="Peak memory of the accelerator during the compression.")
    calibration_tokens: int | None = Field(default=None, description="Tokens of calibration text that the methods were given.")
    training_tokens: int | None = Field(default=None, description="Tokens of all gradient steps, as the methods claim them.")
    trained_parameters: int | None = Field(default=None, description="Parameters updated by gradient descent, as the methods claim them.")
    tuning_free: bool | None = Field(default=None, description="No method of the pipeline trains.")


class Calibration(Group):
    """The calibration text, where one was used."""

    calibration_text: str | None = Field(default=None, description="Calibration corpus and how much of it, where it was used.")
    calibration_seed: int | None = Field(default=None, description="Seed by which the calibration text was drawn, where it was used.")

"""The result of the stage `quality`."""

from __future__ import annotations

from array import array
from functools import cached_property

from pydantic import Field, model_validator

from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.generation import GenerationResult
from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.schema.work import WorkResult


class DivergenceResult(Schema):
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


class NoiseResult(Schema):
    """How far the reference moves from itself where nothing was compressed.

    Attributes:
        what: What was different: `batches of 1` (windows), `float32` or the name of an engine.
        kl: Mean KL(reference ‖ the same weights again) in nats of each window.
        kl_mean: Mean over windows.
    """

    what: str
    kl: list[float]
    kl_mean: float


class PerplexityResult(Schema):
    """Negative log-likelihoods of one corpus under a protocol of windows with equally many labels.

    Attributes:
        protocol: Name and version: `window-1`, `incremental-1`, `llamacpp-1`.
        window_nll: Mean NLL of each window in nats, over `labels_per_window` labels.
        corpus_sha256: Hash of the text that was tokenized.
        perplexity: exp of the mean NLL of the windows that count, `scored`.
        within: Windows of a stream that end within the positions that the model was made for: these count, the others are only shown; None
            where all do.
        divergence: Distance from the reference on the same tokens that count; None for the reference itself or where it was not asked for.
        calibration_overlap: Fraction of the scored n-grams that stand in the calibration tokens of the cell too, or in text that it was
            taught; None without either.
        exact_keys: Share of the pairs of a scored token and one before it, itself included, that it attends to as without a policy: no
            policy has rounded the key, thrown it away or summed it up; None where no policy decides on keys.
        held_bytes: Mean bytes that the cache of one text holds while the labels of a window are scored, of each window of `suffix` and
            `stream`; none where the engine does not show them, and in older records.
        noise: Of the reference, what its arithmetic alone does; empty where it was not asked for.
    """

    corpus: str
    protocol: str
    corpus_sha256: str
    seqlen: int
    window_nll: list[float]
    labels_per_window: int
    perplexity: float
    within: int | None = Field(default=None, ge=1)
    divergence: DivergenceResult | None = None
    calibration_overlap: float | None = None
    exact_keys: float | None = None
    held_bytes: list[int] = []
    noise: list[NoiseResult] = []

    @property
    def scored(self) -> list[float]:
        """The NLL of the windows that perplexity and comparisons are of."""
        return self.window_nll[: self.within]


class DocumentResult(Schema):
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


class ZeroshotItems(Schema):
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


class ZeroshotResult(Schema):
    """One task. `chance` is the mean of 1 / number of choices; `stderr` is lm-eval's; `calibration_overlap` and `exact_keys` as of a
    perplexity, the latter over the answers whose likelihood was asked.

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
    exact_keys: float | None = None

    @cached_property
    def asked(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Ids and hashes of the items; read once, after which the items stay as they are."""
        return tuple(self.items.ids), tuple(self.items.hashes)

    @cached_property
    def correctness(self) -> array[float]:
        """Whether each item was right, 0..1; read once, after which the items stay as they are."""
        return array("d", self.items.correct)


class QualityResult(Schema):
    """Quality of one artefact. The first perplexity result is the headline.

    Attributes:
        work: What ran for a token, where that differs from token to token.
        generation: What it wrote after prompts, where the suite has some and the engine generates.
        imitation: How near it came to the teacher whose text it learned from; None where it learned from none.
        retrieval: What it still knew of long contexts, one result for each length.
        forward_tokens: Tokens that went through the model, padding included; 0 where they were not counted.
        seconds: Wall time of each part, by name.
        flags: One line for each fact that makes a number doubtful, such as calibration text inside the test text.
    """

    perplexity: list[PerplexityResult] = []
    documents: list[DocumentResult] = []
    zeroshot: list[ZeroshotResult] = []
    work: WorkResult | None = None
    generation: GenerationResult | None = None
    imitation: ImitationResult | None = None
    retrieval: list[RetrievalResult] = []
    evidence: Evidence | None = None
    load_seconds: float | None = None
    forward_tokens: int = 0
    seconds: dict[str, float] = {}
    flags: list[str] = []

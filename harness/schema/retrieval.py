"""What an artefact still knew of long contexts that it had read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from slimbench.harness.schema.base import Schema


class RetrievalResult(Schema):
    """Facts asked for behind contexts of one length, item by item: a question behind a context each. Never their text.

    Attributes:
        protocol: Name and version: `retrieval-1`.
        corpus_sha256: Hash of the text that was tokenized.
        length: Tokens of each context.
        needles: Facts in each.
        items_sha256: Hash of the contexts, questions and right answers as they were asked.
        context: Number of the context of each item.
        depth: Where the fact of each item begins, as a share of its context.
        correct: Whether each item was answered with the right digits, 0 or 1.
        answers_sha256: Hash of the token ids of all answers.
        cache_bytes: What the engine held of a context before the first question, the largest; None where it does not show that.
        exact_keys: Share of a context that the first token of a question attends to as without a policy, itself included: at 1 the policy
            did nothing to it; None where no policy decides on keys, and in older records.
        step_ms: Median milliseconds of a step of decoding behind each context. They are not interleaved with the reference's.
        calibration_overlap: As of a perplexity.
    """

    protocol: str
    corpus: str
    corpus_sha256: str
    length: int
    needles: int
    items_sha256: str
    context: list[int]
    depth: list[float]
    correct: list[Annotated[int, Field(ge=0, le=1)]]
    answers_sha256: str
    cache_bytes: int | None = None
    exact_keys: float | None = None
    step_ms: list[float] = []
    calibration_overlap: float | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> RetrievalResult:
        if not len(self.context) == len(self.depth) == len(self.correct):
            raise ValueError("the columns of the items differ in length")
        return self

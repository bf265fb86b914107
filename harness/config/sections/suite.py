"""What quality is measured on."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from slimbench.harness.config.sections.base import Folders, Strict, Texts, Uris, Whole
from slimbench.util.text import nearest


@dataclasses.dataclass(frozen=True)
class Pass:
    """One perplexity measurement of a suite: a corpus under a protocol.

    Attributes:
        protocol: `window`, `incremental`, `llamacpp`, `suffix`, `stream`, `recomputed` or `document`.
        seqlen: Tokens of a window; no meaning for documents.
        limit: Windows or documents at most, None for all.
    """

    corpus: str
    protocol: str
    seqlen: int
    limit: int | None

    @property
    def is_stream(self) -> bool:
        """Whether it is of one text alone, told in stretches of `STRETCH` tokens."""
        return self.protocol in ("stream", RECOMPUTED)


BATCH_TOKENS = 1024
"""Tokens of the windows that are scored at once."""
STRETCH = 1024
"""Labels of each window of a stream."""
PROTOCOLS = ("window", "incremental", "llamacpp", "suffix", "stream", "recomputed", "document")
RECOMPUTED = "recomputed"


class RetrievalConfig(Strict):
    """Facts that are hidden in long texts, and asked for once these were read (`slimbench.tasks.retrieval`).

    Attributes:
        corpus: Text around them: a name from `slimbench assets list`, `file:PATH` or `hf:PATH:CONFIG:SPLIT:FIELD`; neither the suite's nor
            calibration text.
        lengths: Tokens of a context, one length or several.
        contexts: Contexts of each length.
        needles: Facts in each context.
        questions: Of these, asked for behind each context.
        seed: Draws names, digits, places and what is asked.
    """

    corpus: str = Field(min_length=1)
    lengths: list[Annotated[Whole, Field(ge=64)]] = Field(default=[1024, 2048, 4096], min_length=1)
    contexts: Whole = Field(default=12, ge=2, le=1000)
    needles: Whole = Field(default=4, ge=1, le=32)
    questions: Whole = Field(default=4, ge=1, le=32)
    seed: Whole = Field(default=0, ge=0)

    @field_validator("lengths", mode="before")
    @classmethod
    def _one_or_several(cls, lengths: object) -> object:
        return lengths if isinstance(lengths, list) else [lengths]

    @field_validator("lengths")
    @classmethod
    def _each_once(cls, lengths: list[int]) -> list[int]:
        if twice := [length for place, length in enumerate(lengths) if length in lengths[:place]]:
            raise ValueError(f"{twice[0]} stands there twice")
        return lengths

    @model_validator(mode="after")
    def _asks_for_what_is_there(self) -> RetrievalConfig:
        if self.questions > self.needles:
            raise ValueError(f"questions must be at most needles, {self.needles}, not {self.questions}")
        return self


class SuiteConfig(Strict):
    """What quality is measured on, and by which protocol.

    Attributes:
        name: How records and board call it.
        corpus: Text for perplexity, one or several of: a name from `slimbench assets list`, `file:PATH`, `hf:PATH:CONFIG:SPLIT:FIELD`.
            The first one is the headline, the others are out-of-domain text beside it. None: no text is scored.
        protocols: `window`, `incremental` (through the KV cache), `llamacpp` (second half of each window), `suffix` (the same, behind its
            first half as a prompt), `stream` (one text of so many tokens through one cache, in windows of 1,024), `recomputed` (of the
            reference alone, the labels of `stream`, each behind 512 to 1,023 tokens that are computed anew) or `document` (lm-eval's
            rolling likelihood); `NAME@TOKENS` for another length than `seqlen`. The first is the headline and is measured on every
            corpus, the others on the first corpus only, on equally many tokens.
        seqlen: Tokens of a window.
        windows: Windows of `seqlen` scored at most, taken evenly over the corpus; None for all.
        documents: Documents scored at most under `document`, taken evenly; None for all.
        chunk: Tokens that go through the cache at once under `incremental`.
        add_bos: Put the beginning-of-sequence token before each window.
        divergence: Compare the next-token distributions with the reference's on the same tokens.
        top_k: Tokens of the reference's distribution that are kept for it one by one.
        noise_windows: Windows on which the reference is compared with itself in another arithmetic; None for none.
        include_path: Folders of lm-eval task YAMLs of one's own. Beside them are always the shipped tasks, and those of lm-eval.
        tasks: Names of zero-shot tasks.
        limit: Items of each task at most; None for all.
        sample_seed: Draws those from the whole of each task; None takes the first.
        num_fewshot: Examples before each question.
        continuations: Tokens by which each packaged prompt is continued greedily, to be held against the reference's; None: no prompts.
        retrieval: Facts in long contexts, asked for once these were read; None: none.
        batch_tokens: Tokens of one zero-shot batch at most. No part of the protocol.
    """

    name: str
    corpus: Texts = []
    protocols: Uris = ["window"]
    seqlen: Whole = Field(default=512, ge=8)
    windows: Whole | None = Field(default=None, ge=1)
    documents: Whole | None = Field(default=None, ge=1)
    chunk: Whole = Field(default=64, ge=1)
    add_bos: bool = False
    divergence: bool = True
    top_k: Whole = Field(default=1024, ge=1)
    noise_windows: Whole | None = Field(default=None, ge=1)
    include_path: Folders = []
    tasks: Uris = []
    limit: Whole | None = Field(default=None, ge=1)
    sample_seed: Whole | None = Field(default=None, ge=0)
    num_fewshot: Whole = Field(default=0, ge=0)
    continuations: Whole | None = Field(default=None, ge=1, le=4096)
    retrieval: RetrievalConfig | None = None
    batch_tokens: Whole = Field(default=1024, ge=1)

    @field_validator("protocols")
    @classmethod
    def _known_protocols(cls, protocols: list[str]) -> list[str]:
        for text in protocols:
            name, at, length = text.partition("@")
            if name not in PROTOCOLS:
                raise ValueError(f"'{text}' is no valid choice{nearest(name, PROTOCOLS)}")
            if at and (not length.isdigit() or int(length) < 8 or name == "document"):
                raise ValueError(f"'{text}' is not of the form NAME@TOKENS with at least 8 tokens")
            if at and name in ("stream", RECOMPUTED) and int(length) % STRETCH:
                raise ValueError(f"'{text}' has not a multiple of 1,024 tokens")
        if not protocols or protocols[0] == "document":
            raise ValueError("the first protocol is the headline and must score windows")
        if protocols[0].partition("@")[0] == RECOMPUTED:
            raise ValueError(f"'{RECOMPUTED}' is of the reference alone and cannot be the headline; put 'stream' before it")
        return protocols

    @property
    def texts(self) -> list[str]:
        """The corpora that anything is measured on."""
        return [*self.corpus, *([self.retrieval.corpus] if self.retrieval else [])]

    @property
    def is_empty(self) -> bool:
        """Whether it asks for nothing that could be measured."""
        return not self.texts and not self.tasks and not self.continuations

    def passes(self) -> list[Pass]:
        """Every perplexity measurement, the headline first."""
        first, *others = self.protocols
        return [self._pass(c, first) for c in self.corpus] + [self._pass(self.corpus[0], p) for p in others if self.corpus]

    def _pass(self, corpus: str, protocol: str) -> Pass:
        name, _, length = protocol.partition("@")
        if name == "document":
            return Pass(corpus, name, self.seqlen, self.documents)
        seqlen = int(length or self.seqlen)
        return Pass(corpus, name, seqlen, None if self.windows is None else max(1, self.windows * self.seqlen // seqlen))

"""What methods do whose work depends on the token, and what was taught: groups of a record that most records do not have."""

from __future__ import annotations

from slimbench.harness.schema.base import Schema


class Spread(Schema):
    """How a count is spread over tokens: its mean, and the 5th, 50th and 95th percentile."""

    mean: float
    p5: float
    p50: float
    p95: float


class WorkResult(Schema):
    """What ran for a token, counted while it ran; None where all of it always runs.

    Attributes:
        tokens: That were counted, of `prompts` texts.
        blocks: Decoder blocks that ran.
        experts: Experts of a layer that ran.
        active_parameters: Parameters that took part.
        cache_tokens: Tokens whose keys and values were read.
        flags: One line for each point in which the claim differs.
    """

    tokens: int
    prompts: int
    blocks: Spread | None = None
    experts: Spread | None = None
    active_parameters: Spread | None = None
    cache_tokens: Spread | None = None
    flags: list[str] = []


class TeachingFacts(Schema):
    """The text that a teacher wrote for a compression.

    Attributes:
        teacher: Name and revision.
        recipe: Name of the recipe by which it was asked.
        asked: Examples that were asked for; `kept` passed the filters.
        tokens: Tokens of the kept examples.
        seconds: Wall time of the teacher, also where its text was there already (`reused`).
        sha256: Hash of the text.
    """

    teacher: str
    recipe: str
    asked: int
    kept: int
    tokens: int
    seconds: float
    reused: bool = False
    sha256: str

"""What methods do whose work depends on the token, and what was taught: groups of a record that most records do not have."""

from __future__ import annotations

from slimbench.harness.schema.base import Schema

WHOLE, DRAFT = "model", "draft"
"""Parts of what runs: the model, and a draft model beside it."""


class Spread(Schema):
    """How a count is spread over tokens: its mean, and the 5th, 50th and 95th percentile."""

    mean: float
    p5: float
    p50: float
    p95: float


class ScoredWork(Schema):
    """What ran for the tokens of the first corpus while they were scored, counted by hooks in the very passes that give its perplexity.

    Attributes:
        tokens: That went through the model, those before the first label of a window too.
        blocks: Decoder blocks that ran for one of them, mean.
        blocks_p5: Their 5th percentile over tokens; None where the policy does not say what each token ran, or hooks saw other sums.
        blocks_p95: Their 95th percentile.
        by_blocks: How many tokens ran so many blocks; empty where percentiles are None.
        active_parameters: Parameters of matrices that took part in one of them, each as often as it did, mean.
    """

    tokens: int
    blocks: float
    blocks_p5: float | None = None
    blocks_p95: float | None = None
    by_blocks: dict[str, int] = {}
    active_parameters: float


class WorkResult(Schema):
    """What ran for a token, counted while it ran; None where all of it always runs, and of what the engine does not show.

    Attributes:
        slots: Parts of the run that a policy decides on.
        tokens: That were counted, of `prompts` texts.
        prompt_tokens: Tokens of each text before them.
        passes: Of the model to its end, for all of these tokens; fewer where a draft was accepted.
        pass_rows: How many passes had so many tokens, guesses included.
        pass_tokens: How many passes gave so many tokens: the guesses that were taken, and one.
        calls: Matrices of the model that took part in calls of so many rows, in models: 1 is all of them once, without experts and without
            those of a draft model. By the times of passes of so many rows it tells what the tokens should take.
        part_calls: The same of each part, in parts, where the time of one is not its share of a pass of the model: `draft` is a draft
            model, `model` what belongs to no part. Empty where all calls are of the model.
        part_bytes: Bytes of the matrices of each part; a head that is the embedding too counts its table.
        read_bytes: Bytes that the calls of each part read: a matrix once in each call, however many rows it has.
        draft_passes: Of a draft model to its end.
        text_passes: Of each text its passes, where a draft acts.
        text_drafted: Of each text the tokens that were guessed and checked.
        text_accepted: Of each text those of them that were taken.
        total_parameters: Of all matrices, the head's among them.
        blocks: Decoder blocks that ran, those of a draft model among them.
        experts: Experts of a layer that a token was sent to, over tokens and layers; None where no layer has some.
        active_parameters: Parameters of matrices that took part, each as often as it did.
        cache_tokens: Tokens whose keys and values an attention was given.
        cache_read_bytes: Of the keys and values that the attentions of a token were given, mean; None where attentions are not torch's own,
            where keys are rounded, and of drafts.
        cache_bytes: Of the largest cache at the end of a text.
        draft_cache_bytes: Of these, what a draft model holds.
        repeated_4grams: Share of the runs of four tokens in what was written that stood in the same text before, its prompt apart.
        equal: Share of the tokens that the same engine writes without guesses too, place by place; None where that was not tried.
        temperature: At which tokens were drawn; None where the likeliest ones were written.
        drawn_p: Probability that tokens which the model draws lie as far from what is expected (see `harness.measure.dynamic.drawn`); None
            where none were drawn, or all are all but certain.
        parted_by_rounding: Texts of other tokens, of which each is one that the model would choose behind the text before it, up to
            rounding (`measure.dynamic.written.unlikely`): no change by guesses.
        scored: What ran while the first corpus was scored; None where how much runs does not depend on the text, and of timed texts.
        stepwise_gap: Perplexity of some windows token by token over that of the record, less 1; None where all were scored so, windows have
            more than 1,024 labels, or drafts leave logits alone.
        stepwise_nll: Of these windows, the first ones, mean -log p token by token; two of them, or sixteen where two differ. Empty in
            records from before it was kept.
        flags: One line for each point in which the claim differs.
    """

    slots: list[str] = []
    tokens: int
    prompts: int
    prompt_tokens: int | None = None
    passes: int | None = None
    pass_rows: dict[str, int] = {}
    pass_tokens: dict[str, int] = {}
    calls: dict[str, float] = {}
    part_calls: dict[str, dict[str, float]] = {}
    part_bytes: dict[str, int] = {}
    read_bytes: dict[str, int] = {}
    draft_passes: int | None = None
    text_passes: list[int] = []
    text_drafted: list[int] = []
    text_accepted: list[int] = []
    total_parameters: int | None = None
    blocks: Spread | None = None
    experts: Spread | None = None
    active_parameters: Spread | None = None
    cache_tokens: Spread | None = None
    cache_read_bytes: int | None = None
    cache_bytes: int | None = None
    draft_cache_bytes: int | None = None
    repeated_4grams: float | None = None
    equal: float | None = None
    temperature: float | None = None
    drawn_p: float | None = None
    parted_by_rounding: int | None = None
    scored: ScoredWork | None = None
    stepwise_gap: float | None = None
    stepwise_nll: list[float] = []
    flags: list[str] = []


class TeachingFacts(Schema):
    """The text that a teacher wrote for a compression.

    Attributes:
        teacher: Name and revision.
        recipe: Name of the recipe by which it was asked.
        asked: Rows that were looked at: those that were kept in the end, and all that were rejected on the way.
        kept: Rows that passed all filters; a row may make several examples.
        rejected: Rows and answers by the reason for which they did not stay, of all stages.
        train: Examples that students learn from; `held_out` those that none sees.
        dropped: Held-out examples that were left out, since they were too like one to train on.
        max_rouge_l: The largest of a held-out prompt with one to train on, 0..1; None where the recipe does not compare them.
        max_rouge_l_answers: The same of responses, for which none was left out.
        tokens: That the teacher wrote, of all answers, those that were rejected too.
        seconds: Wall time of the teacher, also where its text was there already (`reused`).
        sha256: Hash of the text.
    """

    teacher: str
    recipe: str
    asked: int
    kept: int
    rejected: dict[str, int] = {}
    train: int | None = None
    held_out: int | None = None
    dropped: int | None = None
    max_rouge_l: float | None = None
    max_rouge_l_answers: float | None = None
    tokens: int
    seconds: float
    reused: bool = False
    sha256: str

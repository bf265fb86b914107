"""What two cells have on the same windows or documents: perplexity, and the distance from their reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from pydantic import BaseModel, ConfigDict

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.schema.quality import DocumentResult, PerplexityResult, QualityResult
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import significance
from slimbench.harness.stats.bootstrap import Estimate, attempt, exp_or_inf
from slimbench.harness.stats.equivalence import detectable, items_to_detect
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.pairing import documents_of, name_of, partners, windows_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import shorten

_LONGEST = 60


class Result(BaseModel):
    """Part of a comparison."""

    model_config = ConfigDict(frozen=True)


class Difference(Result):
    """An estimate with its 95 % interval; bounds are None where the samples allow none."""

    value: float
    low: float | None
    high: float | None


class TextComparison(Result):
    """Perplexity of A over that of B on the same windows or documents.

    Attributes:
        name: Corpus and protocol.
        items: Number of windows or documents.
        ratio: Perplexity of A / perplexity of B, paired bootstrap.
        p: Paired t-test of the negative log-likelihoods.
        unpaired_se: Standard error of the mean difference in NLL (nats a token, or a word) if the items were not shared; `paired_se`: as
            they are.
        pairing_gain: unpaired_se / paired_se; None where all items differ by the same.
        detectable_percent: Difference in perplexity, in per cent, that so many items find with 80 % power.
    """

    name: str
    items: int
    a: float
    b: float
    ratio: Difference
    p: float | None
    unpaired_se: float | None
    paired_se: float | None
    pairing_gain: float | None
    detectable_percent: float | None

    def needed(self, percent: float) -> int | None:
        """How many items would find a difference of so many per cent with 80 % power; None where their spread is not known."""
        if self.paired_se is None:
            return None
        return items_to_detect(self.paired_se * math.sqrt(self.items), math.log1p(percent / 100))


class MeanComparison(Result):
    """A mean over the same items of both: the KL from the reference that both have, in nats a window, or a sign of likeness an example.

    Attributes:
        delta: A - B, with its paired bootstrap interval over items.
        p: Paired t-test over the items.
    """

    items: int
    a: float
    b: float
    delta: Difference
    p: float | None


class ImitationComparison(Result):
    """How near two students of one text came to their teacher, on the same held-out examples.

    Attributes:
        answers: Of the perplexity of the teacher's answers, over their tokens; its items are examples.
        likeness: By name: ROUGE-L of their own answers; and, where both were looked at, the share of an answer's tokens on which they
            agree with their teacher, and the share of their own answers that are of the recipe's form.
    """

    recipe: str
    answers: TextComparison
    likeness: dict[str, MeanComparison]


def imitation(ours: QualityResult, theirs: QualityResult) -> ImitationComparison | None:
    """Two students against each other; None where they were not held against the same examples of one text."""
    a, b = ours.imitation, theirs.imitation
    if not a or not b or (a.protocol, a.text_sha256, a.tokens) != (b.protocol, b.text_sha256, b.tokens):
        return None
    recipe = shorten(str(clean(a.recipe)), _LONGEST)
    values = exp_or_inf(a.nll_per_token), exp_or_inf(b.nll_per_token)
    unknown = Estimate(math.nan, math.nan, math.nan)
    ratio = attempt(stats.document_ratio_interval, a.nll, b.nll, a.tokens, otherwise=unknown)
    if not math.isfinite(ratio.value):
        return None
    shares = {name: (one, other) for (name, one), (_, other) in zip(likeness(a), likeness(b), strict=True) if one and other}
    return ImitationComparison(
        recipe=recipe,
        answers=_text(f"answers of {recipe}", values, ratio, a.nll, b.nll, mean(a.tokens)),
        likeness={name: _means(*of) for name, of in shares.items()},
    )


def likeness(found: ImitationResult) -> list[tuple[str, list[float] | None]]:
    """Each sign of how like its teacher a student answers, by example; None where it was not looked at."""
    agreed = None if found.agreed is None else [same / count for same, count in zip(found.agreed, found.tokens, strict=True)]
    formed = None if found.formed is None else [float(formed) for formed in found.formed]
    return [("ROUGE-L of its own", found.rouge_l), ("tokens that are its likeliest", agreed), ("of the recipe's form", formed)]


def _means(ours: Sequence[float], theirs: Sequence[float]) -> MeanComparison:
    changes = [x - y for x, y in zip(ours, theirs, strict=True)]
    low, high = attempt(stats.mean_interval, changes, otherwise=(math.nan, math.nan))
    p = finite(attempt(significance.paired_p_value, ours, theirs, otherwise=math.nan))
    delta = difference(Estimate(mean(changes), low, high))
    return MeanComparison(items=len(changes), a=mean(ours), b=mean(theirs), delta=delta, p=p)


def headline(index: Index, a: Row, b: Row) -> TextComparison | None:
    """The first text that two cells share, A against B; None where they share none."""
    ours, theirs = index.quality_of(a), index.quality_of(b)
    return next(iter(texts(ours, theirs)), None) if ours and theirs else None


def divergence(index: Index, a: Row, b: Row) -> MeanComparison | None:
    """The KL of two rows from one and the same reference, on the windows of the first text; None where they do not share both."""
    records = [index.of_row(row, Stage.QUALITY) for row in (a, b)]
    ours, theirs = (record.quality if record else None for record in records)
    if not ours or not theirs or len({record.cell.reference.quality for record in records if record}) > 1:
        return None
    one, other = next(iter(partners(ours.perplexity, theirs.perplexity, windows_of)), (None, None))
    if not one or not other or not one.divergence or not other.divergence:
        return None
    kl, its = one.divergence.kl, other.divergence.kl
    if len(kl) != len(its) or not kl:
        return None
    return _means(kl, its)


def texts(ours: QualityResult, theirs: QualityResult) -> list[TextComparison]:
    windows = [_windows(a, b) for a, b in partners(ours.perplexity, theirs.perplexity, windows_of) if b]
    return windows + [_documents(a, b) for a, b in partners(ours.documents, theirs.documents, documents_of) if b]


def _windows(a: PerplexityResult, b: PerplexityResult) -> TextComparison:
    ratio = stats.perplexity_ratio_interval(a.scored, b.scored)
    values = stats.perplexity(a.scored), stats.perplexity(b.scored)
    return _text(name_of(a), values, ratio, a.scored, b.scored)


def _documents(a: DocumentResult, b: DocumentResult) -> TextComparison:
    ratio = stats.document_ratio_interval(a.nll, b.nll, a.words)
    return _text(f"{name_of(a)} (word)", (a.word_perplexity, b.word_perplexity), ratio, a.nll, b.nll, mean(a.words) or 1.0)


def _text(name: str, values: tuple[float, float], ratio: Estimate, a: list[float], b: list[float], units: float = 1.0) -> TextComparison:
    """A comparison of items whose negative log-likelihoods are sums over so many units on the average, to which the perplexity belongs."""
    errors = significance.standard_errors(a, b)
    return TextComparison(
        name=name,
        items=len(a),
        a=values[0],
        b=values[1],
        ratio=difference(ratio),
        p=finite(significance.paired_p_value(a, b)),
        unpaired_se=finite(errors.unpaired / units),
        paired_se=finite(errors.paired / units),
        pairing_gain=finite(errors.gain),
        detectable_percent=finite(100 * (exp_or_inf(detectable(errors.paired / units, len(a))) - 1)),
    )


def difference(estimate: Estimate) -> Difference:
    """An estimate whose bounds may not be finite."""
    return Difference(value=estimate.value, low=finite(estimate.low), high=finite(estimate.high))


def finite(value: float) -> float | None:
    """The value; None where it is none."""
    return value if math.isfinite(value) else None

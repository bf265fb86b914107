"""What the board knows of one cell: a row of groups of numbers, flat under documented names."""

from __future__ import annotations

from pydantic import Field

from slimbench.harness.stats.bootstrap import normal_quantile
from slimbench.leaderboard.rows.groups import (
    Accuracy,
    Cache,
    Calibration,
    Cost,
    Divergence,
    Equivalence,
    Fidelity,
    Group,
    Identity,
    Perplexity,
    Size,
    Speed,
)
from slimbench.leaderboard.rows.results.retrieval import Retrieval
from slimbench.leaderboard.rows.results.work import Work


class Row(Calibration, Cost, Work, Retrieval, Cache, Size, Speed, Equivalence, Accuracy, Fidelity, Divergence, Perplexity, Identity):
    """One cell of the board: its groups, and what it is among the other rows."""

    rank: int | None = Field(
        default=None,
        description="First place that the row may hold in its table by perplexity: 1 + number of rows with a significantly lower one, "
        "paired t-tests over windows, Holm's correction over all pairs, 5 %. None for further seeds of a row: they do not count here.",
    )
    rank_last: int | None = Field(
        default=None,
        description="Last such place: number of ranked rows less those with a significantly higher perplexity; "
        "rows that do not differ significantly share at least one place.",
    )
    accuracy_rank: int | None = Field(
        default=None,
        description="First place that the row may hold by accuracy: 1 + number of rows with a significantly higher one, paired tests over "
        "items within tasks, Holm's correction over all pairs, 5 %.",
    )
    accuracy_rank_last: int | None = Field(default=None, description="Last such place, as of `rank_last`.")
    replicate: str | None = Field(
        default=None, description="What tells the row from others of its pipeline and engine: calibration text, seeds, or its quality key."
    )
    replicates: int | None = Field(
        default=None, description="Perplexities of rows that differ in nothing but seeds, that of this one included."
    )
    perplexity_seed_sd: float | None = Field(default=None, description="Standard deviation of those perplexities.")
    perplexity_seed_min: float | None = Field(default=None, description="Lowest of those perplexities.")
    perplexity_seed_max: float | None = Field(default=None, description="Highest of those perplexities.")

    @classmethod
    def of(cls, *groups: Group) -> Row:
        """A row of its groups, one of each kind; they are clean already."""
        return cls.model_construct(**{name: value for group in groups for name, value in group})

    @property
    def perplexity_delta_low(self) -> float | None:
        """Lower bound of `perplexity_delta_percent`."""
        return None if self.perplexity_ratio_low is None else 100 * (self.perplexity_ratio_low - 1)

    @property
    def perplexity_delta_high(self) -> float | None:
        """Upper bound of `perplexity_delta_percent`."""
        return None if self.perplexity_ratio_high is None else 100 * (self.perplexity_ratio_high - 1)

    @property
    def loss_percent(self) -> float | None:
        """Perplexity above the reference, in per cent: `perplexity_delta_percent`, and 0 of the reference itself."""
        return 0.0 if self.is_reference and self.perplexity is not None else self.perplexity_delta_percent

    @property
    def held_bytes(self) -> int | None:
        """Bytes of the weights, wherever they are kept while their layer does not compute."""
        return None if self.weight_bytes is None else self.weight_bytes + (self.offloaded_bytes or 0)

    @property
    def accuracy_low(self) -> float | None:
        """Lower bound of the accuracy's 95 % interval."""
        return self._accuracy_bound(-1)

    @property
    def accuracy_high(self) -> float | None:
        """Upper bound of the accuracy's 95 % interval."""
        return self._accuracy_bound(1)

    def _accuracy_bound(self, sign: int) -> float | None:
        if self.accuracy is None or self.accuracy_se is None:
            return None
        return self.accuracy + sign * normal_quantile(0.95) * self.accuracy_se

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
    def place(self) -> tuple[str, str, str, str]:
        """What identifies the row: its three task keys and its hardware."""
        return self.keys.compress, self.keys.quality, self.keys.speed, self.fingerprint

    @property
    def table_key(self) -> tuple[str, ...]:
        """What rows must share to stand in one table: model, suite, speed protocol, device and hardware."""
        return self.model, self.suite, self.suite_protocol, self.speed, self.speed_protocol, self.device, self.hardware, self.fingerprint

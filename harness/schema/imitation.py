"""How near a student came to its teacher on examples that were held out."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from slimbench.harness.schema.base import Schema


class ImitationResult(Schema):
    """Column by column and equally many in each, in the order of the held-out examples; never their text.

    Attributes:
        protocol: Name and version: `imitation-1`.
        recipe: By which the teacher was asked.
        text_sha256: Hash of the whole text, as in the facts of its teaching.
        tasks: Which of the recipe's tasks each example is of.
        nll: −log p of the teacher's response, its end included, in nats, summed over `tokens`.
        rouge_l: Of the model's own answer with the response, F measure.
        right: Whether the answer ends with the right one; None where there is none.
        agreed: Of `tokens`, those that are the model's likeliest behind the ones before; None where it was not looked at.
        formed: Whether the model's own answer came to an end and has the fixed words of the recipe's; None where it was not looked at.
    """

    protocol: str
    recipe: str
    text_sha256: str
    tasks: list[str]
    nll: list[float]
    tokens: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    rouge_l: list[float]
    right: list[bool | None]
    agreed: list[Annotated[int, Field(ge=0)]] | None = None
    formed: list[bool] | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> ImitationResult:
        columns = (self.tasks, self.nll, self.tokens, self.rouge_l, self.right, self.agreed, self.formed)
        if len({len(column) for column in columns if column is not None}) > 1:
            raise ValueError("the columns of the examples differ in length")
        if any(agreed > tokens for agreed, tokens in zip(self.agreed or (), self.tokens, strict=False)):
            raise ValueError("more tokens agree than a response has")
        return self

    @property
    def nll_per_token(self) -> float:
        """Of all responses together, in nats."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def mean_rouge_l(self) -> float:
        return sum(self.rouge_l) / len(self.rouge_l)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among those that have one."""
        known = [right for right in self.right if right is not None]
        return sum(known) / len(known) if known else None

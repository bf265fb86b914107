"""Who teaches, and by which recipe."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sections.base import Real, Strict, Whole
from slimbench.harness.config.sources import choice
from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching import data_set
from slimbench.tasks.teaching.endpoint import check_address
from slimbench.tasks.teaching.recipe import Recipe, read
from slimbench.util.writing.teaching import TeacherError


class TeacherConfig(Strict):
    """Who writes the text that some methods train on, and how much of it.

    Attributes:
        source: `self`, the cell's dense model; `file:FOLDER` or `hf:ORG/NAME`, a model that is loaded here; or `http://HOST:PORT/v1`, a
            server that speaks the protocol of OpenAI's chat completions.
        model: As a server calls it.
        revision: Of a hub model; or of a server's model, in the user's own words, since no server tells.
        key_variable: Name of the environment variable that holds a server's key.
        licence: Of what the teacher writes, as far as it has one; manifests say it.
        examples: Rows that a recipe begins with, or grows.
        seed: Of the draws of rows and answers.
        at_once: Requests under way at a server.
        timeout_s: Seconds for one answer of a server.
        attempts: For one answer.
    """

    source: str = "self"
    model: str | None = Field(default=None, coerce_numbers_to_str=True)
    revision: str | None = Field(default=None, coerce_numbers_to_str=True)
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    licence: str | None = None
    examples: Whole = Field(default=256, ge=1)
    seed: Whole = Field(default=0, ge=0)
    at_once: Whole = Field(default=4, ge=1, le=256)
    timeout_s: Real = Field(default=120.0, gt=0)
    attempts: Whole = Field(default=5, ge=1, le=20)

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source == "self" or urlsplit(source).scheme in ("file", "hf"):
            return source
        try:
            check_address(source)
        except TeacherError as error:
            raise ValueError(f"none of self, file:FOLDER and hf:ORG/NAME: {error}") from error
        return source

    @property
    def kind(self) -> Literal["self", "model", "endpoint"]:
        """Which of the three it is."""
        if self.source == "self":
            return "self"
        return "endpoint" if urlsplit(self.source).scheme in ("http", "https") else "model"


def require_asked(asked: Recipe, who: TeacherConfig) -> None:
    """Raise `ConfigError` for a teacher that a recipe never asks: it would stand in the key and in the record all the same."""
    if who.kind != "self" and not asked.asking:
        raise ConfigError(f"recipe '{asked.name}' asks nobody, and {who.source} would be named for nothing; take teacher.source=self")


def recipe(name: str) -> Recipe:
    """The recipe of a name, its stages checked against one another.

    Raises:
        ConfigError: There is none of that name, or its file is none.
    """
    content: Any = choice("recipe", name)
    try:
        return data_set.checked(read(name, content))
    except DataError as error:
        raise ConfigError(str(error)) from error

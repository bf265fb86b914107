"""The meaning of settings, read from docstrings; their choices, read from types."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from slimbench.harness.config.meaning import choices, meanings


class Base:
    """A base.

    Attributes:
        kept: What the base says
            in two lines: with a colon.
        told_again: What the base says.

    Args:
        argument: No attribute.
    """


class Derived(Base):
    """One line.

    Attributes:
        told_again: What the class says, which holds.
        own (int): Its own.
    """


class Silent(Derived):
    pass


def test_a_class_says_what_its_settings_mean_and_its_bases_say_the_rest() -> None:
    expected = {
        "kept": "What the base says in two lines: with a colon.",
        "told_again": "What the class says, which holds.",
        "own": "Its own.",
    }
    assert meanings(Derived) == meanings(Silent) == expected


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Literal[2, 3, 4], "2, 3 or 4"),
        (Literal[32, 64] | None, "32, 64 or null"),
        (Literal["mse"] | None, "mse or null"),
        (Literal[True] | None, "true or null"),
        (int | None, "an integer or null"),
        (bool, "true or false"),
        (float, "a number"),
        (dict[str, Any], ""),
        (tuple[float, ...], "a list of numbers"),
        (tuple[int, ...] | None, "a list of integers or null"),
    ],
)
def test_the_choices_of_a_setting_come_from_its_type(annotation: Any, expected: str) -> None:
    assert choices(annotation) == expected

"""How the numbers of a key-value cache are stored; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHUNK = 64
"""Tokens that go through a cache at once while a text is scored, or as many as divide these and the residual."""


@dataclass(frozen=True)
class Scheme:
    """How keys, or values, are stored.

    Attributes:
        number: Integers on a uniform grid, or e4m3 floats of 8 bits.
        bits: Bits of a number, before scales.
        axis: What shares a scale: numbers of one `token` and head, or one `channel` of a head over consecutive tokens.
        group_size: Numbers that share a scale; None: all of a token and head.
        symmetric: Integers: grid centred on zero; else from the smallest to the largest number.
        scaled: Floats: divided by a scale; else cast as they are.
    """

    number: Literal["int", "e4m3"] = "int"
    bits: Literal[2, 4, 8] = 8
    axis: Literal["token", "channel"] = "token"
    group_size: int | None = None
    symmetric: bool = False
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.axis == "channel" and self.group_size is None:
            raise ValueError("numbers of a channel share scales in groups of tokens: group_size is missing")
        if self.number == "e4m3" and (self.bits != 8 or self.axis != "token" or self.group_size):
            raise ValueError("e4m3 floats have 8 bits and one scale a token")

"""Times as people write them."""

from __future__ import annotations

import re

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """The seconds of a duration such as `30s`, `150m`, `2h` or `1d`.

    Raises:
        ValueError: It is none; the message is one line.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not match:
        raise ValueError(f"'{text}' is no duration; give it as 30s, 150m or 2h")
    return float(match[1]) * _SECONDS[match[2]]

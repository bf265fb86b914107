"""What an answer of a model is, before anything is asked of it, and when it is the right one.

An answer is data of a stranger. It must be an answer at all: not empty, not longer than its limit allows, without control characters and
floods of white space, and without the marks by which templates of chats tell roles apart, with which a text could speak in another's name
to a model that is trained on it.
"""

from __future__ import annotations

import re

from slimbench.util.teaching import Completion, Sampling

CHARACTERS_PER_TOKEN = 12
"""A token of ordinary text has four; an answer of more than this many for each token of its limit is none."""

_MARKS = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>|</?s>|<(?:eos|bos|pad|unk)>|\[/?INST\]|\[/?TOOL_\w+\]|<</?SYS>>|\[\|\w+\|\]|<(?:start|end)_of_turn>",
    re.IGNORECASE,
)
_CANARY = re.compile(r"canary\s{1,9}guid", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FLOOD = re.compile(r"\s{40}")


def unfit(answer: Completion, sampling: Sampling) -> str | None:
    """Why an answer is none, or None where it is one."""
    if answer.finish in ("malformed", "refused"):
        return answer.finish
    if len(answer.text) > sampling.max_tokens * CHARACTERS_PER_TOKEN:
        return "longer than its limit"
    if not answer.text.strip():
        return "empty"
    for reason, pattern in (("control characters", _CONTROL), ("white space", _FLOOD), ("canary of a benchmark", _CANARY)):
        if pattern.search(answer.text):
            return reason
    return "marks of a chat" if _MARKS.search(answer.text) else None


def plain(text: str) -> str:
    """A short answer as it is compared: without case, and without white space, quotes, marks of emphasis and full stops around it."""
    return text.strip().lstrip("\"'`* ").rstrip("\"'`*. \n").casefold()


def ends_with(text: str, gold: str) -> bool:
    """Whether an answer ends with the right one: as its own word or number, not as the end of a longer one."""
    said, right = plain(text), plain(gold)
    if not right or not said.endswith(right):
        return False
    before = said[: -len(right)]
    return not before or not (before[-1].isalnum() or before[-1] in "-.,/" or (before[-1] == "−"))

"""What a flag means: whether it takes a figure away, widens it, or is only a fact to know. Records hold texts; here they are told apart.

- *invalid*: the row is not of what its name says, or a figure of it is not what its column says. No decision rests on such a figure.
- *noise*: a figure is right, but less certain than its interval says.
- *note*: a fact to know; every figure stands.

A text that is not known here, of a record of another version, is a note: it is shown like any other. A test holds every text that the
code writes, and every one of the committed records, against this list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class Kind(StrEnum):
    INVALID = "invalid"
    NOISE = "noise"
    NOTE = "note"


class Figure(StrEnum):
    """What an invalidating flag takes away.

    Attributes:
        QUALITY: Perplexity, KL and accuracy.
        ACCURACY: Accuracy alone.
        DECODE: Decode times and what follows from them: tokens/s, speed-up.
        PREFILL: Time to the first token.
        MEMORY: Activations, and so the memory that a run needs.
        COST: What the compression took, and on what it was trained.
    """

    QUALITY = "quality"
    ACCURACY = "accuracy"
    DECODE = "decode"
    PREFILL = "prefill"
    MEMORY = "memory"
    COST = "cost"


@dataclass(frozen=True)
class Meaning:
    """What a text stands for.

    Attributes:
        pattern: Regular expression of the whole text.
        spoils: Of an invalidating flag the figures that it takes away; none where they all are what they are called, but the row is not.
    """

    pattern: str
    kind: Kind
    spoils: frozenset[Figure] = frozenset()


_INVALID: dict[str, tuple[Figure, ...]] = {
    # another artefact than the name says
    r"claims \S+ bits, stores .+": (),
    r"claims \S+ zeros, has .+": (),
    r"\S+ mask does not hold in .+": (),
    r"claims .+, has groups of .+": (),
    r"claims \S+ parameters, has .+": (),
    r"claims no cut, has .+": (),
    r"claims \S+ layers, runs .+": (),
    r"claims \S+ bytes of cache a token, takes .+": (),
    r"claims (?:at least )?\S+ blocks a token, ran .+": (),
    r"claims \S+ experts a token, ran .+": (),
    r"claims \S+ active parameters, multiplied .+": (),
    r"claims \S+ tokens in the cache, .+": (),
    r"claims \S+ bytes of a draft, .+": (),
    r"claims to read \S+ tokens, .+": (),
    r"multiplies by \S+ weights, of which .+": (),
    r"holds \S+ MB of a text, and tells .+": (),
    # another training
    r"claims \S+ .+, but no method says that it trains": (Figure.COST,),
    r"trains, claims no .+": (Figure.COST,),
    r"asks a teacher, claims none": (Figure.COST,),
    # a quality that the model does not have where it is used
    r"claims \S+-bit activations, computes in .+": (Figure.QUALITY,),
    r"calibration text inside the test text: .+": (Figure.QUALITY,),
    r"calibration or taught text inside the test text: .+": (Figure.QUALITY,),
    r"the source was made from .+": (Figure.QUALITY,),
    r"not causal: .+": (Figure.QUALITY,),
    r"policy never exercised by .+": (Figure.QUALITY,),
    r"policy never exercised in .+": (Figure.ACCURACY,),
    r"perplexity token by token differs by .+": (Figure.QUALITY,),
    r"quality measured on .+": (Figure.QUALITY,),
    r"quality of other bytes than the compression .+": (Figure.QUALITY,),
    # times and bytes of something else
    r"guesses changed the text: .+": (Figure.DECODE,),
    r"texts are not drawn from the model: .+": (Figure.DECODE,),
    r"\S+ of \S+ tokens came without a pass of the model": (Figure.DECODE,),
    r"policy never guessed: .+": (Figure.DECODE,),
    r"policy never exercised while timed: .+": (Figure.DECODE,),
    r"random prompts: .+": (Figure.DECODE, Figure.PREFILL),
    r"speed measured on .+": (Figure.DECODE, Figure.PREFILL, Figure.MEMORY),
    r"speed of other bytes than the compression .+": (Figure.DECODE, Figure.PREFILL, Figure.MEMORY),
    r"prefill and activations are with a copy of the dense head that is no longer made": (Figure.PREFILL, Figure.MEMORY),
    r"OMP_WAIT_POLICY=PASSIVE: .+": (Figure.DECODE, Figure.PREFILL),
    r"roofline: .+ a defect of the measurement.*": (Figure.DECODE,),
}

_NOISE = (
    r"other load: .+",
    r"load average .+",  # of records before other load was told from one's own
    r"\S+ of the time stolen by the hypervisor.*",
    r"other stages of slimbench may have run beside this one: .+",
    r"A/A: .+",
    r"the machine's matrix product changed by .+",
    r"\S+ pairs of runs dropped: .+",
    r"speed of .+ runs?, too few for an interval.*",
    r"speed of one process: .+",
    r"speed of \S+ of \S+ texts: .+",
    r"speed within ± .+, aimed at ± .+",
)

_NOTE = (
    # where and by whom
    r"foreign: .+",
    r"imported from .+",
    r"compressed on .+: the times of compression are of that",
    r"of the same bytes: quality from .+",
    r"\S+ is older than the artefact, and does not say of which bytes it is",
    r".+: .+ of other code than in the newest row of the table",
    r"\S+ was cut off .+",
    r"went on after .+",
    r".+ went on from a checkpoint: .+",
    r".+ began again after an interruption: .+",
    # what is missing
    r"no divergence: .+",
    r"no speed-up: .+",
    r"no continuations: .+",
    r"no retrieval: .+",
    r"work not counted: .+",
    r"\S+ of \S+ stretches lie beyond .+",
    r"none of \S+ guesses was taken",
    r"no guess shows in continuations: .+",
    r"no guess was taken; the engine does not show whether there were any",
    r"not held against its teacher: .+",
    r"calibration text not held against the test text: .+",
    r"unsupported: .+",
    r".+: left out, .+",
    r".+: items left out, .+",
    r".+: word perplexity .+ left out, .+",
    r"decode times are whole generations less the mean prefill",
    r"\S+ beams",
    # what the artefact is, and what ran
    r"simulated: .+",
    r"\S+ bits as loaded, .+",
    r"packed on disk, .+ at load",
    r"zeros cannot be read in memory",
    r"\S+ mask is not checked: .+",
    r"\S+ mask without a .+",
    r"layers cannot be counted in memory",
    r"the bytes of the cache cannot be read",
    r"claims less work a token, which nothing has measured",
    r"fell back to dequantize \+ dense matmul.*",
    r"a slower kernel ran: .+",
    # how to read it
    r"loses .+ while the mean holds",
    r"accuracy .+ cannot be told from chance, .+",
    r"few training steps: .+",
    r"byte-identical to .+",
    r"scores every window as .+",
    r"speed-up .+ is above the ratio of bytes .+",
    r"the timed tokens differ from run to run: .+",
)

WITHOUT_MEANING = (
    r"the machine's copy bandwidth changed by .+",
    r"measured at .+ of copy bandwidth, the reference's row at .+",
)
"""Texts of older records that are not shown: the probe of copy bandwidth wanders between 29 and 53 GB/s on one machine and does not
predict decode times (Spearman's ρ 0.03, p = 0.82, over 54 rows)."""

CATALOGUE = (
    *(Meaning(pattern, Kind.INVALID, frozenset(spoils)) for pattern, spoils in _INVALID.items()),
    *(Meaning(pattern, Kind.NOISE) for pattern in _NOISE),
    *(Meaning(pattern, Kind.NOTE) for pattern in _NOTE),
)


@lru_cache(maxsize=4096)
def meaning(text: str) -> Meaning | None:
    """What a flag stands for; None where the text is not known."""
    return next((known for known in CATALOGUE if re.fullmatch(known.pattern, text, re.DOTALL)), None)


def kind(text: str) -> Kind:
    known = meaning(text)
    return known.kind if known else Kind.NOTE


def labelled(text: str) -> str:
    """The flag as tables show it: `invalid: ` before what takes a figure away."""
    return f"{Kind.INVALID}: {text}" if kind(text) is Kind.INVALID else text


def noise(flags: Iterable[str]) -> list[str]:
    """The flags that say nothing of the artefact, only that its speed was measured on an unsteady machine or not for long enough."""
    return [flag for flag in flags if kind(flag) is Kind.NOISE]


def folded(flags: Sequence[str]) -> list[str]:
    """The flags with those that are noise as one, `speed: noisy (3 notes)`, at the end."""
    unsteady = noise(flags)
    facts = [flag for flag in flags if flag not in unsteady]
    return [*facts, noisy(len(unsteady))] if unsteady else facts


def noisy(notes: int) -> str:
    return f"speed: noisy ({notes} note{'s' if notes > 1 else ''})"


def shown(flags: Iterable[str]) -> list[str]:
    """The flags without those that mean nothing, each once."""
    return [flag for flag in dict.fromkeys(flags) if not any(re.fullmatch(text, flag) for text in WITHOUT_MEANING)]


def spoiling(flags: Iterable[str], figure: Figure) -> list[str]:
    """The flags that take a figure away."""
    return [flag for flag in flags if (known := meaning(flag)) and figure in known.spoils]


def invalidating(flags: Iterable[str], figures: Iterable[Figure]) -> list[str]:
    """The flags for which a row is not to be chosen by these figures: they take one of them away, or the row is not what it is called."""
    wanted = frozenset(figures)
    known = [(flag, found) for flag in flags if (found := meaning(flag)) and found.kind is Kind.INVALID]
    return [flag for flag, found in known if not found.spoils or found.spoils & wanted]


_OF_FIELD = {
    **dict.fromkeys(("perplexity", "loss_percent", "kl_mean"), (Figure.QUALITY,)),
    "accuracy": (Figure.QUALITY, Figure.ACCURACY),
    **dict.fromkeys(("decode_tokens_per_s", "speedup"), (Figure.DECODE,)),
    "prefill_ms": (Figure.PREFILL,),
}


def competes(flags: Iterable[str], *fields: str) -> bool:
    """Whether a row may stand on a front of these fields: no flag takes one of them away, or says that the row is not what it is called."""
    return not invalidating(flags, [figure for field in fields for figure in _OF_FIELD.get(field, ())])

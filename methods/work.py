"""What a method says that it leaves out of the run of a token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Work:
    """Mean work of a token where not all of a model runs for each; None where nothing is left out.

    Attributes:
        blocks: Decoder blocks that run; where it comes out of the text, at most.
        fewest_blocks: Decoder blocks that run for every token.
        experts: Experts of a layer that run.
        active_parameters: Parameters that take part.
        cache_tokens: Tokens whose keys and values are kept at most.
        score_bytes: That are kept beside the keys and values of each of these.
        read_tokens: Tokens that an attention reads at most, the new one among them, where more are kept.
        whole_layers: Share of the layers that keep and read everything all the same.
        keeps_written: Whether what is written behind a prompt stays too.
    """

    blocks: float | None = None
    fewest_blocks: int | None = None
    experts: float | None = None
    active_parameters: float | None = None
    cache_tokens: int | None = None
    score_bytes: int | None = None
    read_tokens: int | None = None
    whole_layers: float | None = None
    keeps_written: bool | None = None


def joined(earlier: Work | None, later: Work | None) -> Work | None:
    """Work of which each figure is that of the latest step that says it; an empty `Work` takes back all that was said."""
    if earlier is None or later in (None, Work()):
        return earlier if later is None else later
    return replace(earlier, **{name: figure for name, figure in asdict(later).items() if figure is not None})

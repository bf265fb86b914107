"""`slimbench recommend`: the best cell under a budget."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, OfSuite, OnDevice, Results, check_choice, read_records, share
from slimbench.harness.config.errors import ConfigError


def recommend(
    model: Annotated[str, typer.Option(help="Model to choose a method for.")] = "smollm2-135m",
    memory: Annotated[str | None, typer.Option(help="Weights, KV cache and activations at most, such as 300MB or 4GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Size of the artefact at most.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights alone at most: known even where speed was not measured.")] = None,
    max_drop: Annotated[str | None, typer.Option(help="Perplexity above the reference at most, such as 1%.")] = None,
    min_speed: Annotated[float | None, typer.Option(min=0, help="Decoded tokens per second of one sequence at least.")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="Times as fast as the reference on the same engine at least.")] = None,
    prefer: Annotated[str, typer.Option(help="What is best among the cells that fit: quality, speed or size.")] = "quality",
    suite: OfSuite = None,
    device: OnDevice = None,
    engine: Annotated[str | None, typer.Option(help="Only cells on this engine.")] = None,
    include_flagged: Annotated[
        bool, typer.Option("--include-flagged", help="Choose among cells with an invalidating flag too, by their figures as recorded.")
    ] = False,
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """The best cell under a budget, how sure the choice is, the runner-up, who was left out for a flag, and what fits in other sets.

    Exit code 1 and the nearest miss where none fits.
    """
    check_choice("--format", format, ("terminal", "json"))
    check_choice("--prefer", prefer, ("quality", "speed", "size"))
    for option, least in (("--min-speed", min_speed), ("--min-speedup", min_speedup)):
        if least is not None and not math.isfinite(least):
            raise ConfigError(f"{option} {least} is no number to reach")
    limits = {
        "memory_bytes": _bytes("--memory", memory),
        "max_disk_bytes": _bytes("--disk", disk),
        "max_weight_bytes": _bytes("--weights", weights),
        "max_drop": None if max_drop is None else share("--max-drop", max_drop),
        "min_speed": min_speed,
        "min_speedup": min_speedup,
    }
    records = read_records(results)
    from slimbench.leaderboard.advice import describe
    from slimbench.leaderboard.recommend import Budget
    from slimbench.leaderboard.recommend import recommend as choose

    found = choose(records, model, Budget(**limits), prefer, suite, device, engine, include_flagged)  # type: ignore[arg-type]
    if format == "json":
        print(found.model_dump_json(indent=1))
    else:
        print("\n".join(describe(found)))
    raise typer.Exit(0 if found.choice else 1)


def _bytes(option: str, text: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text is None:
        return None
    try:
        size: Any = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = 0
    if size <= 0 or text.strip()[-1].isdigit():
        raise ConfigError(f"{option} {text} is no size with its unit; give it as 300MB, 4GB or 4GiB")
    return int(size)

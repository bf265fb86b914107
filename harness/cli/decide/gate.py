"""`slimbench gate`: may a compressed model ship?"""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, OfModel, OfSuite, OnDevice, Results, check_choice, read_records, share


def gate(
    cell: Annotated[
        str | None,
        typer.Argument(help="Pipeline label, such as gptq, or the beginning of a key; the only compressed cell if none is given."),
    ] = None,
    recovery: Annotated[str, typer.Option(help="How much of the dense model's quality must be kept.")] = "95%",
    confidence: Annotated[str, typer.Option(help="How sure that must be.")] = "95%",
    metric: Annotated[str, typer.Option(help="What is kept: accuracy (mean of tasks) or perplexity (dense / compressed).")] = "accuracy",
    results: Results = DEFAULT_RESULTS,
    model: OfModel = None,
    suite: OfSuite = None,
    device: OnDevice = None,
    include_flagged: Annotated[bool, typer.Option("--include-flagged", help="Count a quality that a flag takes away.")] = False,
    format: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """Hold a cell against a recovery, for continuous integration: exit code 0 shown, 1 shown to be below, 3 undecided."""
    import json

    from slimbench.harness.cli.exit_codes import ExitCode
    from slimbench.harness.config.errors import ConfigError

    check_choice("--format", format, ("terminal", "json"))
    check_choice("--metric", metric, ("accuracy", "perplexity"))
    asked, sure = share("--recovery", recovery), share("--confidence", confidence)
    if not 0 < asked <= 1:
        raise ConfigError(f"--recovery {recovery} is not above 0% and at most 100%")
    if not 0.5 < sure < 1:
        raise ConfigError(f"--confidence {confidence} is not between 50% and 100%")
    records = read_records(results)
    from slimbench.leaderboard.verdicts.gate import Answer, describe
    from slimbench.leaderboard.verdicts.gate import gate as hold

    found = hold(records, cell, asked, sure, metric, model, suite, device, include_flagged)  # type: ignore[arg-type]
    if format == "json":
        print(json.dumps({"line": describe(found)} | found.model_dump(mode="json"), indent=1, ensure_ascii=False))
    else:
        print(describe(found))
    raise typer.Exit({Answer.SHOWN: ExitCode.DONE, Answer.BELOW: ExitCode.FAILED, Answer.UNDECIDED: ExitCode.UNDECIDED}[found.answer])

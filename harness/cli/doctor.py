"""`slimbench doctor`: what this machine has and lacks."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, print_table


def doctor(format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal") -> None:
    """Card, compilers, cache, hub, engines and libraries: what is missing, what would help; exit code 1 if no cell can run."""
    check_choice("--format", format, FORMATS)
    from slimbench.harness.run.doctor import State, checks

    seen = list(checks())
    print_table(format, {"what": "what", "state": "state", "seen": "seen", "mend": "what helps"}, [check.to_dict() for check in seen])
    raise typer.Exit(1 if any(check.state is State.BROKEN for check in seen) else 0)

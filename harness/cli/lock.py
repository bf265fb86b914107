"""`slimbench lock`: versions of methods, engines, formats and protocols, bound to the code behind them."""

from __future__ import annotations

from typing import Annotated

import typer

Names = Annotated[list[str] | None, typer.Argument(help="Entries, such as 'method gptq'; all if none is named.")]
Same = Annotated[str | None, typer.Option("--same", help="Why changed code gives the same numbers; written into the lock.")]


def lock(names: Names = None, same: Same = None) -> None:
    """Write `identity.lock` for the code as it is now. An entry whose code changed needs a raised version, or --same REASON."""
    from slimbench.harness.config import lock as identity

    changed = identity.update(names or [], same)
    print("\n".join(changed) if changed else "identity.lock is up to date")

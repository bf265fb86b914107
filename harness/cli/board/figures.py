"""`slimbench board figures`: the figures that the records allow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.terminal import check_choice, output_folder, read_records


def figures(
    results: Annotated[Path, typer.Option(help="Folder of records.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    kind: Annotated[str, typer.Option(help="Formats, joined by commas: png, svg, pdf.")] = "png,svg",
    only: Annotated[list[str] | None, typer.Option(help="Kinds of figures, such as methods-bits; all if none is given.")] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help="Say for each group of rows why it has no figure of a kind.")] = False,
) -> None:
    """Draw every figure that the records allow, and say which kinds they do not allow and why."""
    from slimbench.leaderboard.figures.drawing import KINDS

    kinds = [chosen for word in kind.split(",") if (chosen := word.strip())]
    for word in kinds or [kind]:
        check_choice("--kind", word, KINDS)
    from slimbench.leaderboard.figures import catalogue

    wanted = [catalogue.kind(name).name for name in only or catalogue.names()]
    records = read_records(results)
    output_folder(out)
    from slimbench.harness.store.store import StoreError
    from slimbench.leaderboard.rows.rows import rows
    from slimbench.util.files import write_atomically

    absent: dict[str, list[catalogue.Absent]] = {}
    drawn: set[str] = set()
    for found in catalogue.figures(rows(records), wanted):
        if isinstance(found, catalogue.Absent):
            absent.setdefault(found.kind, []).append(found)
            continue
        drawn.add(found.kind)
        for ending in KINDS:
            if ending in kinds:
                try:
                    write_atomically(out / f"{found.name}.{ending}", found.draw(ending))
                except OSError as error:
                    raise StoreError(f"cannot write figures to '{out}': {error.strerror or error}") from error
        print(f"{out / found.name}.{{{','.join(kinds)}}}" if len(kinds) > 1 else f"{out / found.name}.{kinds[0]}")
    for name in wanted:
        missing = sorted(absent.get(name, []), key=lambda reason: -reason.rows)
        if reasons or name not in drawn:
            for reason in missing if reasons else missing[:1]:
                print(f"no {reason}" + (f" (and {len(missing) - 1} more groups)" if not reasons and len(missing) > 1 else ""))
            if not missing and name not in drawn:
                print(f"no {name}: no rows")

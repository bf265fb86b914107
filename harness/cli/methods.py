"""`slimbench methods list · show · check · coverage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, fail, print_table, read_records
from slimbench.util.silence import libraries_silenced

app = typer.Typer(help="The compression methods: list, show, prove on a tiny model, hold against the survey.", no_args_is_help=True)

Format = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only methods of this branch, such as quantization.")] = None,
    needs: Annotated[str | None, typer.Option(help="Only methods that need this: calibration, training, cuda, nothing, …")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of records: a column for each model says what came of each method.")] = None,
    format: Format = "terminal",
) -> None:
    """One line for each method."""
    from slimbench.harness.config.registry import entries
    from slimbench.leaderboard.rows.outcomes import outcomes

    check_choice("--format", format, FORMATS)
    found = list(entries())
    if family is not None:
        check_choice("--family", family, sorted({item.method.family for item in found}))
        found = [item for item in found if item.method.family == family]
    if needs is not None:
        wanted = {item.name: {word.strip("[]") for word in item.needs} or {"nothing"} for item in found}
        check_choice("--needs", needs, sorted({"nothing", "cuda"}.union(*wanted.values())))
        found = [item for item in found if needs in wanted[item.name]]
    came = outcomes(read_records(results)) if results else {}
    models = sorted({model for by_model in came.values() for model in by_model})
    rows = [_row(item) | {model: came.get(item.name, {}).get(model) for model in models} for item in found]
    hidden = ("reference", "arxiv", "covers") if format == "terminal" else ()
    keys = [key for key in rows[0] if key not in hidden] if rows else []
    print_table(format, {key: key for key in keys}, rows)


def _row(item: Any) -> dict[str, Any]:
    method = item.method
    return {
        "method": item.name,
        "family": method.family,
        "paper": f"{method.citation.title} ({method.citation.year})",
        "arxiv": method.citation.arxiv,
        "reference": method.reference,
        "needs": item.needs,
        "format": method.produces,
        "engines": item.engines,
        "covers": list(method.citation.covers),
        "here": item.here,
    }


@app.command()
def show(name: str) -> None:
    """What a method is, its citation, what it covers, what runs it, its settings."""
    import inspect

    from slimbench.harness.config.registry import entry
    from slimbench.leaderboard import coverage

    item = entry(name)
    method, citation = item.method, item.method.citation
    systems = {system.id: system.system for system in coverage.systems()}
    near = [(id_, how) for id_, (by, how) in coverage.notes().approximated.items() if by == name]
    facts = [
        ("family", method.family),
        ("paper", f"{citation.title} ({citation.year})" + (f", arXiv:{citation.arxiv}" if citation.arxiv else "")),
        ("reference", method.reference),
        ("needs", ", ".join(item.needs) or "–"),
        ("here", item.here),
        ("writes", method.produces),
        ("engines", ", ".join(item.engines) or "–"),
        ("covers", ", ".join(systems.get(id_, id_) for id_ in citation.covers) or "–"),
        *(("comes near", f"{systems.get(id_, id_)}: {how}") for id_, how in near),
    ]
    print(f"{inspect.getdoc(inspect.getmodule(type(method)))}\n\n{inspect.getdoc(type(method))}\n")
    print("\n".join(f"{key:<11} {value}" for key, value in facts))
    print(f"settings    override with method.{name}.SETTING=VALUE; `slimbench config method.{name}` says what each one means")
    print("\n".join(f"  {key} = {value}" for key, value in item.shipped.items()))


@app.command()
def check(name: str) -> None:
    """Prove a method in seconds: compress a tiny random model, reload it, hold claim against evidence."""
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.config.registry import entry
    from slimbench.harness.run.proofs.method import check as prove
    from slimbench.methods.base import Unsupported

    item = entry(name)
    if item.missing:
        extra = item.method.needs.extra
        install = f"'slimbench[{extra}]'" if extra else " ".join(item.missing)
        raise ConfigError(f"method '{name}' needs {', '.join(item.missing)}: pip install {install}")
    try:
        with libraries_silenced():
            facts = prove(name)
    except Unsupported as error:
        fail(f"{name} does not run here: {error}", 1)
    claim = {key: value for key, value in (facts["claim"] | facts["claim"]["details"]).items() if value and key != "details"}
    told = facts | {"claim": ", ".join(f"{key} {value}" for key, value in claim.items()), "flags": "; ".join(facts["flags"]) or "none"}
    for key, value in told.items():
        print(f"{key:<15} {value}")
    good = facts["finite"] and not [flag for flag in facts["flags"] if flag.startswith("claims")]
    print(f"{name}: {'passed' if good else 'FAILED'}")
    raise typer.Exit(0 if good else 1)


@app.command()
def coverage(
    section: Annotated[str | None, typer.Option(help="Only a branch of the survey (quantization) or a section (1.3).")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Only systems that no method covers or comes near.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="The totals alone, of branches or of the sections of one.")] = False,
    format: Format = "terminal",
) -> None:
    """Which of the surveyed systems the methods cover, one line for each system, and the totals of the sections."""
    import dataclasses

    from slimbench.leaderboard import coverage as covering

    check_choice("--format", format, FORMATS)
    rows = covering.table(section)
    wanted = [row.to_dict() for row in rows if not missing or row.status is covering.Status.MISSING]
    by: Literal["branch", "section"] = "branch" if summary and section is None else "section"
    sums = [*covering.totals(rows, by), covering.total("all", rows)]
    if not summary:
        columns = {"id": "system", "year": "year", "status": "status", "methods": "methods", "how": "what differs, or why there is none"}
        print_table(format, columns, wanted)
        if format not in ("terminal", "md"):
            return
        print()
    print_table(format, {f.name: f.name for f in dataclasses.fields(covering.Total)}, [dataclasses.asdict(row) for row in sums])

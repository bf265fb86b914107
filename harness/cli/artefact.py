"""`slimbench artefact`: where a compressed model lies, and what to ship of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import Overrides, fail, output_folder
from slimbench.util.silence import libraries_silenced

if TYPE_CHECKING:
    from slimbench.harness.run.cell import Cell

app = typer.Typer(help="The compressed models themselves: where one lies, write it for another program.", no_args_is_help=True)


@app.command()
def path(overrides: Overrides = None) -> None:
    """Print the folder of a cell's artefact, named by the overrides of its run, and how to load it."""
    from slimbench.harness.store.artefact import read_manifest
    from slimbench.methods.formats.exports import targets

    _, folder = _artefact(overrides)
    print(folder)
    first, *others = targets(read_manifest(folder).claim.format)
    command = shlex.join(["slimbench", "artefact", "export", *(overrides or []), "--format", first, "--to", "FOLDER"])
    instead = f" (or {', '.join(others)})" if others else ""
    typer.echo(f"python: slimbench.load_model({str(folder)!r})\nother programs: {command}{instead}", err=True)


@app.command()
def export(
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="Folder that receives the files.")] = Path("exported"),
    format: Annotated[str | None, typer.Option("--format", help="gguf, compressed-tensors, gptq, huggingface or slimbench.")] = None,
) -> None:
    """Write the artefact of a cell with its tokenizer, as what llama.cpp, vLLM, transformers or GPTQModel load; no weight changes."""
    from slimbench.harness.stages import models
    from slimbench.harness.store.artefact import read_manifest
    from slimbench.methods.base import Unsupported
    from slimbench.methods.formats import exports

    cell, folder = _artefact(overrides)
    output_folder(to)
    if to.exists() and any(to.iterdir()):
        fail(f"--to {to}: the folder is not empty", 2)
    stored = read_manifest(folder).claim.format
    target = format or exports.targets(stored)[0]
    source = models.prepare(cell.config.model, lambda phase: None)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with libraries_silenced():
            written = exports.export(folder, stored, source, target, to)
    except Unsupported as error:
        fail(str(error), 2)
    print(written)
    typer.echo(exports.LOADS[target].format(folder=to), err=True)


def _artefact(overrides: list[str] | None) -> tuple[Cell, Path]:
    """The cell that the overrides name, and the folder of its artefact; ends the program where it is not in the cache."""
    from slimbench.harness.config import compose
    from slimbench.harness.run.cell import make_cell
    from slimbench.harness.store import artefact

    cell = make_cell(compose.resolve(overrides or []), tuple(overrides or []))
    key = cell.identity.keys.compress
    if problem := artefact.fault(key):
        fail(f"no artefact of {cell.label} to ship: {problem}; make it with: {cell.command}", 1)
    return cell, artefact.location(key)

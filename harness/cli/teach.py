"""`slimbench teach`: let a teacher write the text that methods train on."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from slimbench.harness.cli.terminal import Overrides
from slimbench.util.silence import libraries_silenced

_LOOKED_AT = 3
_EVERY_S = 5.0


def teach(
    recipe: Annotated[str, typer.Argument(help="A name in conf/recipe/, such as alpaca.")],
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help="self, file:FOLDER, hf:ORG/NAME or http://HOST:PORT/v1, as teacher.source=.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Rows to begin with or to grow, as teacher.examples=.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first three prompts and ask nobody.")] = False,
) -> None:
    """Write the examples of a recipe into the cache, where methods with the same teacher find them; what is there is left alone.

    The other settings of a teacher are overrides: teacher.model=NAME, teacher.revision=…, teacher.key_variable=NAME, teacher.seed=1. An
    interrupted run goes on where it was, and asks nothing twice.
    """
    from slimbench.harness.config import compose
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.config.sections import teaching as choices

    asked = choices.recipe(recipe)
    words = [*(overrides or ()), *([f"teacher.source={teacher}"] if teacher else ()), *([f"teacher.examples={count}"] if count else ())]
    config = compose.resolve(words)
    who = config.teacher
    choices.require_asked(asked, who)
    if who.kind == "endpoint" and not who.model and not dry_run:
        raise ConfigError(f"teacher.model: how the server at {who.source} calls its model is needed")
    if dry_run:
        _show(asked, config)
        return
    with libraries_silenced():  # what they say when they are imported and load a model
        from transformers.utils import logging

        from slimbench.harness.run.cell import on_this_machine
        from slimbench.harness.run.planning.obstacles import require_modules
        from slimbench.harness.stages import teaching

        logging.disable_progress_bar()
        require_modules(f"recipe '{recipe}'", asked.modules)
        config = on_this_machine(config)
    _tell(teaching.text(config, recipe, _Console()))


def _show(asked: Any, config: Any) -> None:
    from slimbench.tasks.teaching import data_set

    requests = data_set.preview(asked, config.teacher.examples, config.teacher.seed)
    for number, request in enumerate(requests[:_LOOKED_AT], 1):
        draw = request.sampling
        print(f"── {number}: at most {draw.max_tokens} tokens, temperature {draw.temperature:g}, top-p {draw.top_p:g}, seed {request.seed}")
        for role, text in request.chat:
            print(f"{role}:\n{text.rstrip()}\n")
    print(f"{asked.name}: {len(asked.stages)} stages; nobody was asked")


def _tell(made: Any) -> None:
    from slimbench.util.text import one_line

    print(f"{made.recipe} by {one_line(made.teacher)}{', as it was' if made.reused else ''}: {made.folder}")
    print(f"  {made.asked} looked at, {made.kept} kept: {made.train} examples to train on, {made.held_out} held out")
    for reason, number in sorted(made.rejected.items(), key=lambda item: -item[1]):
        print(f"  {number} rejected: {reason}")
    print(f"  {made.tokens} tokens written in {made.seconds:.0f} s; sha256 {made.sha256[:16]}")


class _Console:
    """Says on the standard error what is going on, a line at a time."""

    def __init__(self) -> None:
        self._phase, self._began, self._told = "", 0.0, 0.0

    def phase(self, name: str) -> None:
        self._phase, self._began, self._told = name, time.monotonic(), 0.0
        print(name, file=sys.stderr)

    def progress(self, done: float, total: float) -> None:
        now = time.monotonic()
        if not done or now - self._told < _EVERY_S:
            return
        self._told = now
        from slimbench.harness.run.planning.progress import in_words

        left = in_words((now - self._began) / done * (total - done))
        print(f"{self._phase}: {done:.0f} of {total:.0f}, {left}", file=sys.stderr)

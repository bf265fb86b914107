"""The text that a teacher wrote by a recipe: made once, kept in the cache by what it depends on, checked before it is used.

$SLIMBENCH_CACHE/taught/KEY/journal.jsonl     answers as they came; what is asked again is found here
                            train.jsonl       examples (`util.writing.teaching`)
                            held_out.jsonl    those that no student sees
                            manifest.json     what was asked, kept and rejected, by whom, in what time; it comes last
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from slimbench.tasks import corpora
from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching import checks, stages, starts
from slimbench.tasks.teaching.journal import Journal, Watch
from slimbench.tasks.teaching.parts import SEEN, Row, filled, side
from slimbench.tasks.teaching.recipe import Recipe
from slimbench.util import locks
from slimbench.util.files import cache_dir, write_atomically
from slimbench.util.hashing import digest, hash_file
from slimbench.util.writing.answers import Text, alike, likeness
from slimbench.util.writing.teaching import HELD_OUT, TRAIN, Example, Request, Teacher, read_examples, write_examples

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Made:
    """A set of examples.

    Attributes:
        stages: Of each, what it was asked and what became of it.
        asked: What was kept in the end, and all that was rejected on the way; `kept` rows were.
        dropped: Held-out examples that were too like one of those to train on.
        tokens: That the teacher wrote, of all answers.
        seconds: That it took for them.
        sha256: Hash of both files, as `sha256` in `hash_of` has it.
        max_rouge_l: The largest of a held-out prompt with one to train on; None where the recipe does not compare them, or nothing is
            held out. `max_rouge_l_answers` that of responses, which nothing is dropped for.
        reused: It was there already.
    """

    key: str
    recipe: str
    recipe_fingerprint: str
    teacher: str
    licence: str | None
    count: int
    seed: int
    stages: list[dict[str, Any]]
    asked: int
    kept: int
    train: int
    held_out: int
    dropped: int
    tokens: int
    prompt_tokens: int
    seconds: float
    sha256: str
    max_rouge_l: float | None = None
    max_rouge_l_answers: float | None = None
    reused: bool = False

    @property
    def folder(self) -> Path:
        return folder(self.key)

    @property
    def rejected(self) -> dict[str, int]:
        """By reason, of all stages."""
        found: dict[str, int] = {}
        for stage in self.stages:
            for reason, number in stage["rejected"].items():
                found[reason] = found.get(reason, 0) + number
        return found


def key(recipe: Recipe, teacher: str, count: int, seed: int) -> str:
    """Sixteen hex digits of all that a set depends on.

    Args:
        teacher: Its identity.
        count: Rows that are begun with, or grown.
    """
    texts = [corpora.fingerprint(name) for name in recipe.corpora]
    versions = [[name, _version(name)] for name in sorted(recipe.modules)]
    return digest([recipe.fingerprint, starts.fingerprint(recipe.start), texts, versions, teacher, count, seed])


def _version(module: str) -> str | None:
    """Of a library that rows are drawn, searched or judged with; None where it is not installed, and nothing can be made."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder(name: str) -> Path:
    """Where a set lies, whether it is there or not."""
    return cache_dir() / "taught" / name


def checked(recipe: Recipe) -> Recipe:
    """A recipe whose stages read what there is; see `Recipe.check`."""
    recipe.check(starts.fields(recipe.start))
    return recipe


def found(name: str) -> Made | None:
    """A set by its key, None where it is not there whole.

    Raises:
        DataError: Its files are not those that were made.
    """
    try:
        content = json.loads((folder(name) / MANIFEST).read_bytes())
        made = Made(**content | {"reused": True})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder(name) / MANIFEST} is no manifest: remove the folder") from error
    if made.key != name or not _is_whole(made):
        raise DataError(f"the taught text {folder(name)} is not what was written: remove the folder")
    return made


def _is_whole(made: Made) -> bool:
    try:
        return hash_of(made.folder) == made.sha256
    except FileNotFoundError:
        return False


def every() -> list[Made]:
    """The sets in the cache; broken ones are left out."""
    names = sorted(path.parent.name for path in (cache_dir() / "taught").glob(f"*/{MANIFEST}"))
    sets = []
    for name in names:
        try:
            made = found(name)
        except DataError:
            continue
        sets += [made] if made else []
    return sets


def hash_of(place: Path) -> str:
    """SHA-256 of the hashes of the two files."""
    import hashlib

    lines = "".join(f"{hash_file(place / name)}  {name}\n" for name in (HELD_OUT, TRAIN))
    return hashlib.sha256(lines.encode()).hexdigest()


def make(
    recipe: Recipe,
    teacher: Callable[[], Teacher],
    identity: str,
    count: int,
    seed: int,
    licence: str | None = None,
    watch: Callable[[str], Watch] = lambda stage: lambda done, total: None,
) -> Made:
    """The set of a recipe, from the cache or made now; an interrupted one goes on where it was.

    Args:
        teacher: Gives it, where it is needed.
        identity: Of the teacher.
        watch: Gets the name of a stage and gives what is told how many of its requests are answered.

    Raises:
        DataError: Rows cannot be had, or nothing of what the teacher wrote could be kept.
        TeacherError: The teacher cannot be asked.
    """
    checked(recipe)
    name = key(recipe, identity, count, seed)
    if made := found(name):
        return made
    place = folder(name)
    with locks.held(place):
        if made := found(name):
            return made
        place.mkdir(parents=True, exist_ok=True)
        journal, asked = Journal(place / "journal.jsonl"), cache(teacher)
        rows, tallies = _begun(recipe, count, seed), []
        if not rows:
            raise DataError(f"recipe {recipe.name}: there are no rows to begin with")
        for number, (stage, own) in enumerate(zip(recipe.stages, _seeds(recipe, seed), strict=True)):
            label = f"{stage.kind} {number + 1}/{len(recipe.stages)}"
            rows, tally = stages.applied(stage, rows, partial(journal.ask, asked, watch=watch(label)), count, own, recipe.held_out)
            tallies.append(tally)
        train, held_out, dropped = split(recipe, rows)
        if not train:
            reasons = sum((tally.rejected for tally in tallies), start=Counter[str]()).most_common(1)
            most = f"; most often: {reasons[0][0]}" if reasons else ""
            raise DataError(f"recipe {recipe.name}: nothing that {identity} wrote could be kept{most}")
        write_examples(train, place / TRAIN)
        write_examples(held_out, place / HELD_OUT)
        done = Made(
            key=name,
            recipe=recipe.name,
            recipe_fingerprint=recipe.fingerprint,
            teacher=identity,
            licence=licence,
            count=count,
            seed=seed,
            stages=[tally.told() for tally in tallies],
            asked=len(rows) + sum(tally.rejected.total() for tally in tallies),
            kept=len(rows),
            train=len(train),
            held_out=len(held_out),
            dropped=dropped,
            tokens=sum(tally.tokens for tally in tallies),
            prompt_tokens=sum(tally.prompt_tokens for tally in tallies),
            seconds=round(journal.seconds, 2),
            sha256=hash_of(place),
            max_rouge_l=_nearest(recipe, train, held_out, "prompt"),
            max_rouge_l_answers=_nearest(recipe, train, held_out, "response"),
        )
        write_atomically(place / MANIFEST, json.dumps(asdict(done), indent=1).encode())
    return done


def preview(recipe: Recipe, count: int, seed: int) -> list[Request]:
    """The first requests of a recipe, without asking anybody."""
    rows, seeds = _begun(checked(recipe), count, seed), _seeds(recipe, seed)
    return stages.first_requests(recipe.stages, rows, seeds, count, recipe.held_out)


def _begun(recipe: Recipe, count: int, seed: int) -> list[Row]:
    """Rows at the start, each on its side."""
    return [row | {"side": side(row, recipe.held_out)} for row in starts.rows(recipe.start, count, seed)]


def _seeds(recipe: Recipe, seed: int) -> list[int]:
    return [int(digest([seed, number])[:8], 16) for number in range(len(recipe.stages))]


def split(recipe: Recipe, rows: Sequence[Row]) -> tuple[list[Example], list[Example], int]:
    """Examples to train on, those that are held out, and how many of these were dropped for being too like one of the others.

    A row is on one side from where it began, so that nothing of the other one comes near it on the way.
    """
    train = [example for row in rows if row["side"] == SEEN for example in _examples(recipe, row)]
    held_out = [example for row in rows if row["side"] != SEEN for example in _examples(recipe, row)]
    if recipe.apart is None:
        return train, held_out, 0
    known = [Text.of(text) for text in {example.prompt for example in train}]
    near = {text: alike(Text.of(text), known, recipe.apart) for text in {example.prompt for example in held_out}}
    left = [example for example in held_out if not near[example.prompt]]
    return train, left, len(held_out) - len(left)


def _nearest(recipe: Recipe, train: Sequence[Example], held_out: Sequence[Example], part: Literal["prompt", "response"]) -> float | None:
    if recipe.apart is None or not held_out:
        return None
    texts, others = ([Text.of(text) for text in {getattr(example, part): None for example in of}] for of in (held_out, train))
    return round(likeness(texts, others), 4)


def examples_of(made: Made) -> tuple[list[Example], list[Example]]:
    """Those to train on and those that are held out."""
    return read_examples(made.folder / TRAIN), read_examples(made.folder / HELD_OUT)


def _examples(recipe: Recipe, row: Row) -> list[Example]:
    found = []
    for form in recipe.examples:
        if all(checks.same(row.get(name, ""), value) for name, value in form.when.items()):
            prompt, response, gold, given = (filled(text, row).strip() for text in (form.prompt, form.response, form.gold, form.given))
            found.append(Example(prompt, response, form.task, row["item"], gold, given))
    return found

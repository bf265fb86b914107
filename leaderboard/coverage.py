"""Which of the surveyed systems the methods cover: the systems, an answer for each, and the totals.

`methods/survey.csv` names the systems of "Model Compression and Efficient Inference for Large Language Models: A Survey"
(arXiv:2402.09748) and a few later ones. What a method stands for, it says itself (`Citation.covers`). `methods/coverage.yaml` says
where that is only a part of the system, which method (or engine, or model) comes near to another, or why there is none.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sources import read_yaml
from slimbench.util.text import nearest

METHODS_DIR = Path(__file__).resolve().parent.parent / "methods"


class Status(StrEnum):
    """Whether a surveyed system can be run here."""

    COVERED = "covered"  # a method does what its paper says
    APPROXIMATED = "approximated"  # a method does nearly that; `how` says what differs
    MISSING = "missing"  # no method does; `how` says why


@dataclass(frozen=True)
class System:
    """A row of the survey.

    Attributes:
        id: `branch/name`.
        section: Number and title of the section that discusses it; some branches are one section without a number.
        system: Its name.
        year: Year or years of publication; empty where there is none.
        origin: `survey`, or `added` for one that the survey does not have.
    """

    id: str
    section: str
    system: str
    year: str
    origin: str

    @property
    def branch(self) -> str:
        return self.id.partition("/")[0]

    @property
    def number(self) -> str | None:
        first = self.section.partition(" ")[0]
        return first if first[0].isdigit() else None


@dataclass(frozen=True)
class Answer:
    """What slimbench has for a system.

    Attributes:
        methods: Names of the methods, engines or models that cover or approximate it.
        how: What differs, or why there is none.
    """

    system: System
    status: Status
    methods: tuple[str, ...] = ()
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        system = self.system
        return {
            "id": system.id,
            "section": system.section,
            "system": system.system,
            "year": system.year,
            "origin": system.origin,
            "status": self.status.value,
            "methods": list(self.methods),
            "how": self.how,
        }


@dataclass(frozen=True)
class Total:
    """Number of systems of a section, or of several, by status."""

    section: str
    systems: int
    covered: int
    approximated: int
    missing: int


@dataclass(frozen=True)
class Notes:
    """The contents of `methods/coverage.yaml`.

    Attributes:
        engines: System → the engines that are what it is.
        models: System → the models of `conf/model/` that are what it is.
        approximated: System → the method, engine or model that comes near, and what differs.
        missing: System → why no method does it.
        defaults: Branch or number of a section → why no method does what it has left.
    """

    engines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    models: dict[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True)
    approximated: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def things(self) -> dict[str, tuple[str, ...]]:
        """System → the engines or models that are what it is."""
        return self.engines | self.models


def systems() -> list[System]:
    """Every surveyed system, in the order of the survey."""
    with (METHODS_DIR / "survey.csv").open(newline="", encoding="utf-8") as file:
        return [System(**row) for row in csv.DictReader(file)]


def notes() -> Notes:
    raw = read_yaml(METHODS_DIR / "coverage.yaml")
    near = {id_: (note["by"], note["how"]) for id_, note in raw["approximated"].items()}
    engines, models = ({id_: tuple(names) for id_, names in (raw[kind] or {}).items()} for kind in ("engines", "models"))
    return Notes(engines, near, raw["missing"], raw["defaults"], models=models)


def registered() -> dict[str, tuple[str, ...]]:
    """The names of all methods, each with the systems that it covers."""
    from slimbench.harness.config.registry import entries

    return {entry.name: entry.method.citation.covers for entry in entries()}


def answers(found: Sequence[System], covers: dict[str, tuple[str, ...]], said: Notes) -> list[Answer]:
    """An answer for each system.

    Args:
        found: The systems.
        covers: Name of each method → the systems that it covers.
        said: What is noted about the others.
    """
    covering: dict[str, list[str]] = defaultdict(list, {id_: list(names) for id_, names in said.things.items()})
    for name, ids in covers.items():
        for id_ in ids:
            covering[id_].append(name)
    return [_answer(system, tuple(covering[system.id]), said) for system in found]


def _answer(system: System, methods: tuple[str, ...], said: Notes) -> Answer:
    if system.id in said.approximated:
        by, how = said.approximated[system.id]
        return Answer(system, Status.APPROXIMATED, methods or (by,), how)
    if methods:
        return Answer(system, Status.COVERED, methods)
    return Answer(system, Status.MISSING, (), _reason(system, said) or "")


def _reason(system: System, said: Notes) -> str | None:
    default = said.defaults.get(system.number or "") or said.defaults.get(system.branch)
    return said.missing.get(system.id) or default


def table(section: str | None = None) -> list[Answer]:
    """The whole coverage table, or that of a branch (`quantization`) or a section (`1.3`): plain data, no torch.

    Raises:
        ConfigError: There is no such section.
    """
    found = systems()
    if section is not None:
        known = {key for system in found for key in (system.branch, system.number) if key}
        if section not in known:
            raise ConfigError(f"no section '{section}'{nearest(section, known)}")
        found = [system for system in found if section in (system.branch, system.number)]
    return answers(found, registered(), notes())


def totals(rows: Iterable[Answer], by: Literal["section", "branch"] = "section") -> list[Total]:
    """One total for each section or branch, in the order of the rows."""
    members: dict[str, list[Answer]] = defaultdict(list)
    for row in rows:
        members[getattr(row.system, by)].append(row)
    return [total(name, answered) for name, answered in members.items()]


def total(name: str, rows: Sequence[Answer]) -> Total:
    counts = [sum(row.status is status for row in rows) for status in Status]
    return Total(name, len(rows), *counts)


def problems(
    found: Sequence[System], covers: dict[str, tuple[str, ...]], engines: Sequence[str], said: Notes, models: Sequence[str] = ()
) -> list[str]:
    """What is wrong with the answers, each in one line: unknown ids and names, contradictions, systems without an answer."""
    ids, covered = {system.id for system in found}, {id_ for claimed in covers.values() for id_ in claimed}
    sections = {key for system in found for key in (system.branch, system.number)}
    noted = [*said.engines, *said.models, *said.approximated, *said.missing]
    partly = {id_ for id_, (by, _) in said.approximated.items() if id_ in covers.get(by, ())}
    claimed = [(name, id_) for name, claims in covers.items() for id_ in claims]
    by_engine, by_model = ({name for names in kind.values() for name in names} for kind in (said.engines, said.models))
    near = [(id_, by) for id_, (by, _) in said.approximated.items()]
    open_ = [system for system in found if system.id not in covered | set(said.things) | set(said.approximated)]
    return [
        *(f"method '{name}' covers '{id_}', which is no system{nearest(id_, ids)}" for name, id_ in claimed if id_ not in ids),
        *(f"'{id_}' is noted, but is no system{nearest(id_, ids)}" for id_ in noted if id_ not in ids),
        *(f"'{id_}' is noted as not covered, but a method covers it" for id_ in noted if id_ in covered - partly),
        *(f"'{id_}' has two answers" for id_ in sorted(set(noted)) if noted.count(id_) > 1),
        *(f"'{name}' is no engine{nearest(name, engines)}" for name in sorted(by_engine) if name not in engines),
        *(f"'{name}' is no model{nearest(name, models)}" for name in sorted(by_model) if name not in models),
        *(f"'{id_}' is approximated by '{by}'{nearest(by, covers)}" for id_, by in near if by not in {*covers, *engines, *models}),
        *(f"a reason is given for '{key}', which is no section" for key in said.defaults if key not in sections),
        *(f"'{system.id}' has no answer" for system in open_ if not _reason(system, said)),
    ]

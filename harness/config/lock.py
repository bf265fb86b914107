"""`identity.lock`: for each method, engine, format and protocol its version and a hash of the code behind it.

A version stands in task keys, so that records of two versions are two rows; the lock keeps it honest. A test fails when the
code behind an entry moves and its version does not, unless the lock says that the same numbers come out:

    method gptq 1 3c8582fc0b8698f6
      was 9c1b07aa51d2e0f3 same: a helper moved to core.second_order

What counts as the code behind an entry is what its class or functions reach (see `util.syntax`): of a method and a format all of
`methods` but the contract in `base.py`; of an engine also the engines' own modules, and its loaders that convert: a loader is the
format's where it lies in the module of that format, else the engine's, whose version stands in keys; of a protocol the
measurements and their statistics. Whatever is reached in `util` counts. The configuration, the store, the stages and the schema do
not: they decide what is run and written down, not what comes out.

The hash that an artefact and a record carry is the first one of the entry's version: it outlives a change marked `same`. Methods and
engines that are not shipped have no entry; their hash is taken as they lie there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from slimbench.harness.config import engines
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import EngineConfig, RunConfig
from slimbench.harness.config.sources import shipped, shipped_method
from slimbench.harness.config.targets import locate
from slimbench.harness.schema.identity import Stage
from slimbench.methods.base import format_of
from slimbench.tasks.calibration import SELF
from slimbench.util import sources, syntax
from slimbench.util.files import write_atomically
from slimbench.util.text import nearest

LOCK = sources.PACKAGE / "identity.lock"
_HEAD = """\
# What each version stands for: kind, name, version, hash of the code behind it; `was`: an earlier hash of code that gives the same numbers.
# Written by `make lock`, never by hand; harness/config/lock.py says what counts.
"""
_ENTRY = re.compile(r"(?P<kind>\w+) (?P<name>\S+) (?P<version>\d+) (?P<code>[0-9a-f]{16})")
_SAME = re.compile(r"  was (?P<code>[0-9a-f]{16}) same: (?P<reason>.+)")

_METHODS = ("slimbench.methods", "slimbench.util")
_CONTRACT = ("slimbench.methods.base", "slimbench.methods.work")
_FOLLOW = {
    "method": (_METHODS, _CONTRACT),
    "format": (_METHODS, _CONTRACT),
    "engine": ((*_METHODS, "slimbench.harness.engines", "slimbench.harness.measure.loaded"), _CONTRACT),
    "protocol": (
        ("slimbench.harness.measure", "slimbench.harness.stats", "slimbench.util"),
        ("slimbench.harness.measure.protocols",),
    ),
}
_MEASURE = "slimbench.harness.measure"
_WINDOWS = (f"{_MEASURE}.perplexity.Windows", f"{_MEASURE}.perplexity.measure")
_PROTOCOLS = {
    "window": _WINDOWS,
    "incremental": _WINDOWS,
    "llamacpp": _WINDOWS,
    "suffix": _WINDOWS,
    "stream": _WINDOWS,
    "recomputed": _WINDOWS,
    "document": (f"{_MEASURE}.documents.measure",),
    "zeroshot": (f"{_MEASURE}.zeroshot.measure",),
    "generation": (f"{_MEASURE}.generation.measure",),
    "retrieval": (f"{_MEASURE}.dynamic.retrieval.measure",),
    "divergence": (f"{_MEASURE}.divergence.Recorder", f"{_MEASURE}.divergence.Comparison"),
    "speed": ("slimbench.harness.stages.speed.run",),
    "written": ("slimbench.util.writing.own.generate",),
}


@dataclass(frozen=True)
class Entry:
    """What a version stands for.

    Attributes:
        code: Hash of the code as it is now.
        same: Earlier hashes of this version, oldest first, each with the reason why the same numbers come out.
    """

    kind: str
    name: str
    version: int
    code: str
    same: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def origin(self) -> str:
        """The first hash of this version."""
        return self.same[0][0] if self.same else self.code

    @property
    def lines(self) -> list[str]:
        return [f"{self.label} {self.version} {self.code}", *(f"  was {code} same: {reason}" for code, reason in self.same)]


def fingerprints(config: RunConfig, stage: Stage) -> dict[str, str]:
    """What a stage of a cell runs: the hash of the code behind each method, engine, format and protocol, by kind and name."""
    parts: list[tuple[str, str, tuple[str, ...]]] = [("method", locate(step.target).name, (step.target,)) for step in config.pipeline]
    calibrated = any(locate(step.target).needs.calibration for step in config.pipeline)
    if stage is Stage.COMPRESS and calibrated and config.calibration.source == SELF:
        parts.append(("protocol", "written", _PROTOCOLS["written"]))
    if stage is not Stage.COMPRESS:
        format_ = format_of(locate(step.target) for step in config.pipeline)
        parts.append(("engine", config.engine.name, _engine_code(config.engine)))
        parts += [("format", format_, code)] if (code := _format_code(format_)) else []
        parts += [("protocol", name, _PROTOCOLS[name]) for name in _protocols(config, stage)]
    return {f"{kind} {name}": _fingerprint(kind, name, code) for kind, name, code in parts}


def differing(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts whose code is not what it was, by kind and name; those that one side does not tell are left out."""
    entries = read()
    return [label for label, code in now.items() if label in then and _canonical(entries.get(label), then[label]) != code]


def live() -> dict[str, Entry]:
    """The entries of all that is shipped, with the code as it is now."""
    found = []
    for name in shipped("method"):
        target = str(shipped_method(name)["_target_"])
        cls = locate(target) if _is_shipped(target) else None
        found += [Entry("method", cls.name, cls.version, _code("method", (target,)))] if cls else []
    for engine in engines.catalogue():
        if _is_shipped(engine.target):
            found.append(Entry("engine", engine.name, engines.version(engine.target), _code("engine", _engine_code(engine))))
    for format_ in sorted({format_ for engine in engines.catalogue() for format_ in engine.loaders}):
        if code := _format_code(format_):
            version = sources.constant(f"{_format_module(format_)}.SCHEMA")
            found.append(Entry("format", format_, version if isinstance(version, int) else 1, _code("format", code)))
    for name, code in _PROTOCOLS.items():
        found.append(Entry("protocol", name, _protocol_version(name), _code("protocol", code)))
    return {entry.label: entry for entry in sorted(found, key=lambda e: (e.kind, e.name))}


def read() -> dict[str, Entry]:
    """The entries of the lock; empty where there is none.

    Raises:
        ConfigError: A line that is no entry.
    """
    try:
        stat = LOCK.stat()
    except OSError:
        return {}
    return _read(LOCK, stat.st_mtime_ns, stat.st_size)


def problems() -> list[str]:
    """What a test refuses: one line for each entry whose code moved while its version did not, or that the lock does not have."""
    locked, now = read(), live()
    lines = [f"{label}: nothing of that name is shipped any more; run `make lock`" for label in locked.keys() - now.keys()]
    for label, entry in now.items():
        known = locked.get(label)
        if known is None or entry.version != known.version:
            lines.append(f"{label}: version {entry.version} is not in identity.lock; run `make lock`")
        elif entry.code != known.code:
            lines.append(
                f"{label}: its code changed and its version {entry.version} did not. If other numbers come out, raise the version; "
                f"if not, run `slimbench lock '{label}' --same REASON`"
            )
    return sorted(lines)


def update(labels: Iterable[str] = (), same: str | None = None) -> list[str]:
    """Rewrite the lock for the code as it is now. Returns the labels of the entries that changed.

    Args:
        labels: Entries to touch, as `method gptq`; all if none is named.
        same: Why the same numbers come out of changed code. Without it an entry whose version did not change keeps its hash.

    Raises:
        ConfigError: An unknown label, a lower version, or changed code under one version without a reason; nothing is written.
    """
    locked, now, chosen = read(), live(), list(labels)
    for label in chosen:
        if label not in locked | now:
            raise ConfigError(f"no entry '{label}'{nearest(label, locked | now)}")
    fresh, refused = dict(locked), []
    for label in chosen or sorted(locked | now):
        if label not in now:
            fresh.pop(label, None)
            continue
        entry, known = now[label], locked.get(label)
        if known is not None and entry.version < known.version:
            raise ConfigError(f"{label}: version {entry.version} is lower than {known.version}, of which there may be records")
        if known is None or entry.version > known.version:
            fresh[label] = entry
        elif entry.code != known.code:
            if same is None:
                refused.append(label)
            else:
                fresh[label] = replace(entry, same=(*known.same, (known.code, " ".join(same.split()))))
    if refused:
        named = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if refused[3:] else "")
        raise ConfigError(
            f"{named}: the code changed and the version did not. Raise the version if other numbers come out; else say why: --same REASON"
        )
    text = "\n".join(line for _, entry in sorted(fresh.items()) for line in entry.lines)
    write_atomically(LOCK, f"{_HEAD}\n{text}\n".encode())
    return [label for label in sorted(locked | fresh) if locked.get(label) != fresh.get(label)]


def _fingerprint(kind: str, name: str, targets: tuple[str, ...]) -> str:
    return _canonical(read().get(f"{kind} {name}"), _code(kind, targets))


def _canonical(entry: Entry | None, code: str) -> str:
    """The first hash of a version for any of its hashes; another hash as it is."""
    return entry.origin if entry and code in (entry.code, *(was for was, _ in entry.same)) else code


def _code(kind: str, targets: tuple[str, ...]) -> str:
    follow, stop = _FOLLOW[kind]
    try:
        return syntax.code_hash(targets, follow, stop)
    except (LookupError, SyntaxError) as error:
        raise ConfigError(f"cannot read the code of {targets[0]}: {error}") from error


def _is_shipped(target: str) -> bool:
    return target.startswith(f"{sources.NAME}.")


def _engine_code(engine: EngineConfig) -> tuple[str, ...]:
    """The class of an engine and its own loaders."""
    own = [loader for format_, loader in engine.loaders.items() if not _is_the_format_s(loader, format_)]
    return engine.target, *dict.fromkeys(own)


@cache
def _format_code(format_: str) -> tuple[str, ...]:
    """What writes a format and what loads it in any shipped engine; empty for a format that slimbench does not define."""
    shipped_engines = [engine for engine in engines.catalogue() if _is_shipped(engine.target)]
    loaders = {engine.loaders[format_] for engine in shipped_engines if _is_the_format_s(engine.loaders.get(format_, ""), format_)}
    writer = f"{_format_module(format_)}.save"
    return tuple(sorted(loaders | ({writer} if sources.defines(writer) else set())))


def _is_the_format_s(loader: str, format_: str) -> bool:
    """It loads the format as it lies there; other loaders make something else of it."""
    return loader.rpartition(".")[0] == _format_module(format_)


def _format_module(format_: str) -> str:
    return f"slimbench.methods.formats.{format_.replace('-', '_')}"


def _protocols(config: RunConfig, stage: Stage) -> list[str]:
    if stage is Stage.SPEED:
        return ["speed"]
    names = list(dict.fromkeys(wanted.protocol for wanted in config.suite.passes()))
    names += ["divergence"] * config.suite.divergence + ["zeroshot"] * bool(config.suite.tasks)
    return names + ["generation"] * bool(config.suite.continuations) + ["retrieval"] * bool(config.suite.retrieval)


def _protocol_version(name: str) -> int:
    """The number that `harness.measure.protocols` gives a protocol: `window-1` and `1` are the first."""
    scoring = sources.constant(f"{_MEASURE}.protocols.PERPLEXITY")
    stated = scoring[name] if isinstance(scoring, dict) and name in scoring else sources.constant(f"{_MEASURE}.protocols.{name.upper()}")
    return int(str(stated).rpartition("-")[2])


@cache
def _read(path: Path, mtime_ns: int, size: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    label = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if match := _ENTRY.fullmatch(line):
            entry = Entry(match["kind"], match["name"], int(match["version"]), match["code"])
            label = entry.label
            entries[label] = entry
        elif label and (match := _SAME.fullmatch(line)):
            entries[label] = replace(entries[label], same=(*entries[label].same, (match["code"], match["reason"])))
        else:
            raise ConfigError(f"{path.name}, line {number}: '{line}' is no entry; run `make lock`")
    return entries

"""The code behind a function or class: a hash of its syntax tree and of all project code that it reaches.

What is reached is followed name by name, across modules: a function counts where something that counts names it, and so do the
file of C++ or CUDA whose name it holds and what a module does when it is imported. Where a name leads is what counts, not the
path to it: moving a function, a file or an import changes nothing. Left out are docstrings, comments, annotations, imports,
the wording of errors, and what a class states about itself without computing anything (`FACTS`).
"""

from __future__ import annotations

import ast
import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimbench.util import sources
from slimbench.util.sources import Import, Module, bound, is_docstring, is_for_types, signature

FACTS = {"name", "version", "family", "citation", "reference", "needs", "weight_grid"}
_STATED = {"weight_grid"}  # the facts that follow from settings, and so are properties
_UNTOLD = {"ctx", "type_comment", "kind", "annotation", "returns"}  # fields of a node that compute nothing
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_INSTALLED = {"site-packages", "dist-packages"}
_LOOK_S = 1.0

_hashes: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], _Known] = {}


def code_hash(targets: Iterable[str], follow: Sequence[str], stop: Sequence[str] = ()) -> str:
    """Sixteen hex digits of the code behind some functions or classes.

    Args:
        targets: Their dotted paths. The package of one that lies outside slimbench, or the folder of its module, is followed too.
        follow: Packages and modules of slimbench that are followed.
        stop: Those among them that are not.

    Raises:
        LookupError: A target has no source.
    """
    key = (tuple(targets), tuple(follow), tuple(stop))
    if (known := _hashes.get(key)) and known.is_current():
        return known.code
    reached = _Reached(follow, stop)
    for target in key[0]:
        module, _, name = target.rpartition(".")
        reached.add_root(module, name)
    seen = hashlib.sha256()
    for text in reached.texts():
        seen.update(text.encode() + b"\0")
    _hashes[key] = _Known(seen.hexdigest()[:16], {path: signature(path) for path in reached.paths()}, time.monotonic())
    return _hashes[key].code


@dataclass
class _Known:
    """A hash, the files that it depends on as they were, and when they were last looked at."""

    code: str
    files: dict[Path, tuple[int, int] | None]
    seen_at: float

    def is_current(self) -> bool:
        """Whether no file has changed; a plan of many cells looks once a second."""
        now = time.monotonic()
        if now - self.seen_at > _LOOK_S:
            if any(signature(path) != seen for path, seen in self.files.items()):
                return False
            self.seen_at = now
        return True


class _Reached:
    """What the targets reach: definitions, whole modules and files, each once."""

    def __init__(self, follow: Sequence[str], stop: Sequence[str]) -> None:
        self.follow, self.stop = follow, stop
        self.own: set[Path] = set()
        self.definitions: dict[tuple[str, str], list[str]] = {}
        self.modules: dict[str, list[str]] = {}
        self.files: dict[Path, str] = {}
        self.todo: list[tuple[Module, str]] = []

    def add_root(self, module: str, name: str) -> None:
        source = sources.module(module)
        if source is None:
            raise LookupError(f"module '{module}' has no source")
        if source.name.partition(".")[0] != sources.NAME and (project := _project(source)):
            self.own.add(project)
        if name not in source.definitions:
            raise LookupError(f"module '{module}' defines no '{name}'")
        self.todo.append((source, name))
        while self.todo:
            self._visit(*self.todo.pop())

    def texts(self) -> list[str]:
        """The code as texts in an order that no path has a part in."""
        parts = [text for texts in (*self.definitions.values(), *self.modules.values()) for text in texts]
        return sorted(parts) + sorted(self.files.values())

    def paths(self) -> set[Path]:
        """The files that were read."""
        reached = (sources.module(name) for name in {*self.modules, *(module for module, _ in self.definitions)})
        return {source.path for source in reached if source} | set(self.files)

    def follows(self, module: str) -> bool:
        if _within(module, self.follow):
            return not _within(module, self.stop)
        source = None if module.partition(".")[0] == sources.NAME or not self.own else sources.module(module)
        return source is not None and any(
            source.path.is_relative_to(folder) and not _INSTALLED & set(source.path.relative_to(folder).parts) for folder in self.own
        )

    def reach(self, imported: Import) -> str | None:
        """Follow an import to its definition; the name by which it counts, None where that is not project code."""
        module, attributes = imported.module, imported.attributes
        if not self.follows(module):
            return ".".join(attributes) if module.partition(".")[0] == sources.NAME else None
        source = sources.module(module)
        if source is None or not attributes:
            self._whole(source)
            return ""
        name, rest = attributes[0], attributes[1:]
        if name in source.definitions:
            self.todo.append((source, name))
            return ".".join(attributes)
        if name in source.imports:
            return "|".join(str(self.reach(Import(i.module, i.attributes + rest))) for i in source.imports[name])
        if sources.module(f"{module}.{name}"):
            return self.reach(Import(f"{module}.{name}", rest))
        self._whole(source)
        return ".".join(attributes)

    def _whole(self, source: Module | None) -> None:
        for name in source.definitions if source else ():
            self.todo.append((source, name))  # type: ignore[arg-type]
        if source:
            self._effects(source)

    def _visit(self, source: Module, name: str) -> None:
        if (source.name, name) in self.definitions:
            return
        texts = self.definitions[source.name, name] = []
        self._effects(source)
        texts += [_Writer(source, self).write(node) for node in source.definitions[name]]

    def _effects(self, source: Module) -> None:
        if source.name in self.modules:
            return
        texts = self.modules[source.name] = []
        texts += [_Writer(source, self).write(node) for node in source.effects]
        for imported in source.unused_imports():
            if self.follows(imported.module):
                self.reach(imported)

    def add_file(self, file: Path) -> None:
        """A file that code names, and what it includes."""
        if file in self.files:
            return
        content = file.read_bytes()
        self.files[file] = hashlib.sha256(content).hexdigest()
        for included in _INCLUDE.findall(content):
            if (other := file.parent / included.decode(errors="replace")).is_file():
                self.add_file(other)


class _Writer:
    """Writes a syntax tree as text, the same in every version of Python, and notes what it names."""

    def __init__(self, source: Module, reached: _Reached) -> None:
        self.source, self.reached = source, reached

    def write(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return self._name(node.id, ())
        if isinstance(node, ast.Attribute):
            base, attributes = _chain(node)
            if isinstance(base, ast.Name) and base.id in self.source.imports:
                return self._name(base.id, attributes)
            return f"{self.write(node.value)}.{node.attr}"
        if isinstance(node, ast.Constant):
            return self._constant(node.value)
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            return f"raise {ast.unparse(raised).rpartition('.')[2] if raised else ''}"
        if isinstance(node, ast.AnnAssign):
            return f"{self.write(node.target)}={self.write(node.value) if node.value else ''}"
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            return f"{self.write(node.targets[0])}={self.write(node.value)}"
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in _UNTOLD)
        written = (f"{name}:{self._value(value, node)}" for name, value in fields if value is not None and value != [])
        return f"({type(node).__name__} {' '.join(written)})"

    def _value(self, value: object, parent: ast.AST) -> str:
        if isinstance(value, ast.AST):
            return self.write(value)
        if isinstance(value, list):
            return f"[{', '.join(self._value(item, parent) for item in value if not _is_silent(item, parent))}]"
        return repr(value)

    def _constant(self, value: object) -> str:
        if isinstance(value, str) and 0 < len(value) < 200 and "\0" not in value and ".." not in value and not value.startswith(("/", ".")):
            file = self.source.path.parent / value
            if "." in value and file.suffix != ".py" and file.is_file():
                self.reached.add_file(file)
        return f"{type(value).__name__} {value!r}"

    def _name(self, name: str, attributes: tuple[str, ...]) -> str:
        if name in self.source.definitions:
            self.reached.todo.append((self.source, name))
        if name not in self.source.imports:
            return ".".join((name, *attributes))
        written = set()
        for imported in self.source.imports[name]:
            whole = Import(imported.module, imported.attributes + attributes)
            reached = self.reached.reach(whole)
            written.add(".".join((whole.module, *whole.attributes)) if reached is None else f"@{reached}")
        return "|".join(sorted(written))


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _chain(node: ast.Attribute) -> tuple[ast.expr, tuple[str, ...]]:
    """`a.b.c` as the node of `a` and the names after it."""
    names, base = [node.attr], node.value
    while isinstance(base, ast.Attribute):
        names.append(base.attr)
        base = base.value
    return base, tuple(reversed(names))


def _is_silent(node: object, parent: ast.AST) -> bool:
    """A part of a body that computes nothing."""
    if is_docstring(node) or is_for_types(node) or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
        return True
    if isinstance(parent, ast.ClassDef) and isinstance(node, ast.Assign | ast.AnnAssign):
        return set(bound(node)) <= FACTS
    return isinstance(parent, ast.ClassDef) and isinstance(node, ast.FunctionDef) and node.name in _STATED


def _project(source: Module) -> Path | None:
    """The folder of code that belongs to a module outside slimbench: its top package, or the folder it lies in; None: itself alone."""
    top = source.path
    for _ in source.name.split(".")[1:]:
        top = top.parent
    if source.path.name == "__init__.py" or "." in source.name:
        return top if top.is_dir() else top.parent
    return None if _INSTALLED & set(top.parts) else top.parent

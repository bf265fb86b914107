"""Source code as data: what a module defines, where its names come from, and what it does when it is imported. Nothing is imported."""

from __future__ import annotations

import ast
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).absolute().parents[1]
NAME = __name__.partition(".")[0]
_PLAIN_DECORATORS = {
    "dataclass",
    "cache",
    "lru_cache",
    "contextmanager",
    "jit",
    "abstractmethod",
    "staticmethod",
    "no_grad",
    "inference_mode",
}


@dataclass(frozen=True)
class Import:
    """What a name of a module stands for: a module, or an attribute of one."""

    module: str
    attributes: tuple[str, ...]


@dataclass
class Module:
    """A module's source: where its names come from, what it defines, and what it does when it is imported."""

    name: str
    path: Path
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Import]] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_bytes())
        self._package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    self.imports.setdefault(bound, []).append(Import(alias.name if alias.asname else bound, ()))
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(node)
                for alias in node.names:
                    self.imports.setdefault(alias.asname or alias.name, []).append(Import(module, (alias.name,)))
        for statement in self.tree.body:
            self._place(statement)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self._package.split(".")
        return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])

    def _place(self, statement: ast.stmt) -> None:
        """A statement at the top of the module belongs to the names that it binds; without any, it is an effect of the import."""
        if is_docstring(statement) or is_for_types(statement) or isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
            return
        names = list(bound(statement))
        if names == ["__all__"]:
            return
        for name in names:
            self.definitions.setdefault(name, []).append(statement)
        decorators = getattr(statement, "decorator_list", [])
        if not names or any(_leaf(decorator) not in _PLAIN_DECORATORS for decorator in decorators):
            self.effects.append(statement)

    def unused_imports(self) -> list[Import]:
        """Modules that are imported for what their import does, since nothing names them; a package's own re-exports are not."""
        if self.path.name == "__init__.py":
            return []
        return [imported for name, found in self.imports.items() if name not in self._used for imported in found]

    @cached_property
    def _used(self) -> set[str]:
        used = {node.id for node in walk(self.tree, types=True) if isinstance(node, ast.Name)}
        return used | {node.value for node in walk(self.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


_modules: dict[str, tuple[tuple[int, int] | None, Module]] = {}


def signature(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def module(name: str) -> Module | None:
    """A module's source as it lies there now, or None where there is none."""
    path = _path(name)
    if path is None:
        return None
    seen = signature(path)
    if name not in _modules or _modules[name][0] != seen or _modules[name][1].path != path:
        _modules[name] = seen, Module(name, path)
    return _modules[name][1]


def _path(name: str) -> Path | None:
    """The file of a module, without importing it or its packages."""
    top, *parts = name.split(".")
    if top == NAME:
        base = PACKAGE
    else:
        spec = importlib.machinery.PathFinder.find_spec(top, sys.path) if top else None
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            return None
        if not parts:
            return Path(spec.origin)
        base = Path(spec.origin).parent
    for folder in parts[:-1]:
        base = base / folder
    stem = base / parts[-1] if parts else base
    return next((path for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if path.is_file()), None)


def constant(dotted: str) -> object:
    """The value of a literal at the top of a module, read without importing it; None where there is none."""
    path, _, name = dotted.rpartition(".")
    source = module(path)
    for statement in source.definitions.get(name, []) if source else []:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            with suppress(ValueError):
                return ast.literal_eval(statement.value)
    return None


def defines(dotted: str) -> bool:
    """Whether a module defines a name, read without importing it."""
    path, _, name = dotted.rpartition(".")
    source = module(path)
    return source is not None and name in source.definitions


def walk(tree: ast.AST, types: bool = False) -> Iterator[ast.AST]:
    """All nodes, those for type checkers only if asked."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if types or not is_for_types(node):
            yield node
            todo += ast.iter_child_nodes(node)


def bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds at its own level."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (
            node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        )
        return
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield from bound(child)
        elif isinstance(child, ast.ExceptHandler):
            for inner in child.body:
                yield from bound(inner)


def _leaf(decorator: ast.expr) -> str:
    """The last name of a decorator: `cache` of `@functools.cache` and of `@cache()`."""
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_for_types(node: object) -> bool:
    """An `if TYPE_CHECKING:` without an else, or `if __name__ == "__main__":`."""
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")

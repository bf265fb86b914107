"""The result of a small program that a model wrote, found by walking its syntax tree; nothing of it is run as Python.

The language is arithmetic: numbers, lists and tuples of them, names, `+ − * / // % **`, comparisons, `and or not`, conditionals, `for`,
`while`, `break`, `continue`, assignments, a few functions, and one function of no arguments, `solution`, whose value is then the result.
No attribute, import, text operation, comprehension or call of anything else is in it. Steps, sizes of numbers and of lists have limits.
Each item that is built or looked through is a step, taken beforehand, so that the steps bound the memory of a program too.
The result is what `solution` returns, or the value of `answer`, or of `result`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_STEPS = 20_000
MOST_BITS = 4_096
MOST_ITEMS = 10_000
LONGEST = 4_000
_MOST_DIGITS = 15
RESULTS = ("answer", "result")

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARED: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
}
_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "len": len,
    "max": max,
    "min": min,
    "range": range,
    "round": round,
    "sorted": sorted,
    "sum": sum,
}

_NO_ARGUMENTS = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])


class NoProgram(Exception):
    """It is none of the language, goes beyond its limits, or fails: one line that says what."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def result(source: str) -> str:
    """The result of a program as text: whole numbers without a decimal point.

    Raises:
        NoProgram: There is none.
    """
    if len(source) > LONGEST:
        raise NoProgram("too long")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoProgram("no Python") from error
    run = _Run()
    try:
        value = run.program(tree)
    except NoProgram:
        raise
    except (_Break, _Continue, _Return) as error:
        raise NoProgram("break, continue or return in the wrong place") from error
    except (ArithmeticError, TypeError, ValueError, LookupError, RecursionError, MemoryError) as error:
        raise NoProgram(type(error).__name__) from error
    return _shown(value)


class _Run:
    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._left = MOST_STEPS

    def program(self, tree: ast.Module) -> Any:
        solution: ast.FunctionDef | None = None
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "solution":
                solution = statement
            else:
                self.statement(statement)
        if solution is None:
            found = next((name for name in RESULTS if name in self._values), None)
            if found is None:
                raise NoProgram("no answer")
            return self._values[found]
        if solution.decorator_list or ast.dump(solution.args) != ast.dump(_NO_ARGUMENTS):
            raise NoProgram("solution takes arguments or is decorated")
        try:
            self.body(solution.body)
        except _Return as returned:
            return returned.value
        raise NoProgram("no answer")

    def body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        self._step()
        match node:
            case ast.Assign(targets=targets, value=value):
                found = self.value(value)
                for target in targets:
                    self._bind(target, found)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self.value(value))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                self._bind(target, self._binary(op, self._named(name), self.value(value)))
            case ast.If(test=test, body=body, orelse=other):
                self.body(body if self.value(test) else other)
            case ast.For(target=target, iter=items, body=body, orelse=[]):
                self._each(target, self._listed(self.value(items)), body)
            case ast.While(test=test, body=body, orelse=[]):
                while self.value(test):
                    try:
                        self.body(body)
                    except _Continue:
                        continue
                    except _Break:
                        break
            case ast.Return(value=ast.expr() as value):
                raise _Return(self.value(value))
            case ast.Break():
                raise _Break
            case ast.Continue():
                raise _Continue
            case ast.Pass():
                pass
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                raise NoProgram(f"{type(node).__name__} is not of the language")

    def _each(self, target: ast.expr, items: Sequence[Any], body: Sequence[ast.stmt]) -> None:
        for item in items:
            self._bind(target, item)
            try:
                self.body(body)
            except _Continue:
                continue
            except _Break:
                break

    def value(self, node: ast.expr) -> Any:
        self._step()
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return self._sized(value)
            case ast.Name(id=name):
                return self._named(name)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(op, self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.value(operand))
            case ast.BoolOp(op=op, values=values):
                return self._logical(isinstance(op, ast.And), values)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compared(self.value(left), ops, others)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self.value(body if self.value(test) else other)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return self._sized([self.value(item) for item in items])
            case ast.Subscript(value=of, slice=ast.expr() as place) if not isinstance(place, ast.Slice):
                return self._listed(self.value(of))[self.value(place)]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _CALLS:
                return self._called(name, [self.value(argument) for argument in arguments])
            case _:
                raise NoProgram(f"{type(node).__name__} is not of the language")

    def _binary(self, op: ast.operator, one: Any, other: Any) -> Any:
        if type(op) not in _BINARY:
            raise NoProgram(f"{type(op).__name__} is not of the language")
        if not isinstance(one, int | float) or not isinstance(other, int | float):
            raise NoProgram("operands are no numbers")
        if isinstance(op, ast.Pow) and (abs(other) > MOST_BITS or (isinstance(one, int) and one.bit_length() * abs(other) > MOST_BITS)):
            raise NoProgram("too large a power")
        return self._sized(_BINARY[type(op)](one, other))

    def _logical(self, every: bool, values: Sequence[ast.expr]) -> Any:
        found: Any = every
        for value in values:
            found = self.value(value)
            if bool(found) != every:
                break
        return found

    def _compared(self, one: Any, ops: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> bool:
        for op, node in zip(ops, others, strict=True):
            if type(op) not in _COMPARED:
                raise NoProgram(f"{type(op).__name__} is not of the language")
            other = self.value(node)
            self._comparable(op, one, other)
            if not _COMPARED[type(op)](one, other):
                return False
            one = other
        return True

    def _comparable(self, op: ast.cmpop, one: Any, other: Any) -> None:
        """Numbers with numbers, and a number with a list of them that it may be in."""
        if isinstance(op, ast.In | ast.NotIn):
            self._numbers(self._listed(other))
        elif isinstance(other, list):
            raise NoProgram("lists are not compared")
        if isinstance(one, list):
            raise NoProgram("lists are not compared")

    def _numbers(self, values: list[Any]) -> list[Any]:
        """A list of numbers alone; looking through it costs a step for each."""
        self._step(len(values))
        if any(isinstance(value, list) for value in values):
            raise NoProgram("no list of numbers")
        return values

    def _called(self, name: str, arguments: list[Any]) -> Any:
        if name == "range":
            if (count := len(range(*arguments))) > MOST_ITEMS:
                raise NoProgram("too many items")
            self._step(count)
        elif name == "len":
            self._listed(*arguments)
        elif name in ("max", "min", "sum", "sorted") and len(arguments) == 1:
            self._numbers(self._listed(*arguments))
        elif name in ("sum", "sorted") or any(isinstance(argument, list) for argument in arguments):
            raise NoProgram(f"{name} of other than one list or numbers")
        if name == "round" and len(arguments) > 1 and abs(arguments[1]) > _MOST_DIGITS:
            raise NoProgram("too many digits")
        found = _CALLS[name](*arguments)
        return self._sized(list(found) if name in ("range", "sorted") else found)

    def _bind(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name) if name not in _CALLS:
                self._values[name] = value
            case ast.Tuple(elts=targets):
                for each, item in zip(targets, self._listed(value), strict=True):
                    self._bind(each, item)
            case _:
                raise NoProgram(f"cannot assign to {type(target).__name__}")

    def _named(self, name: str) -> Any:
        if name not in self._values:
            raise NoProgram("a name without a value")
        return self._values[name]

    def _listed(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise NoProgram("no list")
        return value

    def _sized(self, value: Any) -> Any:
        if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > MOST_BITS):
            raise NoProgram("too large a number")
        if isinstance(value, list) and len(value) > MOST_ITEMS:
            raise NoProgram("too many items")
        return value

    def _step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise NoProgram("too many steps")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoProgram("its answer is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise NoProgram("its answer is no number")
    return str(int(value)) if value == int(value) else repr(round(value, 6))

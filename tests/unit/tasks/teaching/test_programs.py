"""Programs of a model: what they come to, and that nothing of them is run as Python."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest

from slimbench.tasks.teaching import programs


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("answer = 2 + 3 * 4", "14"),
        ("apples = 12\neaten = 5\nresult = apples - eaten", "7"),
        ("def solution():\n    '''How many legs?'''\n    legs = 4 * 3\n    return legs + 2", "14"),
        ("total = 0\nfor n in range(1, 11):\n    if n % 2:\n        continue\n    total += n\nanswer = total", "30"),
        ("n, count = 27, 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    count += 1\nanswer = count", "111"),
        ("prices = [3, 4.5, 2]\nanswer = round(sum(prices) / len(prices), 2)", "3.17"),
        ("answer = max(2, 7) if 1 < 2 <= 2 and not False else 0", "7"),
        ("answer = sorted([3, 1, 2])[0] + abs(-4)", "5"),
        ("x: int = 3\nanswer = -x ** 2", "-9"),
        ("answer = 7 / 2", "3.5"),
        ("answer = 1 if 3 in [1, 2, 3] and 4 not in [1] else 0", "1"),
        ("answer = round(2.34567, 2) + len([1, 2])", "4.35"),
        ("for n in [5, 6, 7]:\n    if n > 5:\n        break\nanswer = n", "6"),
    ],
)
def test_the_result_is_what_the_program_says(source: str, result: str) -> None:
    assert programs.result(source) == result


WIDE = "a = 2 ** 2040\na = a * a\nb = a + 10000\n"
"""Two numbers of 4,081 bits, between which a range has as many items as it may."""

HOSTILE = {
    "import": "import os\nanswer = 1",
    "exec": "exec('1')\nanswer = 1",
    "open": "answer = open('CANARY', 'w')",
    "attribute": "answer = (1).__class__",
    "method": "answer = [].append(1)",
    "dunder": "answer = __import__('os')",
    "lambda": "answer = (lambda: 1)()",
    "comprehension": "answer = [n for n in range(3)][0]",
    "text": "answer = 'a' * 5",
    "f-string": "answer = f'{1}'",
    "slice": "answer = [1, 2, 3][0:2][0]",
    "class": "class A: pass\nanswer = 1",
    "inner function": "def solution():\n    def inner():\n        return 1\n    return inner()",
    "decorator": "@print\ndef solution():\n    return 1",
    "default": "def solution(n=open('CANARY', 'w')):\n    return 1",
    "keyword": "answer = sorted([1], key=abs)[0]",
    "star": "answer = max(*[1, 2])",
    "walrus": "answer = (n := 1)",
    "del": "n = 1\ndel n\nanswer = 1",
    "global": "def solution():\n    global n\n    return 1",
    "try": "try:\n    answer = 1\nexcept Exception:\n    answer = 2",
    "with": "with open('CANARY') as f:\n    answer = 1",
    "assert": "assert True\nanswer = 1",
    "raise": "raise ValueError",
    "shadowed": "abs = 3\nanswer = abs",
    "set": "answer = len({1, 2})",
    "dict": "answer = len({1: 2})",
    "bytes": "answer = len(b'12')",
    "complex": "answer = 1j",
    "endless": "while True:\n    pass\nanswer = 1",
    "endless for": "n = 0\nfor a in range(9999):\n    for b in range(9999):\n        n += 1\nanswer = n",
    "long range": "answer = sum(range(10 ** 9))",
    "power": "answer = 9 ** 9 ** 9",
    "float power": "answer = 10.0 ** 5000",
    "growing": "n = 3\nfor a in range(100):\n    n = n * n\nanswer = n",
    "big lists": "n = [1]\nfor a in range(60):\n    n = [n, n]\nanswer = len(n) + sorted(n)[0]",
    "many sorts": "n = range(9000)\nfor a in range(9000):\n    m = sorted(n)\nanswer = 1",
    "deep": "answer = " + "(" * 300 + "1" + ")" * 300,
    "deep sum": "answer = " + "-" * 3000 + "1",
    "division": "answer = 1 / 0",
    "infinite": "answer = 1e308 * 10",
    "no number": "answer = 1e308 * 10 - 1e308 * 10",
    "nothing": "n = 1",
    "no value": "answer = n",
    "truth": "answer = 1 < 2",
    "list": "answer = [1, 2]",
    "no Python": "the answer is 5",
    "null byte": "answer = 1\x00",
    "too long": "answer = 1" + "\n" * 5000,
    "return outside": "return 1",
    "break outside": "break\nanswer = 1",
    "index": "answer = [1][5]",
    "add a list": "answer = [1] + [2]",
    "long rounding": "answer = round(1, -10 ** 9)",
    "compared lists": "a = [1]\nb = [1]\nfor n in range(40):\n    a = [a, a]\n    b = [b, b]\nanswer = 1 if a == b else 2",
    "sorted lists": "a = [1]\nb = [1]\nfor n in range(40):\n    a = [a, a]\n    b = [b, b]\nanswer = len(sorted([a, b]))",
    "list in lists": "a = [1]\nb = [1]\nfor n in range(40):\n    a = [a, a]\n    b = [b, b]\nanswer = 1 if a in [b] else 2",
    "sum of lists": "a = range(2000)\nanswer = len(sum([a] * 400, []))",
    "summed lists": "a = range(2000)\nanswer = len(sum([a, a, a], []))",
    "many items": "answer = len([0] * 10 ** 9)",
    "kept ranges": f"{WIDE}x = [0]\nn = 0\nwhile n < 40:\n    x = [range(a, b), x]\n    n = n + 1\nanswer = n",
    "ranges in a list": f"{WIDE}x = [{'range(a, b), ' * 60}]\nanswer = 1",
    "kept sorts": "a = range(9000)\nx = [0]\nfor n in range(900):\n    x = [sorted(a), x]\nanswer = 1",
    "kept numbers": "a = 2 ** 4000\nx = [0]\nwhile True:\n    a = a + 1\n    x = [a, a - 1, a - 2, a - 3, -a, x]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_quickly_and_does_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    with pytest.raises(programs.NoProgram) as error:
        programs.result(HOSTILE[name])
    assert time.process_time() - began < 2 and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("endless", "endless for")])
def test_what_a_program_builds_is_bounded_in_total(name: str) -> None:
    """20,000 steps, each with one item of 4,096 bits at most, are some 12 MB; a limit on each list alone would let memory grow."""
    tracemalloc.start()
    try:
        with pytest.raises(programs.NoProgram):
            programs.result(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()


def test_random_programs_come_to_what_python_makes_of_them() -> None:
    draws = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0:
            return draws.choice(["a", "b", "c", str(draws.randint(0, 20)), f"{draws.randint(1, 90) / 8}"])
        one, other = expression(depth - 1), expression(draws.randrange(depth))
        kind = draws.randrange(6)
        if kind == 0:
            return f"({one} if {other} > {draws.randint(0, 9)} else {other})"
        if kind == 1:
            return f"max({one}, abs({other}))"
        return f"({one} {draws.choice(['+', '-', '*', '//', '%', '/'])} {other})"

    compared = 0
    for _ in range(400):
        source = f"a, b, c = {draws.randint(-9, 9)}, {draws.randint(1, 9)}, {draws.randint(0, 99)}\n"
        source += f"for n in range({draws.randint(1, 4)}):\n    a = {expression(2)}\n    b += n\nanswer = {expression(3)}\n"
        values: dict[str, float] = {}
        try:
            exec(source, {"max": max, "abs": abs, "range": range}, values)  # written above
        except ArithmeticError:
            with pytest.raises(programs.NoProgram):
                programs.result(source)
            continue
        compared += 1
        assert float(programs.result(source)) == pytest.approx(values["answer"], abs=1e-6), source
    assert compared > 200

"""The check of the house finds each kind of fault, and the house has none."""

from __future__ import annotations

from tests.support import house
from tests.support.paths import ROOT


def test_the_house_is_in_order() -> None:
    assert list(house.faults(ROOT)) == []


def test_a_module_that_the_graph_lacks_is_named() -> None:
    files = ["slimbench/a/__init__.py", "slimbench/a/b.py", "slimbench/c/d.py"]
    assert [line.partition(":")[0] for line in house.missing(files, {"slimbench.a", "slimbench.a.b"})] == ["slimbench/c/d.py"]


def test_circles_of_any_length_are_named_once() -> None:
    imports = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"f"}, "f": {"e"}, "g": {"a", "f"}}
    assert list(house.circles(imports)) == ["import circle: e ↔ f", "import circle: a ↔ b ↔ c"]
    assert list(house.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_long_modules_and_crowded_rooms_are_named() -> None:
    assert list(house.long({"a.py": 400, "b.py": 401})) == ["b.py: 401 lines; a module has at most 400"]
    full = [f"harness/run/m{i}.py" for i in range(14)]
    assert not list(house.crowded([*full, "harness/run/__init__.py"]))
    assert list(house.crowded([*full, "harness/run/more.py"])) == ["harness/run: 15 modules; a room has at most 14"]
    assert not list(house.crowded([file.replace("run", "engines") for file in [*full, "harness/run/more.py"]]))

"""`identity.lock` holds versions to the code behind them: what computes counts, how it is written and where it lies does not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slimbench.harness.config import lock
from slimbench.harness.config.errors import ConfigError
from slimbench.util import sources, syntax

RTN, GPTQ = "methods/quantization/weight/rtn.py", "methods/quantization/weight/gptq.py"
Edit = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the sources that hashes are taken of, and of the lock."""
    copy = tmp_path_factory.mktemp("tree") / "slimbench"
    copy.mkdir()
    for part in ("methods", "harness", "util"):
        shutil.copytree(sources.PACKAGE / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.yaml", "*.csv"))
    shutil.copy(lock.LOCK, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PACKAGE", copy)
        patch.setattr(lock, "LOCK", copy / "identity.lock")
        patch.setattr(syntax, "_hashes", {})
        patch.setattr(syntax, "_LOOK_S", -1.0)
        yield copy


@pytest.fixture
def edit(tree: Path) -> Iterator[Edit]:
    """Replaces text in a file of the copy; afterwards all is as it was."""
    before = {lock.LOCK: lock.LOCK.read_text()}

    def replace(file: str, old: str, new: str) -> None:
        text = (tree / file).read_text()
        assert old in text
        before.setdefault(tree / file, text)
        (tree / file).write_text(text.replace(old, new))

    yield replace
    for path, text in before.items():
        path.write_text(text)


def labels(problems: list[str]) -> set[str]:
    return {problem.partition(":")[0] for problem in problems}


def test_the_lock_is_true_of_what_is_shipped() -> None:
    assert lock.problems() == []
    assert {label.partition(" ")[0] for label in lock.read()} == {"method", "engine", "format", "protocol"}


def test_other_arithmetic_without_a_version_is_refused(edit: Edit) -> None:
    edit(RTN, "packed.Grid(self.bits, self.group_size), self.symmetric, ", "packed.Grid(self.bits, self.group_size), not self.symmetric, ")
    assert labels(lock.problems()) == {"method rtn"}
    assert "--same REASON" in lock.problems()[0]


def test_arithmetic_that_many_share_is_refused_for_each_of_them(edit: Edit) -> None:
    edit("methods/kernels/rounding.py", ".round_()", ".floor_()")
    found = labels(lock.problems())
    assert {"method rtn", "method dense"} & found == {"method rtn"}
    assert len(found) > 3


@pytest.mark.parametrize(
    ("file", "old", "new", "label"),
    [
        ("methods/kernels/cpu/packed_mm.cpp", "#include", "// one more line\n#include", "format packed"),
        ("methods/kernels/cuda/hardware.cuh", "#pragma once", "#pragma once\n// x", "format packed"),
        ("methods/kernels/triton/packed_mm.py", "_TWO_23 = ", "_TWO_23 = 1 + ", "format packed"),
        ("harness/measure/perplexity.py", "watcher).double().mean(1)", "watcher).double().sum(1)", "protocol window"),
        ("harness/measure/loaded.py", "logsumexp(", "logsumexp(1 * ", "protocol window"),
        ("harness/engines/transformers.py", "_CHUNK = ", "_CHUNK = 1 + ", "engine transformers"),
    ],
)
def test_the_whole_way_counts(edit: Edit, file: str, old: str, new: str, label: str) -> None:
    edit(file, old, new)
    assert label in labels(lock.problems())


@pytest.mark.parametrize(
    ("file", "old", "new", "engine"),
    [
        ("methods/formats/gguf/__init__.py", "1 - share", "2 - share", "llamacpp"),
        ("methods/formats/compressed_tensors.py", "layer.codes.short() - grid.mid", "layer.codes.short() + grid.mid", "vllm"),
        ("methods/formats/openvino.py", "compress_to_fp16=True", "compress_to_fp16=False", "openvino"),
    ],
)
def test_a_conversion_is_the_engine_s_whose_version_stands_in_keys(edit: Edit, file: str, old: str, new: str, engine: str) -> None:
    edit(file, old, new)
    assert f"engine {engine}" in labels(lock.problems())


def test_words_and_form_do_not_count(tree: Path, edit: Edit) -> None:
    edit(RTN, '"""Round-to-nearest, weight only.', '"""Other words.')
    edit(RTN, "model = dense.load()", "model = (\n            dense.load()  # a comment\n        )")
    edit(RTN, "calibration: Calibration, out: Path) -> Claim:", 'calibration: "Calibration", out: Path):\n        """Words."""')
    edit("methods/core/layers.py", "raise ValueError(", "raise ValueError('other words: ' + ")
    edit(GPTQ, "arxiv=", "year=2023, arxiv=".replace("year=2023, ", ""))
    edit(GPTQ, '"searched" if self.observer else "min-max"', '"min-max"')
    edit("methods/quantization/weight/hqq.py", "uniform_grid(False, ", "uniform_grid(True, ")
    assert lock.problems() == []


def test_a_reason_or_a_version_settles_it(tree: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lock.read()["method rtn"]
    edit(RTN, "model = dense.load()", "model = dense.load()\n        model.eval()")
    written = lock.LOCK.read_text()
    with pytest.raises(ConfigError, match="method rtn: the code changed and the version did not"):
        lock.update()
    assert lock.LOCK.read_text() == written
    assert lock.update(["method rtn"], same="the model is in\nevaluation mode anyway") == ["method rtn"]
    after = lock.read()["method rtn"]
    assert lock.problems() == []
    assert (after.same, after.origin) == ((*before.same, (before.code, "the model is in evaluation mode anyway")), before.origin)
    assert lock._canonical(after, after.code) == before.origin, "old artefacts and records stand"
    edit(RTN, "model.eval()", "model.train()")
    assert labels(lock.problems()) == {"method rtn"}
    from slimbench.methods.quantization.weight.rtn import RTN as Method

    monkeypatch.setattr(Method, "version", 2, raising=False)
    assert lock.update() == ["method rtn"]
    assert lock.read()["method rtn"].same == ()
    monkeypatch.setattr(Method, "version", 1)
    with pytest.raises(ConfigError, match="lower than 2"):
        lock.update()


def test_hashes_are_the_same_in_every_python(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from slimbench.util import sources, syntax; "
        "print(syntax.code_hash([sys.argv[2]], ['slimbench.methods', 'slimbench.util'], ['slimbench.methods.base']))"
    )
    found = [path for minor in range(11, 16) if (path := shutil.which(f"python3.{minor}"))]
    others = [python for python in found if subprocess.run([python, "-I", "-c", ""], capture_output=True).returncode == 0]
    if not others:
        pytest.skip("no other Python here")
    for target in ("slimbench.methods.formats.packed.load", "slimbench.methods.quantization.weight.gptq.GPTQ"):
        here = syntax.code_hash([target], *lock._FOLLOW["method"])
        for python in others:
            command = [python, "-I", "-c", code, str(sources.PACKAGE.parent), target]
            there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            assert there == here, (target, python)


def test_moving_files_and_imports_changes_nothing(tree: Path) -> None:
    """The last one to use the copy, which it leaves in disorder."""
    before = lock.live()
    (tree / "methods/core/masks.py").rename(tree / "methods/kernels/zeros.py")
    for file in tree.rglob("*.py"):
        text = file.read_text()
        moved = text.replace("slimbench.methods.core.masks", "slimbench.methods.kernels.zeros")
        moved = moved.replace("from slimbench.methods.core import masks", "from slimbench.methods.kernels import zeros as masks")
        if moved != text:
            file.write_text(moved)
    rtn = (tree / RTN).read_text()
    plain, dotted = "from slimbench.methods.formats import packed\n", "import slimbench.methods.formats.packed as packed\n"
    assert plain in rtn
    (tree / RTN).write_text(rtn.replace(plain, dotted))
    assert lock.live() == before
    (tree / GPTQ).rename(tree / "methods/quantization/codebook/elsewhere.py")
    moved_target = "slimbench.methods.quantization.codebook.elsewhere.GPTQ"
    assert lock._code("method", (moved_target,)) == before["method gptq"].code

"""Whether modules of slimbench were imported by a second name, asked here and, by a method that claims nothing else, in a worker."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method

FOLDERS = ("harness", "methods", "tasks", "leaderboard", "conf")


def second_names() -> list[str]:
    """Modules of this process that are named by a folder at the top instead of by `slimbench`."""
    return sorted(name for name in sys.modules if name.partition(".")[0] in FOLDERS)


def write_clashing_packages(folder: Path) -> None:
    """Give a folder packages of the names of slimbench's own folders, each of which refuses to be imported."""
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} of another project was imported')\n")


@dataclass(frozen=True)
class Inventory(Method):
    """Leaves the model as it is and says which modules it was compressed among."""

    name = "inventory"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        shutil.copytree(dense.path, out, dirs_exist_ok=True)
        return Claim(self.produces, details={"second_names": second_names(), "stages": "slimbench.harness.stages.compress" in sys.modules})

"""A C++ source of operators, compiled for this processor on first use."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from slimbench.util import locks
from slimbench.util.files import atomic_file, cache_dir

FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-DAT_PARALLEL_OPENMP=1")


class NotBuilt(Exception):
    """The kernel could not be compiled. The message says what would help."""


def load(source: Path) -> None:
    """Compile a source, unless the cache holds it, and register its operators.

    Raises:
        NotBuilt: There is no compiler, or it fails.
        OSError: The library cannot be loaded.
    """
    library = _library(source)
    with locks.held(library):
        if not library.is_file():
            _compile(source, library)
    torch.ops.load_library(library)


def compiler() -> str:
    """The C++ compiler: `CXX`, or the first of g++ and clang++ that is there.

    Raises:
        NotBuilt: There is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise NotBuilt("no C++ compiler (g++ or clang++) to build the CPU kernel with; install one, or name it in CXX")


def _library(source: Path) -> Path:
    """Where the compiled source lies: its name holds all that it depends on."""
    command = [compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    seen = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        seen.update(header.read_bytes())
    for fact in (*FLAGS, torch.__version__, target):
        seen.update(f"\0{fact}".encode())
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{source.stem}-{seen.hexdigest()[:16]}.so"


def _compile(source: Path, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    links = [argument for path in library_paths() for argument in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with atomic_file(library) as out:
        command = [compiler(), *FLAGS, abi, *includes, str(source), "-o", str(out), *links, "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            raise NotBuilt(f"{compiler()} could not build the CPU kernel: {errors[0].strip()}")

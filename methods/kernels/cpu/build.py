"""Compiles the CPU kernel for this processor on first use, and registers its operators: `slimbench::packed_mm` and, for several
weights with the same inputs, `slimbench::packed_mm_shared`."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from slimbench.util import locks
from slimbench.util.files import atomic_file, cache_dir

SOURCE = Path(__file__).with_name("packed_mm.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-DAT_PARALLEL_OPENMP=1")


class NotBuilt(Exception):
    """The kernel could not be compiled. The message says what would help."""


@functools.cache
def missing() -> str | None:
    """Why the operator cannot be had here, in one line; None once it is compiled, or found in the cache, and registered."""
    try:
        library = _library()
        with locks.held(library):
            if not library.is_file():
                _compile(library)
        torch.ops.load_library(library)
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    torch.library.register_fake("slimbench::packed_mm", _shape)
    torch.library.register_fake("slimbench::packed_mm_shared", _shapes)
    return None


def _shape(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, bits: int, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


def _shapes(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    offsets: list[torch.Tensor | None],
    bits: list[int],
    outputs: list[int],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], width) for width in outputs]


def _library() -> Path:
    """Where the compiled kernel lies: its name holds all that it depends on."""
    seen = hashlib.sha256(SOURCE.read_bytes())
    for fact in (*FLAGS, torch.__version__, _target()):
        seen.update(f"\0{fact}".encode())
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"packed_mm-{seen.hexdigest()[:16]}.so"


def compiler() -> str:
    """The C++ compiler: `CXX`, or the first of g++ and clang++ that is there.

    Raises:
        NotBuilt: There is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise NotBuilt("no C++ compiler (g++ or clang++) to build the CPU kernel with; install one, or name it in CXX")


def _target() -> str:
    """What the compiler says of itself and of this processor: its predefined macros."""
    command = [compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def _compile(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    links = [argument for path in library_paths() for argument in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with atomic_file(library) as out:
        command = [compiler(), *FLAGS, abi, *includes, str(SOURCE), "-o", str(out), *links, "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            raise NotBuilt(f"{compiler()} could not build the CPU kernel: {errors[0].strip()}")

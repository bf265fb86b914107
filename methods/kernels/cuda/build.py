"""Compiles the CUDA kernel on first use. Its C interface needs nvcc alone: no headers of torch, and no card."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from slimbench.methods.kernels.cpu.library import NotBuilt, compiler
from slimbench.util import locks
from slimbench.util.files import atomic_file, cache_dir

SOURCE = Path(__file__).with_name("w4a16_decode.cu")
HEADERS = tuple(sorted(SOURCE.parent.glob("*.cuh")))
ARCHITECTURES = ("80", "89", "90")
"""Compute capabilities with machine code of their own; newer cards compile the PTX of the last one."""

_FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
_ARGUMENTS: tuple[Any, ...] = (*[ctypes.c_void_p] * 5, *[ctypes.c_int] * 7, ctypes.c_void_p)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel's library, compiled unless the cache holds it.

    Raises:
        NotBuilt: No CUDA compiler, or it fails.
    """
    path = _path()
    with locks.held(path):
        if not path.is_file():
            with atomic_file(path) as made:
                _run([nvcc(), *_FLAGS, *_targets(), str(SOURCE), "-o", str(made)])
    return load(path)


@functools.cache
def missing() -> str | None:
    """Why the library cannot be had here, in one line; None where it can. Asked once."""
    try:
        library()
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    return None


def load(path: Path) -> ctypes.CDLL:
    """Open a library with the kernel's C interface, from nvcc or from `emulated`."""
    found = ctypes.CDLL(str(path))
    found.slimbench_w4a16_decode.argtypes = _ARGUMENTS
    found.slimbench_w4a16_decode.restype = ctypes.c_int
    found.slimbench_describe.argtypes = (ctypes.c_int,)
    found.slimbench_describe.restype = ctypes.c_char_p
    return found


def nvcc() -> str:
    """The CUDA compiler: of `CUDA_HOME`, in the path, or where CUDA installs it.

    Raises:
        NotBuilt: There is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for name in (home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise NotBuilt("no CUDA compiler (nvcc) to build the decode kernel with; install the CUDA toolkit, or name its folder in CUDA_HOME")


def compile_only(architecture: str, out: Path) -> str:
    """Compile the device code for one compute capability, for example "90", into a cubin. Neither torch nor a card is needed.

    Returns:
        The assembler's report: registers, shared memory and spills of each kernel.

    Raises:
        NotBuilt: No CUDA compiler, or it fails.
    """
    return _run([nvcc(), "-O3", "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", str(SOURCE), "-o", str(out)])


def emulated(out: Path) -> ctypes.CDLL:
    """The kernel for this processor, every lane a thread (see `emulation.hpp`): for tests of what it computes.

    Raises:
        NotBuilt: No C++ compiler, or it fails.
    """
    _run([compiler(), "-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", "-x", "c++", str(SOURCE), "-o", str(out)])
    return load(out)


def _targets() -> list[str]:
    newest = ARCHITECTURES[-1]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return [*code, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def _path() -> Path:
    """Where the compiled library lies: its name holds all that it depends on."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    seen = hashlib.sha256("\0".join((*_FLAGS, *_targets(), version)).encode())
    for file in (SOURCE, *HEADERS):
        seen.update(file.read_bytes())
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"w4a16_decode-{seen.hexdigest()[:16]}.so"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.splitlines() or ["no message"]
        errors = [line for line in said if "error" in line or "fatal" in line] or said
        raise NotBuilt(f"{Path(command[0]).name} could not build the decode kernel: {errors[0].strip()}")
    return done.stderr

"""What the control groups around this process let it have: memory, processor time, and how many processes they have cost it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")
_OCTAL = re.compile(r"\\([0-7]{3})")


def memory_limit(proc: Path = _PROC) -> int | None:
    """Bytes that the tightest group around this process allows; None where none limits it. `memory.high` slows down and is no limit.

    Args:
        proc: Folder of the process in /proc.
    """
    limits = [_number(level / name) for level in _levels("memory", proc) for name in ("memory.max", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None), default=None)


def processor_quota(proc: Path = _PROC) -> float | None:
    """Processors' worth of time that the tightest group allows; None where none limits it. Argument as of `memory_limit`."""
    quotas = []
    for level in _levels("cpu", proc):
        quota, period = (_numbers(level / "cpu.max") or [None, None])[:2]
        if quota is None:
            quota, period = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def oom_kills(proc: Path = _PROC) -> int | None:
    """How many processes the kernel has killed for memory in this process's own group; None where it does not tell. Argument as above."""
    for level in _levels("memory", proc):
        for name in ("memory.events", "memory.oom_control"):
            if match := re.search(r"^oom_kill (\d+)$", _text(level / name), re.MULTILINE):
                return int(match[1])
    return None


def _levels(controller: str, proc: Path) -> Iterator[Path]:
    """The folders of the groups of this process, from its own to the outermost that can be seen, of both versions of control groups."""
    own = {}
    for line in _text(proc / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    for line in _text(proc / "mountinfo").splitlines():
        fields, (kind, _, options) = (part.split() for part in line.split(" - ", 1))
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name is None or name not in own or (name and name not in options.split(",")):
            continue
        path = own[name]
        root, top = (_OCTAL.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
        inside = path[len(root) :] if path == root or path.startswith(root.rstrip("/") + "/") else ""
        folder, mount = Path(top, inside.strip("/")), Path(top)
        yield from [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    return (_numbers(path) or [None])[0]


def _numbers(path: Path) -> list[int | None]:
    """The numbers of a file, None in the place of each word that is none, such as `max`."""
    return [int(word) if word.lstrip("-").isdigit() else None for word in _text(path).split()]

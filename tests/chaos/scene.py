"""Where a case plays: a small sweep of the real command with folders of its own, which is launched, disturbed and launched again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.shim import Board, Rule
from tests.support.hub_server import HubServer
from tests.support.paths import ROOT, SLIMBENCH, SMALL_CACHES

MARK = "CHAOS_CASE"
LAUNCH_S = 600.0  # a launch that has not ended by then hangs
_POLL_S = 0.01


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: Its class, such as `signals`.
        what: What is thrown where, in a few words; a line of the table.
        rule: The call at which it is thrown; None where it is thrown before a launch.
        act: What is done while the rule holds a process, whose id is given; None where the rule itself is the fault. A `ProcessLookupError`
            says that there was nothing that it could be done to.
        before: What is done before each launch until it is thrown; tells whether that was the fault itself.
        beside: What is started beside the sweep.
        happened: Whether it was thrown, asked after the launch, where neither a rule nor `before` knows.
        undo: What is done after the launch in which it was thrown.
        environment: Variables of the launch in which it is thrown.
        codes: Exit codes that are true with it, beside those that the records give.
    """

    kind: str
    what: str
    rule: Rule | None = None
    act: Callable[[Scene, int], None] | None = None
    before: Callable[[Scene], bool] | None = None
    beside: Callable[[Scene], object] | None = None
    happened: Callable[[Scene], bool] = lambda scene: False
    undo: Callable[[Scene], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    codes: frozenset[int] = frozenset()


@dataclass
class Launch:
    """How one launch ended.

    Attributes:
        codes: Exit code of each sweep; None where it hung and was killed.
        said: By each sweep on standard error.
        others: Of other commands: what they are, exit code, what they said.
    """

    codes: list[int | None]
    said: list[str]
    thrown: list[Fault]
    seconds: float
    others: list[tuple[str, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Journal:
    """What one process told of its stages, and when the campaign saw that it was gone, in seconds since the epoch."""

    lines: list[str]
    ended: float


class Scene:
    """The folders and processes of one case.

    Args:
        root: Folder of the case; made anew.
        shim: The compiled shim; None leaves system calls alone.
        words: Overrides of the sweep.
        of: Folder of another scene from which results and cache are copied.
        hub: A hub on this machine; None where nothing may ask one.
    """

    def __init__(self, root: Path, shim: Path | None, words: list[str], of: Path | None = None, hub: HubServer | None = None) -> None:
        self.root, self.words, self._shim, self.hub = root, words, shim, hub
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.results, self.cache, self.tmp = (root / name for name in ("results", "cache", "tmp"))
        if of:
            shutil.copytree(of / "results", self.results)
            shutil.copytree(of / "cache", self.cache, symlinks=True)
        self.tmp.mkdir()
        (root / "turns").mkdir()
        self.board = Board(root / "board")
        self.main: list[subprocess.Popen[bytes]] = []
        self.places = [self.results]
        """Results folders that have to be whole in the end."""
        self.journals: list[list[Journal]] = []
        self.spoilt: set[str] = set()
        """Tasks, as `<stage>-<key>`, whose record a fault has damaged."""
        self.mounts: list[Path] = []
        self.wrong: list[str] = []
        """What commands beside the sweep did wrong, in words."""

    @property
    def environment(self) -> dict[str, str]:
        """The sweep's variables: own cache and temporary folder, no network, one thread, and the mark by which its processes are known."""
        path = os.pathsep.join(map(str, (SMALL_CACHES, ROOT / "src", ROOT)))
        own = {"SLIMBENCH_CACHE": str(self.cache), "TMPDIR": str(self.tmp), "COLUMNS": "200"}
        own |= {MARK: str(self.root), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(self.root / "hub")}
        own |= {"HF_ENDPOINT": self.hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "3"} if self.hub else {"HF_HUB_OFFLINE": "1"}
        own |= {"SLIMBENCH_CONF": str(Path(__file__).with_name("conf")), "CHAOS_TOLD": str(self.root / "told")}
        own |= {"TORCHINDUCTOR_CACHE_DIR": str(self.root / "inductor")}  # which torch makes as it is imported, and keeps
        own |= {"SLIMBENCH_TURNS": str(self.root / "turns")}  # other cases measure nothing that this one could disturb
        shim = {"LD_PRELOAD": str(self._shim), "CHAOS_BOARD": str(self.root / "board")} if self._shim else {}
        return {name: value for name, value in os.environ.items() if not name.startswith(("SLIMBENCH_", "HF_"))} | own | shim

    def start(self, *more: str, environment: dict[str, str] | None = None, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start the sweep in a session of its own; what it says goes into a file.

        Args:
            more: Overrides, after those of the scene. The last one of a key counts.
            environment: Variables beside those of the scene.
            wrapper: A command that starts it.
        """
        return self.command("sweep", *_last([*self.words, f"results={self.results}", *more]), environment=environment, wrapper=wrapper)

    def command(self, *words: str, environment: dict[str, str] | None = None, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a command of slimbench, as `start` does."""
        said = self.root / f"said-{len(self.main)}"
        own = {"SLIMBENCH_JOURNAL": str(self._journal(len(self.main)))}
        with said.open("wb") as stream:
            process = subprocess.Popen(
                [*wrapper, *SLIMBENCH, *words],
                env=self.environment | own | (environment or {}),
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
        self.main.append(process)
        return process

    def call(self, *words: str) -> tuple[int, str]:
        """Run a command of slimbench to its end; its exit code and what it said on standard error."""
        done = subprocess.run(
            [*SLIMBENCH, *words],
            env=self.environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LAUNCH_S,
        )
        return done.returncode, done.stderr

    def launch(self, faults: list[Fault]) -> Launch:
        """Launch the sweep with faults armed, throw them as their moments come, and wait until all that was started has ended."""
        began = time.monotonic()
        thrown = [fault for fault in faults if fault.before and fault.before(self)]
        armed = [fault for fault in faults if fault.rule]
        self.board.arm([fault.rule for fault in armed if fault.rule])
        environment = {name: value for fault in faults for name, value in fault.environment.items()}
        self.main = []
        for place in self.places:
            self.start(f"results={place}", environment=environment)
        for fault in faults:
            if fault.beside:
                fault.beside(self)
                thrown.append(fault)
        hung, ended, missed = False, {}, set()
        while any(process.poll() is None for process in self.main):
            ended |= {n: time.time() for n, process in enumerate(self.main) if process.returncode is not None and n not in ended}
            for number, pid in self.board.held().items():
                if act := armed[number].act:
                    try:
                        act(self, pid)
                    except (psutil.Error, ProcessLookupError):
                        missed.add(number)
                self.board.let_go(number)
            if time.monotonic() - began > LAUNCH_S:
                hung = True
                for process in self.processes():
                    process.kill()
            time.sleep(_POLL_S)
        thrown += [fault for number, fault in enumerate(armed) if self.board.fired(number) and number not in missed]
        thrown += [fault for fault in faults if fault not in thrown and fault.happened(self)]
        self.board.arm([])
        self.board.set_clock(0)
        self.board.set_flock(True)
        for fault in thrown:
            if fault.undo:
                fault.undo(self)
        self._collect(ended)
        said = [(self.root / f"said-{number}").read_text(errors="replace") for number in range(len(self.main))]
        sweeps = [number for number, process in enumerate(self.main) if "sweep" in _words(process)]
        codes = [None if hung else self.main[number].returncode for number in sweeps]
        others = [(_words(p), p.returncode, said[number]) for number, p in enumerate(self.main) if number not in sweeps]
        return Launch(codes, [said[number] for number in sweeps], thrown, time.monotonic() - began, others)

    def _journal(self, number: int) -> Path:
        return self.root / f"journal-{len(self.journals)}-{number}"

    def _collect(self, ended: dict[int, float]) -> None:
        """Keep what the processes of a launch told of their stages."""
        files = [self._journal(number) for number in range(len(self.main))]
        lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
        self.journals.append([Journal(told, ended.get(number, time.time())) for number, told in enumerate(lines)])

    def told(self, what: str) -> bool:
        """Whether a method of the tests has said that it did what its environment asked for."""
        file = self.root / "told"
        return file.exists() and what in file.read_text().splitlines()

    def processes(self) -> list[psutil.Process]:
        """Every living process that bears the mark of the case, whatever session or parent it has."""
        mark, alive = f"{MARK}={self.root}\0".encode(), []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError, psutil.Error):
                if mark in (folder / "environ").read_bytes() + b"\0":
                    process = psutil.Process(int(folder.name))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        alive.append(process)
        return alive

    def target(self, role: str) -> list[psutil.Process]:
        """The processes of a role: main, server, child (the stage), grandchild (whatever a stage started), everything."""
        alive = self.processes()
        if role == "everything":
            return alive
        mains = {process.pid for process in self.main}
        by_role: dict[str, list[psutil.Process]] = {"main": [], "server": [], "child": [], "grandchild": []}
        servers = {p.pid for p in alive if p.ppid() in mains and "run.server" in " ".join(p.cmdline())}
        for process in alive:
            if process.pid in mains:
                by_role["main"].append(process)
            elif process.pid in servers:
                by_role["server"].append(process)
            elif process.ppid() in servers and os.getpgid(process.pid) == process.pid and os.getsid(process.pid) in servers:
                by_role["child"].append(process)
            else:
                by_role["grandchild"].append(process)
        return by_role[role]

    def send(self, role: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a role, or to a process group: `stage group`, `main group`, `server session`.

        Raises:
            ProcessLookupError: There are none.
        """
        if role == "main group":
            os.killpg(self.main[0].pid, number)
            return
        group = role == "stage group"
        targets = self._session() if role == "server session" else self.target("child" if group else role)
        if not targets:
            raise ProcessLookupError(role)
        for process in targets:
            with suppress(ProcessLookupError, psutil.Error):
                os.killpg(process.pid, number) if group else process.send_signal(number)

    def _session(self) -> list[psutil.Process]:
        """The processes in the sessions of servers."""
        sessions, found = {process.pid for process in self.target("server")}, []
        for process in self.processes():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) in sessions:
                    found.append(process)
        return found

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Whatever the case has started is gone afterwards."""
        try:
            yield
        finally:
            for process in self.processes():
                with suppress(psutil.Error):
                    process.kill()
            for folder in self.mounts:
                subprocess.run(["umount", "--lazy", str(folder)], check=False)

    def mount(self, folder: Path, size: str) -> bool:
        """Lay a file system of that size over a folder that is empty; whether that could be done."""
        if os.geteuid() or folder in self.mounts or (folder.exists() and any(folder.iterdir())):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
            return False
        self.mounts.append(folder)
        return True

    def grow(self) -> None:
        """Give the mounted file systems room."""
        for folder in self.mounts:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def _words(process: subprocess.Popen[bytes]) -> str:
    """What slimbench was asked for by a process."""
    words = [str(word) for word in process.args]  # type: ignore[union-attr]
    return " ".join(words[words.index("slimbench") + 1 :][:3])


def _last(words: list[str]) -> list[str]:
    """Overrides of which the last of each key counts."""
    return list({word.partition("=")[0]: word for word in words}.values())

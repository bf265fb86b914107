"""What asks the hub, with the real clients, against a small hub on this machine: what is fetched, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import hub_data
from tests.support.hub_server import Fault, HubServer
from tests.support.paths import SLIMBENCH

SMALL = ["device=cpu", "device.compress=cpu", "device.threads=1", "suite.windows=2", "suite.limit=2"]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[hub_data.Content]:
    """The repositories, made once."""
    return hub_data.make(tmp_path_factory.mktemp("repositories"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def full_hub(hub: HubServer, contents: list[hub_data.Content]) -> HubServer:
    hub_data.serve(hub, contents)
    return hub


@dataclass
class Home:
    """A user's machine with caches of its own, whose hub is the local one."""

    folder: Path
    hub: HubServer

    @property
    def environment(self) -> dict[str, str]:
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "SLIMBENCH_CACHE": str(self.folder / "cache")}
        return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own

    def slimbench(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [*SLIMBENCH, *arguments]
        wanted = self.environment | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=wanted, cwd=self.folder, check=False)

    def python(self, code: str, **environment: str) -> str:
        """What a program prints."""
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment | environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def records(self, results: str = "runs") -> list[dict]:
        return [json.loads(file.read_text()) for file in sorted((self.folder / results).glob("*/*/*.json"))]


@pytest.fixture
def home(hub: HubServer, tmp_path: Path) -> Home:
    return Home(tmp_path, hub)


FETCH = """
from slimbench.tasks import assets
from slimbench.tasks.errors import DataError
try:
    print(assets.fetch_hub("org/model"))
except DataError as error:
    print(type(error).__name__, error)
"""
WEIGHTS = "*/model.safetensors"


def publish(hub: HubServer, folder: Path, size: int, name: str = "org/model") -> bytes:
    """Serve weights of so many bytes, a model by their name only; returns them."""
    folder.mkdir()
    content = b"".join(number.to_bytes(4, "little") for number in range(size // 4))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    hub.add("models", name, folder)
    return content


@pytest.mark.parametrize("kind", ["stall", "cut"])
def test_a_download_that_breaks_off_goes_on_where_it_was(home: Home, tmp_path: Path, kind: str) -> None:
    """By a range, after the client's own time-out. It writes in pieces of 10 MiB: what is in the file is not sent again."""
    content = publish(home.hub, tmp_path / "model", 32 << 20)
    home.hub.faults = [Fault("/large/*", kind, after=24 << 20, seconds=60)]
    folder = Path(home.python(FETCH, HF_HUB_DOWNLOAD_TIMEOUT="2"))
    assert (folder / "model.safetensors").read_bytes() == content
    first, second = home.hub.asked("/large/*")
    assert (first.begin, first.sent) == (0, 24 << 20) and (second.status, second.begin) == (206, 20 << 20)
    assert home.hub.sent("model.safetensors") == 36 << 20, "of 32 MiB"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(WEIGHTS, status=429, headers={"Retry-After": "1"}, times=2),
        Fault("/large/*", status=503, headers={"Retry-After": "1"}),
        Fault("/large/*", "reset", after=100_000),
        Fault("/api/models/*", status=503),
        Fault(WEIGHTS, status=503, method="HEAD"),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.kind} {fault.status}",
)
def test_a_hub_that_is_busy_for_a_while_is_waited_for(home: Home, tmp_path: Path, fault: Fault) -> None:
    content = publish(home.hub, tmp_path / "model", 400_000)
    home.hub.faults = [fault]
    folder = Path(home.python(FETCH))
    assert (folder / "model.safetensors").read_bytes() == content and fault.times == 0


def test_a_hub_that_stays_busy_is_an_error_of_the_hub(home: Home) -> None:
    home.hub.faults = [Fault("*", status=503, times=1000), Fault("*", status=503, times=1000, method="HEAD")]
    told = home.python(f"from slimbench.tasks import hub; hub._WAITS_S = (0.1, 0.1)\n{FETCH}")
    assert told.startswith("HubError cannot fetch org/model from the hub") and "tried 3 times" in told and "\n" not in told


@pytest.mark.parametrize("locked", [True, False], ids=["gated", "unknown"])
def test_what_the_hub_refuses_is_asked_for_once(home: Home, tmp_path: Path, locked: bool) -> None:
    if locked:
        publish(home.hub, tmp_path / "model", 1000)
        home.hub.gated.add("org/model")
    told = home.python(FETCH)
    assert told.startswith("AssetError cannot fetch org/model from the hub") and "HF_TOKEN" in told and "\n" not in told
    assert len(home.hub.asked("/api/models/org/model/*")) == 1

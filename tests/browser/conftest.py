"""A headless chromium, and a board in a folder. Tests are skipped where chromium, its driver or selenium is absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Unreadable
from slimbench.leaderboard.figures.plots import gallery
from slimbench.leaderboard.site.board import Board
from tests.support.board_records import Spec, records, site_files, specs

HOSTILE = "<img src=x onerror=\"document.title='run'\">');document.title='run';//"


def chromium(width: int = 1400, height: int = 1000, dark: bool = False) -> Any:
    """A driver of a headless chromium.

    Raises:
        FileNotFoundError, ImportError: Something is not installed.
    """
    from selenium import webdriver

    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        raise FileNotFoundError("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.set_script_timeout(60)
    screen(made, width, height)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    made.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return made


def screen(driver: Any, width: int, height: int) -> None:
    """Make the page so wide and high; below 500 as on a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture(scope="session")
def made() -> list[Record]:
    """Two models with every kind of end, and one cell whose every text is hostile."""
    found = [record for model in ("tiny-135m", "tiny-1b") for spec in specs() for record in records(replace(spec, model=model))]
    hostile = Spec(HOSTILE, "quantization", model="tiny-135m", loss=1.5, bits=3.0, size=0.3, flags=(HOSTILE,))
    return found + records(replace(hostile, source_precision=HOSTILE[:20]))


@pytest.fixture(scope="session")
def board(made: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a board; its figures are there as SVG, which is what pages show."""
    return written(tmp_path_factory.mktemp("board"), made, [Unreadable("a/b/quality-1.json", "not a record: broken")])


def written(folder: Path, made: list[Record], unreadable: Sequence[Unreadable] = ()) -> Path:
    """The folder, with the board of records in it."""
    whole = Board.of(made, unreadable)
    planned = gallery(whole, figures=True)
    beside = {f"{path}.svg": plot.draw("svg") for path, plot in planned.plots.items()}
    for name, content in (beside | site_files(whole, beside, planned)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    pytest.importorskip("selenium")
    try:
        driver = chromium()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield driver
    driver.quit()

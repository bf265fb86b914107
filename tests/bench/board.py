"""How long a board of many records takes, and how soon a browser shows it: `python -m tests.bench.board [RECORDS …]`.

Records are synthetic and valid. Each count is built in a process of its own, whose peak memory is printed. Where chromium and selenium
are there, also: time to the first paint with rows, and time of a filter and of a search, as the page itself measures them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import count, islice, product
from pathlib import Path

from slimbench.harness.store.store import Store
from tests.support.board_records import Spec, records, specs

DEFAULT = (1_000, 10_000)
GROUPS = (32, 64, 128, 256)


def synthetic(folder: Path, wanted: int) -> None:
    """Write so many records: models with some seventy pipelines each."""
    store = Store(folder)
    made = (record for number in count() for spec, group in product(specs(), GROUPS) for record in records(_spec(spec, number, group)))
    for record in islice(made, wanted):
        path = store.path(record.cell, record.stage, record.hardware)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json(indent=1, exclude_none=True))


def _spec(spec: Spec, number: int, group: int) -> Spec:
    if spec.family == "reference":
        return replace(spec, model=f"model-{number}", seed=GROUPS.index(group))
    return replace(spec, model=f"model-{number}", pipeline=f"{spec.pipeline}[{group}]", loss=spec.loss * (1 + group / 10_000))


def build(results: Path, out: Path) -> None:
    from slimbench.leaderboard.site.build import build

    began = time.perf_counter()
    written = build(results, out)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{seconds:.1f} s, peak memory {peaks[0]:.0f} MB (children {peaks[1]:.0f} MB), {len(written)} files")


def main_page_bytes(out: Path) -> int:
    """Bytes that a browser loads to show the ranking."""
    import re

    page = (out / "index.html").read_text()
    parts = re.findall(r'(?:src|rel="stylesheet" href)="([^"]+)"', page)
    return sum((out / part).stat().st_size for part in ["index.html", *parts])


def browse(out: Path) -> str:
    """Paint and filter times in a headless browser, or why there are none."""
    try:
        from tests.browser.conftest import chromium

        driver = chromium(1400, 1000)
    except Exception as error:  # whatever keeps a browser from starting
        return f"no browser: {str(error).splitlines()[0]}"
    try:
        began = time.perf_counter()
        driver.get((out / "index.html").as_uri())
        paint = driver.execute_script(PAINT)
        opened = time.perf_counter() - began
        times = [driver.execute_async_script(FILTER, word) for word in ("gptq", "awq packed", "model-7", "")]
        return f"first paint {paint['paint']:.0f} ms, rows after {paint['rows']:.0f} ms (opened in {opened:.1f} s); filters " + ", ".join(
            f"{t:.0f} ms" for t in times
        )
    finally:
        driver.quit()


PAINT = """
return {paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN,
        rows: performance.getEntriesByName('rows')[0]?.startTime ?? NaN};"""
FILTER = """
const done = arguments[arguments.length - 1], began = performance.now();
window.slim.state.q = arguments[0];
window.slim.changed('rows');
requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));"""


def main() -> None:
    if sys.argv[1:2] == ["build"]:
        return build(Path(sys.argv[2]), Path(sys.argv[3]))
    for wanted in map(int, sys.argv[1:] or DEFAULT):
        with tempfile.TemporaryDirectory(prefix="slimbench-board-") as folder:
            results, out = Path(folder) / "results", Path(folder) / "board"
            synthetic(results, wanted)
            command = [sys.executable, "-P", "-m", "tests.bench.board", "build", str(results), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{wanted} records: {done.stdout.strip()}, main page {main_page_bytes(out) / 1e6:.2f} MB; {browse(out)}", flush=True)


if __name__ == "__main__":
    main()

"""Odd but valid JSON: what would stop a board makes its record unreadable, with one line, and the others are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.store.decode import decode
from slimbench.harness.store.store import Store, parse
from slimbench.leaderboard.rows.reading import lean
from slimbench.leaderboard.site import build
from tests.support.board_records import Spec, records

GPTQ = Spec("gptq", "quantization", loss=1.3, bits=4.25)


@pytest.mark.parametrize("number", ["1e308", "-1.5E+200", "1e999", "1" + "0" * 400])
def test_a_number_that_no_measurement_gives_is_refused(number: str) -> None:
    for text in (f'{{"a": [1, {number}]}}', f'{{"a": {number}}}', f"[{number} ]"):
        with pytest.raises(ValueError, match=r"no measurement gives|endless number"):
            decode(text.encode())


@pytest.mark.parametrize("value", [1e149, -1e100, "overflow: 1e308, then 1e999]", "9" * 300, 3.4e38, {"1e308": 1}])
def test_large_numbers_and_texts_about_them_are_kept(value: Any) -> None:
    assert decode(json.dumps([value, 2]).encode()) == [value, 2]


ODD: dict[str, Any] = {
    "compress.claim.format": True,
    "compress.dense_bytes": 10**400,
    "quality.zeroshot.0.accuracy": 1e308,
    "quality.perplexity.0.window_nll": [1e308] * 48,
    "speed.points.0.candidate.decode_ms": [1e308] * 21,
    "cell.family": "\ud800",
}


@pytest.mark.parametrize("place", list(ODD))
def test_one_odd_record_does_not_stop_the_board(tmp_path: Path, place: str) -> None:
    store = Store(tmp_path / "runs")
    for record in records(Spec()) + records(GPTQ):
        store.put(record)
    stage, *path = place.split(".")
    (file,) = [path for path in store.files() if path.name.startswith(stage.replace("cell", "speed")) and path.parent.name == "gptq"]
    data = json.loads(file.read_text())
    where: Any = data[stage]
    for name in path[:-1]:
        where = where[int(name) if name.isdigit() else name]
    where[path[-1]] = ODD[place]
    file.write_text(json.dumps(data))
    assert isinstance(parse(file.read_bytes(), tmp_path / "runs" / "shared"), str)
    assert isinstance(reason := lean(file), str) and "\n" not in reason
    build.build(store.root, tmp_path / "board", figures=False)
    page = (tmp_path / "board" / "index.html").read_text()
    assert file.relative_to(store.root).as_posix() in page and "1 file could not be read" in page
    assert len(json.loads((tmp_path / "board" / "table.json").read_text())) == 2

"""What stands beside the main table: bytes of key-value caches, and how fast dense is on other engines."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from typing import Any

import pytest

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.facts import details
from slimbench.leaderboard.tables import beside
from slimbench.leaderboard.tables.beside import dense_by_engine
from slimbench.leaderboard.tables.writers import to_csv, to_markdown
from tests.support.board_records import Spec, records
from tests.unit.leaderboard.test_board import GPTQ, printed

CACHES = {str(1024 * 2**power): 7_000_000 * 2**power for power in range(6)}
DENSE_CACHES = {length: 3 * size for length, size in CACHES.items()}


def with_caches(sizes: Any = CACHES) -> list[Record]:
    made = records(Spec()) + records(GPTQ) + records(Spec("awq", "quantization"))
    details = {"cache_bytes": sizes, "dense_cache_bytes": DENSE_CACHES}
    made[3].compress.claim = replace(made[3].compress.claim, details=details)  # type: ignore[union-attr]
    made[4].quality.perplexity[0].exact_keys = 0.0625  # type: ignore[union-attr]
    return made


def test_caches_stand_in_a_table_of_their_own_beside_that_of_dense() -> None:
    board = rows(with_caches())
    row, dense, other = (next(row for row in board if row.pipeline == name) for name in ("gptq", "dense", "awq"))
    lengths = [f"cache_bytes_{kilo}k" for kilo in (1, 2, 4, 8, 16, 32)]
    assert [getattr(row, name) for name in lengths] == list(CACHES.values())
    assert [getattr(dense, name) for name in lengths] == list(DENSE_CACHES.values()) and other.cache_bytes_1k is None
    assert (row.exact_keys, dense.exact_keys) == (0.0625, None)
    for text in (to_markdown(board), printed(with_caches(), 200)):
        cache = text[text.index("Key-value cache") :]
        assert all(f"{size / 1e6:.1f}" in cache for size in [*CACHES.values(), *DENSE_CACHES.values()] if size < 99e6)
        assert "6.2" in cache and "Exact keys" in cache
        lines = [line for line in cache.splitlines() if "7.0" in line or "21.0" in line]
        assert len(lines) == 2 and "awq" not in "".join(lines), "rows without a cache of their own are left out"
    assert "Key-value cache" not in to_markdown(rows(records(Spec()) + records(GPTQ)))
    told = dict(details(row))
    assert told["Cache of one sequence"].startswith("1k tokens 7.0 MB, 2k tokens 14.0 MB")
    assert told["Exact keys"].startswith("6.2 % of the keys")
    header, *lines = csv.reader(to_csv(board).splitlines())
    assert [line[header.index("cache_bytes_32k")] for line in lines].count(str(CACHES["32768"])) == 1


@pytest.mark.parametrize(
    ("format_", "told"),
    [
        ("edited", "format edited, which transformers, offload load"),
        ("gguf", "format gguf, which llamacpp loads"),
        ("<b>", "format <b>, which no engine loads"),
        (None, None),
    ],
)
def test_a_row_says_which_engines_load_its_artefact(format_: str | None, told: str | None) -> None:
    row = rows(records(Spec()))[0].model_copy(update={"format": format_})
    assert dict(details(row)).get("Artefact") == told


@pytest.mark.parametrize("sizes", [None, 7, "many", {"1024": "<b>"}, {"1024": None, "7": 1}])
def test_what_a_record_says_of_its_cache_is_taken_for_numbers_only(sizes: Any) -> None:
    (row,) = (row for row in rows(with_caches(sizes)) if row.pipeline == "gptq")
    assert row.cache_bytes_1k is None


def test_dense_on_the_other_engines_stands_beside_a_speed_up() -> None:
    fast = Spec(engine="llamacpp", suite="engines", decode_ms=11.5)
    board = rows(records(Spec()) + records(GPTQ) + records(fast) + records(Spec(engine="other", cpu="Another CPU")))
    (row,) = (row for row in board if row.pipeline == "gptq")
    rates = dense_by_engine(board, row)
    assert list(rates) == ["llamacpp", "transformers"], "fastest first, on its hardware alone"
    assert rates["llamacpp"] == pytest.approx(87, rel=0.05)
    told = beside.told(rates, row.engine)
    assert re.fullmatch(r"Dense decodes 8\d\.\d tokens/s on llamacpp, 2\d\.\d on transformers here: a speed-up is against dense .+", told)
    assert beside.told({"transformers": 22.0}, "transformers") == "" and beside.told({}, "transformers") == ""
    many = beside.told({f"engine-{number}" + "x" * 99: 1e9 - number for number in range(99)}, "transformers")
    assert many.endswith("on the same engine.") and len(many) < 600
    settings = Board.of(records(Spec()) + records(GPTQ) + records(fast)).settings
    assert sum(any("Dense decodes" in line for line in setting["resolution"]) for setting in settings) == 2

"""What a ledger says: parts beside those of the reference, what made a step longer, and what other settings would give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.ledger import Alternative, Ledger, LedgerPart, PartKind
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.explain.account import REST, explain, told
from slimbench.leaderboard.explain.advice import advice, forecasts
from slimbench.leaderboard.explain.aligned import aligned
from slimbench.leaderboard.explain.causes import causes
from slimbench.leaderboard.explain.measured import gains
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.site.board import Board
from tests.support.board_records import Spec, records, site_files
from tests.unit.cli.test_cli import slimbench


def part(kind: PartKind, ms: float, *layers: str, spread: float = 0.05, **more: Any) -> LedgerPart:
    turns = [ms + spread * way for way in (-1, 1, -1, 1, -1, 1)]
    return LedgerPart(kind=kind, layers=list(layers), calls=1, ms=ms, low=ms - spread, high=ms + spread, turns=turns, **more)


def ledger(*parts: LedgerPart, rest: float = 0.1, **more: Any) -> Ledger:
    step = sum(each.ms for each in parts) + rest
    known = {"phase": "decode", "step_ms": step, "low": step - 0.1, "high": step + 0.1, "turns": [step] * 6, "threads": 2, "parts": parts}
    return Ledger(**known | more)


DENSE = ledger(
    part("product", 4.0, "gate_proj", "up_proj", kernels=["bfloat16"], bytes=40_000_000, alone_ms=3.9),
    part("product", 2.0, "q_proj", "o_proj", kernels=["bfloat16"], bytes=20_000_000, alone_ms=2.0),
    part("product", 1.0, "k_proj", "v_proj", kernels=["bfloat16"], bytes=10_000_000, alone_ms=1.0),
    part("head", 3.0, "lm_head", kernels=["bfloat16"], bytes=30_000_000, alone_ms=3.0),
    part("attention", 0.5),
    part("python", 0.2),
)
PACKED = ledger(
    part("product", 1.2, "gate_proj", "up_proj", kernels=["packed"], bytes=10_000_000, alone_ms=1.1),
    part("product", 0.9, "q_proj", "k_proj", "v_proj", "o_proj", kernels=["packed"], bytes=8_000_000, alone_ms=0.8),
    part("head", 3.0, "lm_head", kernels=["bfloat16"], bytes=30_000_000, alone_ms=3.0),
    part("attention", 0.5),
    part("expansion", 1.5),
    alternatives=[
        Alternative(setting="head_bits", value=8, change_ms=-1.5, low=-1.6, high=-1.4),
        Alternative(setting="bits", value=8, change_ms=1.9, low=1.8, high=2.0),
    ],
)


def with_ledgers() -> list[Record]:
    """A packed row and its reference."""
    dense, packed = records(Spec()), records(Spec("rtn-4bit", "quantization", bits=4.25, size=0.4))
    for record in packed:
        if record.speed:
            record.speed.ledgers, record.speed.reference_ledgers, record.speed.read_bandwidth_gbs = [PACKED], [DENSE], 20.0
    return [*dense, *packed]


def pages_with_a_ledger(made: list[Record]) -> list[str]:
    files = site_files(Board.of(made), {}, Gallery()).items()
    return [text for name, content in files if name.endswith(".html") and "Where the time goes" in (text := content.decode())]


def test_classes_that_one_step_joins_are_one_in_both() -> None:
    here, there = aligned(PACKED, DENSE)
    joined = "products of q_proj, k_proj, v_proj and o_proj"
    assert there.keys() - here.keys() == {"Python and launch"} and here.keys() - there.keys() == {"expansion of weights"}
    assert (here[joined].ms, there[joined].ms, there[joined].bytes) == (0.9, 3.0, 30_000_000)
    assert there[joined].low == pytest.approx(2.9) and there[joined].high == pytest.approx(3.1)


def test_parts_and_the_rest_make_the_step() -> None:
    (account,) = explain(with_ledgers(), "rtn-4bit")
    assert sum(line.ms for line in account.lines) == pytest.approx(account.step_ms) == pytest.approx(7.2)
    assert sum(line.reference_ms or 0.0 for line in account.lines) == pytest.approx(account.reference_ms)
    assert account.lines[-1].part == REST and account.lines[-1].ms == pytest.approx(0.1)
    head = next(line for line in account.lines if line.part == "head")
    assert head.bound_ms == pytest.approx(1.5) and head.share == pytest.approx(3.0 / 7.2)
    assert account.bound_ms == pytest.approx(48 / 20)


def test_what_makes_a_step_longer_is_named_with_its_facts() -> None:
    (expansion,) = causes(PACKED, DENSE)
    assert (expansion.part, expansion.ms) == ("expansion of weights", pytest.approx(1.5)) and expansion.low == pytest.approx(1.45)
    back = causes(DENSE, PACKED)
    assert [cause.part for cause in back][:2] == ["products of gate_proj and up_proj", "products of q_proj, k_proj, v_proj and o_proj"]
    assert back[0].facts == ["bfloat16 instead of packed"] and back[0].ms == pytest.approx(2.8)
    assert causes(DENSE, DENSE) == []


def test_chance_names_no_part() -> None:
    unsure = ledger(part("attention", 0.9, spread=0.5), part("head", 3.0))
    assert causes(unsure, ledger(part("attention", 0.5), part("head", 3.0))) == []
    once = ledger(part("attention", 0.9).model_copy(update={"turns": [0.9] * 5}))
    assert causes(once, ledger(part("attention", 0.5).model_copy(update={"turns": [0.5] * 5}))) == []


def test_among_many_parts_one_that_is_longer_in_most_turns_is_chance() -> None:
    """Three of 16 turns say otherwise: of one part that is chance once in 94, of ten it is not rare."""
    longer = [*[0.7] * 13, *[0.4] * 3]
    slow, quick = (
        part("attention", 0.7).model_copy(update={"turns": longer}),
        part("attention", 0.5).model_copy(update={"turns": [0.5] * 16}),
    )
    others = [part("product", 1.0, f"layer{at}") for at in range(9)]
    assert [cause.part for cause in causes(ledger(slow), ledger(quick))] == ["attention and cache"]
    assert causes(ledger(slow, *others), ledger(quick, *others)) == []


@pytest.mark.parametrize(("longer", "named"), [(0.16, []), (0.26, ["attention and cache"])])
def test_copies_of_one_model_differ_by_less_than_a_part_that_is_named(longer: float, named: list[str]) -> None:
    """Of a step of 4 ms, in each turn."""
    slow, quick = (ledger(part("attention", ms), part("head", 3.0)) for ms in (0.9 + longer, 0.9))
    assert [cause.part for cause in causes(slow, quick)] == named


def test_what_the_machine_does_to_a_turn_of_both_is_no_cause_and_hides_none() -> None:
    drift = [0.0, 3.0, 1.0, 2.0, 9.0, 1.0]
    slow, quick = (
        ledger(part("attention", ms).model_copy(update={"turns": [ms + more for more in drift]}), part("head", 3.0)) for ms in (1.5, 1.0)
    )
    (cause,) = causes(slow, quick)
    assert (cause.part, cause.ms, cause.low) == ("attention and cache", pytest.approx(0.5), pytest.approx(0.5))


def test_other_threads_are_the_one_cause() -> None:
    one = DENSE.model_copy(update={"threads": 1, "step_ms": 20.0, "turns": [19.9, 20.1, 20.0, 20.0, 20.0, 20.0]})
    (cause,) = causes(one, DENSE)
    assert cause.part == "1 thread, not 2 threads" and cause.ms == pytest.approx(20.0 - DENSE.step_ms)


def test_threads_that_sleep_are_the_one_cause_and_are_told() -> None:
    """They slow what has no region of its own in the ledger, too."""
    awake = ledger(part("product", 2.0, "up_proj"), part("attention", 0.5), part("waiting", 0.004, spread=0.001))
    asleep = ledger(part("product", 2.0, "up_proj"), part("attention", 1.5), part("waiting", 0.08, spread=0.001))
    (cause,) = causes(asleep, awake)
    assert cause.part == "waiting of threads" and cause.ms == pytest.approx(asleep.step_ms - awake.step_ms)
    assert cause.facts == ["80 µs until all are awake instead of 4 µs"] and causes(awake, asleep) == []
    made = with_ledgers()
    for record in made:
        if record.speed and record.speed.ledgers:
            record.speed.ledgers = [asleep]
    (account,) = explain(made, "rtn-4bit")
    assert any("need 80 µs until all are awake: OMP_WAIT_POLICY=ACTIVE" in text for text in told(account))


def test_advice_is_the_best_that_is_sure_and_worse_settings_are_foretold_too() -> None:
    known = forecasts(PACKED)
    assert [(each.setting, round(each.gain, 2)) for each in known] == [("head_bits=8", 1.26), ("bits=8", 0.79)]
    assert known[0].low < known[0].gain < known[0].high and known[0].step_ms == pytest.approx(5.7)
    assert advice(known) == "The head takes 42 % of the step: head_bits=8 would give 1.26 × (1.24 to 1.29)"
    assert advice(known[1:]) is None and forecasts(DENSE) == []


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [(-9, -9, -9), (-PACKED.step_ms, -1, 0), (0, -1, -PACKED.step_ms), (math.nan, -1, 0), (-1, math.nan, 0), (0, -1, math.inf), (1, 2, 0)],
)
def test_what_no_step_can_be_is_not_foretold(change: float, low: float, high: float) -> None:
    """Of records that others made."""
    hostile = Alternative(setting="bits", value=2, change_ms=change, low=low, high=high)
    assert forecasts(PACKED.model_copy(update={"alternatives": [hostile]})) == []


def test_turns_that_are_no_numbers_name_nothing() -> None:
    strange = [part.model_copy(update={"turns": [math.nan] * len(part.turns)}) for part in PACKED.parts]
    assert causes(PACKED.model_copy(update={"parts": strange}), DENSE) == []
    found = causes(PACKED, DENSE.model_copy(update={"turns": [math.inf] * len(DENSE.turns)}))
    assert all(math.isfinite(cause.ms) for cause in found)


def test_the_page_of_a_cell_shows_both_kinds_of_table() -> None:
    (page,) = pages_with_a_ledger(with_ledgers())
    for text in ("expansion of weights", "head_bits=8", "Longer than in the reference: expansion of weights by 1.5 ms", "the rest"):
        assert text in page


def test_an_engine_that_shows_nothing_says_so() -> None:
    made = with_ledgers()
    for record in made:
        if record.speed and record.speed.ledgers:
            record.speed.ledgers = [Ledger(phase="decode", step_ms=3.0, low=2.9, high=3.1, unseen="the engine does not show <b>it</b>")]
    (account,) = explain(made, "rtn-4bit")
    assert account.lines == [] and told(account) == ["One decode step takes 3 ms; the engine does not show <b>it</b>."]
    (page,) = pages_with_a_ledger(made)
    assert "<b>it" not in page and "&lt;b&gt;it&lt;/b&gt;" in page


def test_a_row_without_a_ledger_says_what_to_run() -> None:
    with pytest.raises(ConfigError, match=r"'dense' has no ledger: .*\+speed\.ledger=64 stages=\[speed\] on_existing=all"):
        explain(with_ledgers(), "dense")


def test_the_command_prints_tables_or_json(tmp_path: Path) -> None:
    for record in with_ledgers():
        Store(tmp_path).put(record)
    shown = slimbench("explain", "rtn-4bit", "--results", str(tmp_path))
    assert shown.returncode == 0 and "head_bits=8 would give 1.26 ×" in shown.stdout and "expansion of weights" in shown.stdout
    (account,) = json.loads(slimbench("explain", "rtn-4bit", "--results", str(tmp_path), "--format", "json").stdout)
    assert account["step"] == "decode step" and account["causes"][0]["part"] == "expansion of weights"
    with pytest.raises(ConfigError, match=r"no cell with model 'tiny-135'.*tiny-135m"):
        explain(with_ledgers(), "rtn-4bit", {"model": "tiny-135"})
    wrong = slimbench("explain", "rtn-4bits", "--results", str(tmp_path))
    assert wrong.returncode == 2 and "rtn-4bit" in wrong.stderr


def _bits(value: int, group_size: int | None) -> Alternative:
    return Alternative(setting="bits", value=value, group_size=group_size, change_ms=-1.0, low=-1.1, high=-0.9)


def with_settings(record: Record, step_ms: float, dense_ms: float, **settings: Any) -> Record:
    """A cell of the method `rtn` with these settings, whose step takes so long beside a dense one."""
    steps = [{"name": "x", "method": "rtn", "settings": {"bits": 4, "group_size": 64, "symmetric": True, "head_bits": None} | settings}]
    assert record.speed
    speed = record.speed.model_copy(
        update={
            "ledgers": [PACKED.model_copy(update={"step_ms": step_ms})],
            "reference_ledgers": [DENSE.model_copy(update={"step_ms": dense_ms})],
        }
    )
    return record.model_copy(update={"cell": record.cell.model_copy(update={"steps": steps}), "speed": speed})


def test_a_forecast_stands_beside_the_cell_that_has_the_setting() -> None:
    """Its own reference was twice as slow, as all was then: the gain is that of both to their references."""
    packed = next(record for record in with_ledgers() if record.speed and record.speed.ledgers)
    dense = next(record for record in records(Spec()) if record.speed)
    assert dense.speed
    dense.speed.ledgers = [DENSE]
    mine = with_settings(packed, 5.0, 10.0)
    others = [
        with_settings(packed, 6.0, 20.0, head_bits=8),
        with_settings(packed, 5.0, 8.0, bits=8),
        with_settings(packed, 5.0, 8.0, bits=8, group_size=128),
        dense,
    ]
    assert gains(mine, PACKED, others) == pytest.approx({"head_bits=8": 0.5 / 0.3, "bits=8": 0.8, "bits=null": 0.5})
    foretold = DENSE.model_copy(update={"alternatives": [_bits(4, 64), _bits(8, 128)]})
    assert gains(dense, foretold, [mine, *others]) == pytest.approx({"bits=4": 2.0, "bits=8": 1.6}, rel=1e-9)
    assert gains(dense, DENSE.model_copy(update={"alternatives": [_bits(4, None)]}), [mine]) == {}, "of other groups"
    prompt = PACKED.model_copy(update={"phase": "prefill"})
    assert gains(mine, prompt, others) == {} and gains(packed, PACKED, others) == {}
    elsewhere = others[0].model_copy(update={"config": others[0].config | {"engine": {"name": "another"}}})
    assert gains(mine, PACKED, [elsewhere]) == {}
    known = forecasts(PACKED, {"head_bits=8": 1.3})
    assert known[0].measured == 1.3 and known[1].measured is None
    assert str(advice(known)).endswith("; a cell that has it gives 1.30 ×")

"""What the board says of the work of a token: rows, tables, pages, and the speed-up that it should give."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.schema.work import ScoredWork, Spread, WorkResult
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.catalogue import Absent, figures
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.flags.kinds import Kind, kind
from slimbench.leaderboard.rows.results.work import by_number, predicted_ms
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.facts import details
from slimbench.leaderboard.tables.writers import to_markdown
from slimbench.methods.base import Claim
from tests.support.board_records import Spec, records, site_files
from tests.unit.leaderboard.test_board import printed

ROWS_MS = {"1": 40.0, "2": 44.0, "4": 52.0, "8": 80.0}


def even(value: float) -> Spread:
    return Spread(mean=value, p5=value, p50=value, p95=value)


def drafted(shares: dict[str, int], **more: Any) -> WorkResult:
    """Passes of four tokens, of which so many gave so many."""
    passes, tokens = sum(shares.values()), sum(int(given) * count for given, count in shares.items())
    return WorkResult(
        slots=["draft"],
        tokens=tokens,
        prompts=8,
        prompt_tokens=128,
        passes=passes,
        pass_rows={"4": passes},
        pass_tokens=shares,
        calls={"4": float(passes)},
        total_parameters=1000,
        blocks=even(30.0 * 4 * passes / tokens),
        active_parameters=even(4000.0 * passes / tokens),
        **more,
    )


def with_drafts() -> list[Record]:
    made = records(Spec())
    for name, shares, ms in (("lookup", {"1": 30, "2": 20, "4": 10}, 31.0), ("exit", {"1": 60, "2": 2}, 52.0)):
        own = records(Spec(name, "dynamic", decode_ms=ms))
        for record in own:
            if record.speed:
                record.speed.work, record.speed.rows_ms, record.speed.reference_row_ms = drafted(shares), ROWS_MS, 41.0
        made += own
    return made


def with_exits() -> list[Record]:
    made = records(Spec())
    for blocks, loss in ((24.0, 1.1), (12.0, 1.9)):
        own = records(Spec(f"calm(threshold={blocks / 30})", "dynamic", loss=loss))
        for record in own:
            record.cell.steps = [{"name": "calm", "method": "CALM"}]
            if record.quality:
                record.quality.work = WorkResult(
                    slots=["depth"],
                    tokens=248,
                    prompts=8,
                    passes=248,
                    pass_tokens={"1": 248},
                    calls={"1": 248 * blocks / 30},
                    total_parameters=1000,
                    blocks=Spread(mean=blocks, p5=2, p50=blocks, p95=30),
                    active_parameters=even(1000 * blocks / 30),
                    cache_bytes=int(blocks * 1e6),
                    scored=ScoredWork(
                        tokens=3072, blocks=blocks + 3, blocks_p5=5, blocks_p95=29, active_parameters=1000 * (blocks + 3) / 30
                    ),
                    stepwise_gap=0.002,
                )
        made += own
    return made


def with_caches() -> list[Record]:
    made = with_exits()
    for record in made:
        if record.quality and record.quality.work:
            record.quality.work.slots = ["cache"]
    return made


def streamed(*others: Spec) -> list[Record]:
    made = [record for spec in (Spec(), Spec("window", "compact", loss=2.0), *others) for record in records(spec)]
    for record in made:
        if record.quality:
            head = record.quality.perplexity[0]
            head.protocol = "stream-2"
            head.held_bytes = [5_000_000] * len(head.window_nll)
            if record.cell.pipeline == "dense":
                anew = [nll + 0.1 for nll in head.window_nll]
                record.quality.perplexity.append(head.model_copy(update={"protocol": "recomputed-1", "window_nll": anew}))
    return made


def test_of_a_stream_only_the_stretches_that_count_are_compared_and_all_are_shown() -> None:
    made = streamed()
    for record in made:
        if record.quality:
            head = record.quality.perplexity[0]
            lost = 0.2 if record.cell.pipeline == "window" else 0.0
            head.window_nll = [3.0 + 0.1 * place + lost for place in range(4)] + [9.0] * 4
            head.within, head.perplexity, head.divergence = 4, math.exp(3.15 + lost), None
    row = next(row for row in rows(made) if row.pipeline == "window")
    assert row.perplexity == pytest.approx(math.exp(3.35)) and len(row.stretches) == 8
    assert row.perplexity_delta_percent == pytest.approx(100 * (math.exp(0.2) - 1))
    assert row.perplexity_high and row.perplexity_high < math.exp(4)
    other = [record for record in made if record.quality and record.cell.pipeline == "window"]
    other[0].quality.perplexity[0].within = 3  # type: ignore[union-attr]
    assert next(row for row in rows(made) if row.pipeline == "window").perplexity_delta_percent is None, "of other stretches"


@cache
def board_of(make: Any) -> Any:
    return rows(make())


def test_behind_prompts_a_row_has_the_bytes_that_are_held_while_it_is_scored() -> None:
    made = with_caches()
    for record in made:
        if record.quality and record.quality.work:
            head = record.quality.perplexity[0]
            head.protocol, head.held_bytes = "suffix-1", [3_000_000, 5_000_000]
            record.quality.work.cache_bytes = 1_000_000
    found = [row for row in rows(made) if not row.is_reference]
    assert {row.held_cache_bytes for row in found} == {4_000_000}, "not those after the last pass"
    assert {dict(details(row))["Cache of a text"] for row in found} == {"4.00 MB, mean over the tokens that were scored"}
    for record in made:
        if record.quality:
            record.quality.perplexity[0].held_bytes = []
    assert {row.held_cache_bytes for row in rows(made)} == {None}, "of older records it is not known"


@pytest.mark.parametrize("acceptance", [0.3, 0.8])
def test_the_predicted_time_is_the_model_of_speculative_decoding(acceptance: float) -> None:
    """Drafts that cost nothing, each guess right with one probability: (1 − α^(γ+1)) / (1 − α) tokens for a pass of t(γ + 1)."""
    guesses, passes, draw = 3, 40_000, random.Random(0)
    given = [1 + next((k for k in range(guesses) if draw.random() > acceptance), guesses) for _ in range(passes)]
    wanted = ROWS_MS["4"] * (1 - acceptance) / (1 - acceptance ** (guesses + 1))
    assert predicted_ms({"4": float(passes)}, ROWS_MS, sum(given)) == pytest.approx(wanted, rel=0.01)


def test_times_between_those_that_were_measured_lie_on_a_line_and_beyond_them_nothing_is_said() -> None:
    assert predicted_ms({"3": 1.0, "6": 1.0}, ROWS_MS, 2) == pytest.approx((48 + 66) / 2)
    assert predicted_ms({"1": 0.5}, ROWS_MS, 1) == 20, "half of the matrices"
    assert predicted_ms({"9": 1.0}, ROWS_MS, 1) is predicted_ms({}, ROWS_MS, 1) is predicted_ms({"1": 1.0}, {}, 1) is None


def test_what_a_record_counts_is_taken_for_numbers_only() -> None:
    hostile = {"4": 10.0, "-1": 5.0, "<b>": 1.0, "1e3": 1.0, "²": 2.0, "7": -3.0, "8": float("inf"), "9" * 400: 1.0}
    assert by_number(hostile) == {4: 10.0} and len(by_number({str(number): 1.0 for number in range(1, 100_000)})) <= 100
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work:
            record.speed.work.pass_tokens = {"<script>": 3, "2": 4}
            record.speed.rows_ms = {"x": 1.0}
    row = next(row for row in rows(made) if row.pipeline == "lookup")
    assert row.pass_tokens == {"2": 4} and row.predicted_speedup is None


def test_a_row_tells_what_its_drafts_gave_and_should_give() -> None:
    row = next(row for row in board_of(with_drafts) if row.pipeline == "lookup")
    dense = next(row for row in board_of(with_drafts) if row.is_reference)
    assert row.tokens_per_pass == pytest.approx(110 / 60) and row.pass_tokens == {"1": 30, "2": 20, "4": 10}
    assert row.predicted_speedup == pytest.approx(41.0 / (60 * 52 / 110)), "by the reference's step in turns with the passes, not by decode"
    assert row.active_share == pytest.approx(4 * 60 / 110) and row.work_prompt == 128
    assert dense.tokens_per_pass is dense.predicted_speedup is dense.active_share is None


def test_a_row_tells_the_share_of_guesses_that_were_taken() -> None:
    def row_of(drafted: list[int], accepted: list[int]) -> Any:
        made = with_drafts()
        for record in made:
            if record.speed and record.speed.work and record.cell.pipeline == "lookup":
                record.speed.work.text_drafted, record.speed.work.text_accepted = drafted, accepted
        return next(row for row in rows(made) if row.pipeline == "lookup")

    alike, apart = row_of([40] * 12, [20] * 12), row_of([40] * 12, [40, 0] * 6)
    for row in (alike, apart):
        assert row.acceptance == 0.5 and row.acceptance_low < 0.5 < row.acceptance_high
    assert apart.acceptance_high - apart.acceptance_low > 2 * (alike.acceptance_high - alike.acceptance_low), "texts are clusters"
    assert row_of([90, 10], [0, 10]).acceptance == 0.1, "of all guesses, not a mean over texts"
    some = row_of([0, 40, 0], [0, 30, 0])
    assert some.acceptance == 0.75 and some.acceptance_low is None, "one text has no interval"
    assert row_of([0, 0], [0, 0]).acceptance is row_of([], []).acceptance is None
    assert dict(details(alike))["Guesses taken"].startswith("50.0 % (")


def test_a_row_tells_how_much_of_a_text_was_written_before() -> None:
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work and record.cell.pipeline == "lookup":
            record.speed.work.repeated_4grams = 0.625
    told = {row.pipeline: dict(details(row)).get("Repeated in what was written") for row in rows(made)}
    assert told == {"lookup": "62.5 % of the runs of four tokens", "exit": None, "dense": None}


def test_a_draft_is_charged_its_own_calls_by_its_own_times() -> None:
    """Sixty passes of the model and three calls of a draft before each; a step of the draft takes an eighth of one of the model."""
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work and record.cell.pipeline == "lookup":
            record.speed.work.part_calls = {"model": {"4": 60.0}, "draft": {"1": 180.0}}
            record.speed.parts_ms = {"draft": {"1": 5.0, "2": 6.0}}

    def predicted() -> float | None:
        return next(row for row in rows(made) if row.pipeline == "lookup").predicted_speedup

    free = next(row for row in board_of(with_drafts) if row.pipeline == "lookup").predicted_speedup
    assert free and predicted() == pytest.approx(free * (60 * 52) / (60 * 52 + 180 * 5))
    for record in made:
        if record.speed:
            record.speed.parts_ms = {"model": {"4": 1.0}}
    assert predicted() is None, "no time of the draft is known, and that of the model is of its rows"


def test_a_draft_that_is_always_wrong_is_predicted_to_be_slower() -> None:
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work and record.cell.pipeline == "lookup":
            record.speed.work = drafted({"1": 100})
            record.speed.reference_row_ms = ROWS_MS["1"]
    (row,) = (row for row in rows(made) if row.pipeline == "lookup")
    assert row.predicted_speedup == pytest.approx(ROWS_MS["1"] / ROWS_MS["4"]) and row.predicted_speedup < 1


def test_work_of_the_timed_texts_goes_before_that_of_quality() -> None:
    made = with_drafts()
    for record in made:
        if record.quality and record.cell.pipeline == "lookup":
            record.quality.work = drafted({"1": 100}, stepwise_gap=0.01)
    row = next(row for row in rows(made) if row.pipeline == "lookup")
    assert row.tokens_per_pass == pytest.approx(110 / 60) and row.stepwise_gap == 0.01
    for record in made:
        if record.speed:
            record.speed.work = None
    row = next(row for row in rows(made) if row.pipeline == "lookup")
    assert row.tokens_per_pass == 1 and row.predicted_speedup is None, "passes of other texts say nothing of the timed ones"


def test_of_other_policies_than_drafts_nothing_is_predicted() -> None:
    """Their passes are timed with the policy in force: what they leave out would count twice."""
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work:
            record.speed.work.slots = ["depth"]
    assert all(row.predicted_speedup is None for row in rows(made))
    (absent,) = figures(rows(made), ["drafts"])
    assert isinstance(absent, Absent) and "no row with drafts" in absent.reason


def test_flags_of_the_work_of_timed_texts_stand_at_the_row() -> None:
    made = with_drafts()
    for record in made:
        if record.speed and record.speed.work:
            record.speed.work.flags.append("claims 4 blocks a token, ran 30")
    row = next(row for row in rows(made) if row.pipeline == "lookup")
    assert "claims 4 blocks a token, ran 30" in row.flags


@pytest.mark.parametrize(
    ("slots", "sizes", "told"),
    [
        (["cache"], {"1024": 5_000_000}, "the others are rounded"),
        (["cache"], None, "the others have left the cache, or are not seen as they were"),
        (["attention", "draft"], None, "the others are not seen, or only summed up"),
    ],
)
def test_a_page_says_what_becomes_of_keys_that_are_not_exact(slots: list[str], sizes: dict[str, int] | None, told: str) -> None:
    made = with_caches()
    for record in made:
        if record.quality and record.quality.work:
            record.quality.work.slots, record.quality.perplexity[0].exact_keys = slots, 0.25
        if record.compress and sizes and record.cell.pipeline != "dense":
            record.compress.claim = Claim("policy", details={"cache_bytes": sizes})
    row = next(row for row in rows(made) if not row.is_reference)
    assert dict(details(row))["Exact keys"] == f"25.0 % of the keys before the tokens that are scored; {told}"


def test_work_stands_in_a_table_of_its_own() -> None:
    for text in (to_markdown(board_of(with_exits)), printed(with_exits(), 200)):
        table = text[text.index("Work of a token") :]
        assert "24.0 (2.0–30.0)" in table and "80.0" in table and "12.00" in table
        assert "dense" not in "".join(line for line in table.splitlines() if "2.0–30.0" in line)
    assert "Work of a token" not in to_markdown(rows(records(Spec())))


def test_pages_show_the_work() -> None:
    board = Board.of(with_exits())
    files = site_files(board, {}, Gallery())
    row = next(row for row in board.rows if row.pipeline == "calm(threshold=0.8)")
    cell, model = files[names.cell(row)].decode(), files[names.model(row.model)].decode()
    assert "Work of a token, as counted" in cell and "Decoder blocks that ran (quality)" in cell and "248 passes" in cell
    assert "Decoder blocks that ran (scored texts, 3,072 tokens)" in cell and "27.0" in cell
    assert "Work of a token" in model and "24.0 (2.0–30.0)" in model


def test_a_perplexity_stands_over_the_work_of_the_tokens_that_were_scored() -> None:
    row = next(row for row in board_of(with_exits) if row.pipeline == "calm(threshold=0.8)")
    assert (row.blocks_per_token, row.scored_blocks, row.scored_blocks_p5, row.scored_blocks_p95) == (24, 27, 5, 29)
    assert (row.active_share, row.scored_active_share) == (0.8, 0.9)
    assert "27.0 (5.0–29.0)" in to_markdown(board_of(with_exits))

    def drawn(change: Any) -> Any:
        made = with_exits()
        for record in made:
            if record.quality and record.quality.work:
                change(record.quality.work)
        (found,) = figures(rows(made), ["methods-active"])
        return found

    def scored_alike(work: WorkResult) -> None:
        work.scored = work.scored and work.scored.model_copy(update={"active_parameters": 500.0})

    def written_alike(work: WorkResult) -> None:
        work.active_parameters = even(500.0)

    def unseen(work: WorkResult) -> None:
        work.scored = None

    assert isinstance(drawn(written_alike), Plot)
    assert isinstance(drawn(scored_alike), Absent) and isinstance(drawn(unseen), Absent), "what was written is no stand-in"


def with_passes_alone() -> list[Record]:
    """Those of an engine that shows nothing of what runs in a pass."""
    made = records(Spec(engine="llamacpp"))
    own = records(Spec("prompt-lookup", "dynamic", engine="llamacpp", decode_ms=31.0))
    for record in own:
        if record.speed:
            hidden = {"blocks": None, "active_parameters": None, "total_parameters": None, "equal": 0.985}
            record.speed.work, record.speed.rows_ms = drafted({"1": 30, "2": 20, "4": 10}).model_copy(update=hidden), ROWS_MS
            record.speed.reference_row_ms = 41.0
        if record.compress:
            record.compress.claim = Claim("policy")
    return made + own


def test_passes_alone_are_shown_and_their_engine_named() -> None:
    board = Board.of(with_passes_alone())
    row = next(row for row in board.rows if row.pipeline == "prompt-lookup")
    assert row.tokens_per_pass == pytest.approx(110 / 60) and row.blocks_per_token is None is row.active_share
    table = to_markdown(board.rows)
    (line,) = (line for line in table[table.index("Work of a token") :].splitlines() if "prompt-lookup" in line)
    assert "1.83" in line and row.predicted_speedup is not None
    files = site_files(board, {}, Gallery())
    cell = files[names.cell(row)].decode()
    assert "60 passes, 1.83 tokens a pass, 98.5 % of the tokens as without guesses" in cell and "Decoder blocks that ran" not in cell
    assert dict(details(row))["Artefact"] == "format policy, which transformers, offload, llamacpp load"


def plot(make: Any, kind: str) -> Plot:
    (found,) = figures(board_of(make), [kind])
    assert isinstance(found, Plot), found
    return found


def test_figures_of_policies_read_what_rows_say() -> None:
    assert (
        plot(with_drafts, "drafts").reading.startswith("lookup is fastest") and "1.83 tokens a pass" in plot(with_drafts, "drafts").reading
    )
    assert "calm" in plot(with_exits, "methods-active").reading and "calm" in plot(with_caches, "methods-cache").reading
    first = plot(streamed, "stream").reading
    assert first.startswith("dense is lowest in the last stretch") and "window is nearest to dense that is computed anew" in first


def test_an_exit_that_no_token_took_and_a_draft_that_never_guessed_are_told() -> None:
    made = with_exits()
    assert not any("never" in flag for row in rows(made) for flag in row.flags)
    for record in made:
        if record.quality and record.quality.work and record.quality.work.scored and record.quality.evidence:
            record.quality.evidence.blocks = 15
    told = {row.pipeline: row.flags for row in rows(made) if not row.is_reference}
    assert [any("each token ran all 15 blocks" in flag for flag in flags) for flags in told.values()] == [True, True]
    assert kind("policy never exercised by wikipedia: each token ran all 30 blocks") is Kind.INVALID
    drafts = with_drafts()
    for guessed, taken, flag, severity in (
        ([0, 0], [0, 0], "policy never guessed: no token of 2 texts", Kind.INVALID),
        ([900, 600], [0, 0], "none of 1,500 guesses was taken", Kind.NOTE),
        ([], [0, 0], "no guess was taken; the engine does not show whether there were any", Kind.NOTE),
        ([900, 600], [1, 0], None, None),
        ([], [1, 0], None, None),
    ):
        for record in drafts:
            if record.speed and record.speed.work and record.cell.pipeline == "lookup":
                record.speed.work.text_drafted, record.speed.work.text_accepted = guessed, taken
        (row,) = (row for row in rows(drafts) if row.pipeline == "lookup")
        assert [text for text in row.flags if "guess" in text] == ([flag] if flag else [])
        assert flag is None or kind(flag) is severity


def test_a_model_of_fewer_keys_stands_among_the_caches_without_a_policy() -> None:
    made = board_of(with_caches)
    held = {"held_cache_bytes": 30_000_000, "held_cache_of": made[-1].held_cache_of}
    found = [row.model_copy(update=held) if row.is_reference else row for row in made]
    fewer = found[-1].model_copy(update={"slots": [], "held_cache_bytes": 10_000_000})
    (drawn,) = figures([*found[:-1], fewer], ["methods-cache"])
    assert isinstance(drawn, Plot) and "bytes of the cache" not in drawn.caption
    (drawn,) = figures([*found[:-1], fewer.model_copy(update={"held_cache_bytes": 30_000_000})], ["methods-cache"])
    assert isinstance(drawn, Absent) and "different bytes of the cache" in drawn.reason, "as much as dense: nothing of a cache to see"
    (drawn,) = figures([*found[:-1], fewer.model_copy(update={"held_cache_of": "7+3"})], ["methods-cache"])
    assert isinstance(drawn, Absent), "bytes of other texts are not compared"


def test_two_settings_of_a_method_are_told_apart_along_a_stream() -> None:
    made = rows(streamed(Spec("window(budget=512)", "compact", loss=3.0)))
    (drawn,) = figures([row.model_copy(update={"methods": ["Window"]}) for row in made], ["stream"])
    assert isinstance(drawn, Plot)
    marks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn.make().axes[0].lines[:3]]
    assert len({mark for _, mark, _ in marks}) == len({dashes for *_, dashes in marks[1:]}) + 1 == 3 and marks[1][0] == marks[2][0]


def test_a_stream_is_drawn_beside_dense_that_is_computed_anew_and_with_its_cache() -> None:
    drawn = plot(streamed, "stream")
    assert "Grey: the dense model" in drawn.caption and "bytes of the cache" in drawn.caption
    left, right = drawn.make().axes
    dense = next(row for row in board_of(streamed) if row.is_reference)
    assert len(left.lines) == 3 and list(left.lines[2].get_ydata()) == dense.recomputed != dense.stretches
    assert [set(line.get_ydata()) for line in right.lines[:2]] == [{5.0}, {5.0}]

    def older() -> list[Record]:
        made = records(Spec()) + records(Spec("window", "compact", loss=2.0))
        for record in made:
            if record.quality:
                record.quality.perplexity[0].protocol = "stream-1"
        return made

    (alone,) = plot(older, "stream").make().axes
    assert len(alone.lines) == 2 and "anew" not in plot(older, "stream").reading

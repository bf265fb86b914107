"""What a cell's page draws of a training."""

from __future__ import annotations

import re
from typing import Any

import pytest

from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.site import courses
from slimbench.methods.base import HUGGINGFACE, Claim

LOSS = [[1, 8.0], [2, 4.0], [5, 3.0]]


def record(**details: Any) -> Record:
    return Record.model_construct(compress=CompressResult.model_construct(claim=Claim(HUGGINGFACE, details=details)))


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def test_a_loss_goes_from_the_first_step_to_the_last_and_falls_downwards() -> None:
    (chart,) = courses.charts(record(training={"loss_curve": LOSS, "loss_after": 3.0}))
    (curve,) = chart.curves
    assert (chart.title, curve.name, curve.last) == ("Training", "loss", "3")
    assert places(curve.path) == [
        (courses.LEFT, courses.TOP),
        (courses.LEFT + (courses.RIGHT - courses.LEFT) / 4, 166.4),
        (courses.RIGHT, courses.BOTTOM),
    ]
    assert dict((text, place) for place, text in chart.up)["4"] == 166.4, "ticks lie where values do"


def test_parts_stand_beside_the_loss_where_there_are_several() -> None:
    terms = {"text": [[1, 6.0], [5, 2.0]], "teacher": [[1, 2.0], [2, 1.0], [5, 1.0]]}
    (chart,) = courses.charts(record(training={"loss_curve": LOSS, "loss_terms": terms}))
    assert [(curve.name, curve.last, len(places(curve.path))) for curve in chart.curves] == [
        ("loss", "3", 3),
        ("text", "2", 2),
        ("teacher", "1", 3),
    ]
    (alone,) = courses.charts(record(training={"loss_curve": LOSS, "loss_terms": {"text": LOSS}}))
    assert [curve.name for curve in alone.curves] == ["loss"]


def test_each_lesson_has_a_chart_and_wide_ranges_a_logarithmic_axis() -> None:
    wide = [[1, 1000.0], [2, 100.0], [3, 10.0]]
    first, second = courses.charts(record(training={"loss_curve": LOSS, "earlier_lessons": [{"loss_curve": wide}]}))
    assert (first.title, second.title) == ("Training, part 1 of 2", "Training, part 2 of 2")
    heights = [y for _, y in places(first.curves[0].path)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11) and [text for _, text in first.up] == [
        "10",
        "20",
        "50",
        "100",
        "200",
        "500",
        "1,000",
    ]


@pytest.mark.parametrize(
    "training",
    [
        None,
        "text",
        {},
        {"loss_curve": [[1, 2.0]]},
        {"loss_curve": [[1, float("nan")], [2, 1.0]]},
        {"loss_curve": [[1, "2"], [2, 1.0]]},
        {"loss_curve": [[1, True], [2, 1.0]]},
        {"loss_curve": [[1, 1e300], [2, 1.0]]},
        {"loss_curve": [[1, 10**400], [2, 1.0]]},
        {"loss_curve": [[step, 1.0] for step in range(201)]},
        {"loss_terms": {"a": LOSS, "b": LOSS}},
    ],
)
def test_what_is_no_course_is_not_drawn(training: Any) -> None:
    assert courses.charts(record(training=training)) == [] == courses.charts(None)


def test_names_are_text_and_short_and_few() -> None:
    terms = {f"{number} \x1b[31m<script>" + "x" * 100: LOSS for number in range(50)}
    (chart,) = courses.charts(record(training={"loss_curve": [[1, 2.0], [2, 2.0]], "loss_terms": terms}))
    assert len(chart.curves) == 7 and all("\x1b" not in curve.name and len(curve.name) <= 40 for curve in chart.curves)
    assert all(re.fullmatch(r"M[-\d. L]+", curve.path) for curve in chart.curves)

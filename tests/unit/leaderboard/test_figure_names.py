"""What labels of a figure call a row whose own label is too long for them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from slimbench.leaderboard.figures.groups import Group
from slimbench.leaderboard.rows.row import Row

LONG = "learning_rate=0.003,positions=64,exits=[6,10],length=512"


def named(*labels: str) -> list[str]:
    class Named:
        def __init__(self, label: str) -> None:
            self.label, self.engine_label, self.engine = label, "transformers", "transformers"
            self.perplexity, self.accuracy, self.decode_tokens_per_s, self.weight_bytes = 1.0, None, None, None

    rows: Any = [cast("Row", Named(label)) for label in labels]
    group = Group(rows, "title", "setting")
    return [group.name(row) for row in rows]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([f"calm(threshold=0.3,{LONG})", f"calm({LONG})", "gptq(bits=3)"], ["calm(threshold=0.3)", "calm", "gptq(bits=3)"]),
        ([f"calm(a=1,{LONG})+rtn(bits=4)", f"calm(a=2,{LONG})+rtn(bits=4)"], ["calm(a=1)+rtn", "calm(a=2)+rtn"]),
        ([f"calm(exits=[6,10],{LONG})", f"calm(exits=[6],{LONG})"], ["calm", "calm(exits=[6])"]),
        (["calm(threshold=0.3,steps=3)", "calm(threshold=0.5,steps=3)"], ["calm(threshold=0.3,steps=3)", "calm(threshold=0.5,steps=3)"]),
        (
            [f"calm(threshold=0.3,{LONG})", f"calm({LONG})", "calm"],
            [f"calm(threshold=0.3,{LONG})"[:39] + "…", f"calm({LONG})"[:39] + "…", "calm"],
        ),
        ([f"calm(threshold=0.3,{LONG})"], [f"calm(threshold=0.3,{LONG})"[:39] + "…"]),
        ([f"calm(threshold=0.3,{LONG})", f"h2o({LONG})"], [f"calm(threshold=0.3,{LONG})"[:39] + "…", f"h2o({LONG})"[:39] + "…"]),
        ([f"calm)(]threshold[,{LONG}", f"calm)(]threshold[,{LONG}x"], [f"calm)(]threshold[,{LONG}"[:39] + "…"] * 2),
    ],
)
def test_settings_that_all_rows_of_a_pipeline_have_are_left_out_of_long_names(labels: list[str], names: list[str]) -> None:
    assert named(*labels) == names

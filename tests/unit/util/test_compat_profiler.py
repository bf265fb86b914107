"""What is read of torch's profiler at once is what `events()` makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from slimbench.util.compat.profiler import calls


def tree(call: Any) -> tuple[Any, ...]:
    shapes = [list(shape) for shape in call.input_shapes or ()]
    inner = sorted(call.cpu_children, key=lambda each: each.time_range.start)
    return call.name, shapes, pytest.approx(call.time_range.elapsed_us(), abs=0.002), [tree(each) for each in inner]


@pytest.mark.parametrize("shapes", [True, False])
def test_calls_are_those_of_events_with_what_lies_within(shapes: bool) -> None:
    model, x = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)]), torch.randn(2, 8)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as recorded:
        for _ in range(3):
            with record_function("step"):
                torch.softmax(model(x), -1)
    found, theirs = ([tree(call) for call in made if call.name == "step"] for made in (calls(recorded), recorded.events() or ()))
    assert found == theirs
    assert len(found) == 3
    assert [name for name, *_ in found[0][3]] == [*["aten::linear"] * 4, "aten::softmax"]
    assert any(given for _, given, *_ in found[0][3]) is shapes

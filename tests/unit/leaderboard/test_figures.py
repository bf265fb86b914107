"""Figures: they say what the rows say, come out the same twice, keep labels apart, and give a reason where there is none."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.figures.canvas import Plot, log_axis
from slimbench.leaderboard.figures.catalogue import KINDS, Absent, figures, kind
from slimbench.leaderboard.figures.drawing import KINDS as FORMATS
from slimbench.leaderboard.figures.drawing import STYLE
from slimbench.leaderboard.figures.measures import BYTES, PERPLEXITY, SPEED, front, points
from slimbench.leaderboard.figures.palette import FAMILIES, Palette, method_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.format import decimal
from slimbench.leaderboard.tables.tables import pareto, tables
from tests.support.board_records import Spec, board, equal_grid, records
from tests.unit.leaderboard.test_retrieval import caches
from tests.unit.leaderboard.test_work import streamed, with_caches, with_drafts, with_exits

SCATTER = ("perplexity-bytes", "perplexity-bits", "perplexity-speed", "accuracy-bytes", "accuracy-bits", "accuracy-speed", "divergence")
HOSTILE = "$x_1$ <b>&\"' \\frac{"


def of(made: Sequence[Row], *only: str) -> list[Plot]:
    return [found for found in figures(made, only) if isinstance(found, Plot)]


def reasons(made: Sequence[Row], *only: str) -> list[str]:
    return [found.reason for found in figures(made, only) if isinstance(found, Absent)]


def words(plot: Plot) -> str:
    """All text of a figure's SVG."""
    root = ET.fromstring(plot.draw("svg"))
    return "\n".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))


def family(name: str, settings: Sequence[tuple[str, float, float]], branch: str = "quantization") -> Iterator[Record]:
    """Records of one method at several settings: name, bits or sparsity, loss."""
    for label, amount, loss in settings:
        pruned = branch == "pruning"
        spec = Spec(label, branch, loss=loss, bits=None if pruned else amount, sparsity=amount if pruned else 0.0, size=0.4)
        for record in records(spec):
            record.cell.steps = [{"name": label, "method": name}]
            yield record


def grid(made: list[Record], batches: Sequence[int], prompts: Sequence[int]) -> list[Record]:
    """The same records with the speed point at every batch and prompt."""
    for record in made:
        if record.speed:
            head = record.speed.points[0]
            record.speed.points = [head.model_copy(update={"batch": b, "prompt": p}) for b, p in itertools.product(batches, prompts)]
    return made


def seeded(seeds: Sequence[int]) -> list[Record]:
    return [r for seed in seeds for r in records(Spec("gptq", "quantization", loss=1.3, bits=4.25, seed=seed))]


def sized(sizes: Sequence[int]) -> list[Record]:
    """Two pipelines and their reference on models of so many parameters."""
    made = []
    for size, (pipeline, loss) in itertools.product(sizes, (("dense", 1.0), ("rtn", 1.4), ("gptq", 1.2))):
        branch = "reference" if pipeline == "dense" else "quantization"
        own = records(Spec(pipeline, branch, model=f"tiny-{size}", loss=loss))
        for record in own:
            record.cell.parameters = size
        made += own
    return made


def thinner(sizes: dict[str, tuple[float, float]]) -> list[Record]:
    """Rows of one pruning method: the share of the parameters that are left, and the loss."""
    made = []
    for label, (left, loss) in sizes.items():
        for record in records(Spec(label, "pruning", loss=loss, size=left)):
            record.cell.steps = [{"name": label, "method": "FLAP"}]
            record.cell.parameters = 1_000_000
            for evidence in (part.evidence for part in (record.quality, record.speed) if part and part.evidence):
                evidence.parameters = int(left * 1_000_000)
            made.append(record)
    return made


def recovered(prune: str, start: float, losses: dict[int, float]) -> list[Record]:
    """A pruned row, and the same with LoRA of so many tokens."""
    made = records(Spec(prune, "pruning", loss=start))
    for tokens, loss in losses.items():
        for record in records(Spec(f"{prune}+lora(steps={tokens // 512})", "pruning", loss=loss)):
            if record.compress:
                record.compress.training_tokens = tokens
            made.append(record)
    return made


def together(first: float, second: float, both: float) -> list[Record]:
    """Dense, two steps, and both of them, with these losses."""
    steps = {"wanda": first, "gptq": second, "wanda+gptq": both}
    made = records(Spec())
    for name, loss in steps.items():
        for record in records(Spec(name, "pruning", loss=loss, bits=4.25)):
            record.cell.steps = [{"name": step, "method": step, "settings": {}} for step in name.split("+")]
            record.cell.reference = made[0].cell.keys
            made.append(record)
    return made


EVERYTHING = {
    "methods-bits": lambda: [*records(Spec()), *family("RTN", [("rtn-3bit", 3.25, 6.0), ("rtn-4bit", 4.25, 1.4), ("rtn-8bit", 8.0, 1.01)])],
    "grids": lambda: equal_grid({"rtn": 1.4, "gptq": 1.3}, {"symmetric, min-max": 1.0, "symmetric, searched": 0.8}),
    "methods-sparsity": lambda: [*records(Spec()), *family("Wanda", [("wanda", 0.5, 1.9), ("wanda(sparsity=0.7)", 0.7, 9.0)], "pruning")],
    "methods-removed": lambda: [*records(Spec()), *thinner({"flap(ratio=0.1)": (0.9, 1.4), "flap": (0.75, 3.0)})],
    "methods-active": with_exits,
    "methods-cache": with_caches,
    "retrieval-bytes": caches,
    "retrieval-ms": caches,
    "stream": streamed,
    "drafts": with_drafts,
    "recovery": lambda: [*records(Spec()), *recovered("shortgpt", 3.0, {4000: 2.1, 16000: 1.6})],
    "joint": lambda: together(1.5, 1.4, 2.6),
    "degradation": lambda: sized([10_000_000, 300_000_000]),
    "speedup": lambda: grid([*records(Spec()), *records(Spec("gptq", "quantization", decode_ms=23.0))], [1, 4], [128, 512]),
    "prompt-speedup": lambda: EVERYTHING["speedup"](),
    "seeds": lambda: [*records(Spec()), *seeded([0, 1, 2])],
}


NAMES = [kind.name for kind in KINDS]


@cache
def sample(name: str) -> list[Row]:
    """Rows that allow a kind of figure: a realistic board where that is enough."""
    return rows(EVERYTHING.get(name, board)())


@pytest.fixture(scope="module")
def realistic() -> list[Row]:
    return sample("board")


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_figure_comes_out_the_same_twice(name: str) -> None:
    (plot,), (again,) = of(sample(name), name), of(sample(name), name)
    svg = plot.draw("svg")
    assert svg == again.draw("svg") and svg.startswith(b"<?xml") and b"<dc:date>" not in svg
    assert re.fullmatch(r"[a-z0-9.-]+", plot.name) and plot.name.startswith(name)
    assert plot.title in words(plot)


@pytest.mark.parametrize("name", ["memory", "tasks"])
def test_files_drawn_together_are_those_drawn_alone(name: str) -> None:
    (plot,), (again,) = of(sample(name), name), of(sample(name), name)
    assert plot.draw_all() == {format: again.draw(format) for format in FORMATS}


@pytest.mark.parametrize("name", ["methods-bits", "tasks"])
def test_every_format_comes_out_the_same_from_records_in_any_order(name: str) -> None:
    made = EVERYTHING.get(name, board)()
    (plot,), (again,) = of(sample(name), name), of(rows(list(made)[::-1]), name)
    starts = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    for format in FORMATS:
        drawn = plot.draw(format)
        assert drawn.startswith(starts[format]) and drawn == again.draw(format), format
        assert b"CreationDate" not in drawn


@pytest.mark.parametrize("name", SCATTER)
def test_labels_of_points_are_those_of_the_rows_and_do_not_overlap(name: str, realistic: list[Row]) -> None:
    (plot,) = of(realistic, name)
    figure = shown(plot)
    labels = [text for text in figure.axes[0].texts if text.get_gid() == "label"]
    boxes = [text.get_window_extent() for text in labels]
    assert len(labels) >= 6 and {text.get_text() for text in labels} <= {row.label for row in realistic}
    for (one, a), (other, b) in itertools.combinations(zip(labels, boxes, strict=True), 2):
        assert not a.overlaps(b), (one.get_text(), other.get_text())
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


@pytest.mark.parametrize("name", NAMES)
def test_title_legend_axes_and_caption_keep_apart_and_inside(name: str) -> None:
    (plot,) = of(sample(name), name)
    check_apart(shown(plot))


def check_apart(figure: Figure) -> None:
    parts: list[tuple[str, Bbox]] = [(text.get_text()[:20], text.get_window_extent()) for text in figure.texts]
    parts += [("legend", legend.get_window_extent()) for ax in figure.axes if (legend := ax.get_legend())]
    parts += [("axes", ax.get_window_extent()) for ax in figure.axes]
    parts += [(f"label {ax.get_xlabel()}", ax.xaxis.label.get_window_extent()) for ax in figure.axes if ax.get_xlabel()]
    for (one, a), (other, b) in itertools.combinations(parts, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    assert all(figure.bbox.padded(1).contains(*corner) for _, box in parts for corner in (box.min, box.max))


def shown(plot: Plot) -> Figure:
    """The figure, laid out."""
    with rc_context(STYLE):
        figure = plot.make()
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def test_the_front_is_that_of_the_table(realistic: list[Row]) -> None:
    (table,) = tables(realistic)
    for measure, axis in ((BYTES, "weight_bytes"), (SPEED, "decode_tokens_per_s")):
        members = front(points(table.rows, measure, PERPLEXITY), measure, PERPLEXITY)
        assert [p.row for p in members] == pareto(table.rows, axis)  # type: ignore[arg-type]


def test_intervals_of_points_hold_the_value(realistic: list[Row]) -> None:
    found = points(realistic, SPEED, PERPLEXITY)
    assert found and all(p.low <= p.y <= p.high and p.left <= p.x <= p.right for p in found)
    assert any(p.low < p.y < p.high and p.left < p.x < p.right for p in found)


@pytest.mark.parametrize("name", ["perplexity-bytes", "methods-bits", "flips", "tasks", "memory"])
def test_rows_that_are_not_drawn_are_counted_by_their_end(name: str, realistic: list[Row]) -> None:
    (plot,) = of(realistic, name)
    assert "1 failed (quip)" in plot.caption and "1 oom (flap(sparsity=0.3))" in plot.caption
    assert "1 unsupported (gptq(group_size=128))" in plot.caption
    assert " ".join(words(plot).split()).count("1 failed (quip)") == 1


def test_of_a_crowd_only_the_front_is_named_and_the_caption_says_so() -> None:
    crowd = [Spec(f"m{i}", "quantization", loss=1.1 + 0.02 * i, size=0.3 + 0.005 * i, bits=4.0) for i in range(45)]
    made = rows([r for spec in (Spec(), *crowd) for r in records(spec)[:2]])
    (plot,) = of(made, "perplexity-bytes")
    check_apart(shown(plot))
    text = words(plot)
    assert {"dense", "m0"} <= set(text.splitlines()) and "m44" not in text.splitlines()
    assert "only the reference and the front are named" in " ".join(text.split())


def test_in_a_crowd_without_reference_and_front_the_caption_does_not_speak_of_them() -> None:
    crowd = [Spec(f"m{i}", "quantization", loss=1.1 + 0.02 * i, size=0.3 + 0.005 * i, bits=4.0) for i in range(45)]
    (plot,) = of(rows([r for spec in (Spec(), *crowd) for r in records(spec)[:2]]), "divergence")
    said = words(plot).split()
    assert {spec.pipeline for spec in crowd} <= set(said) and "the front" not in " ".join(said)


def test_a_long_title_is_told_whole_in_two_lines_that_break_between_its_parts() -> None:
    machine = "Example(R) Processor(R) 9000 · 2 threads · 9 GB"
    made = [row.model_copy(update={"hardware": machine}) for row in sample("board")]
    (plot,) = of([*sample("board"), *made], "memory")[1:]
    (title,) = [text for text in shown(plot).texts if text.get_text().startswith("Memory")]
    assert title.get_text().replace("\n", " ") == f"Memory while decoding: {plot.group.title}" and machine in plot.group.title
    assert title.get_text().count("\n") == 1 and title.get_text().splitlines()[0].endswith(" ·")
    check_apart(shown(plot))


def test_every_row_is_drawn_or_accounted_for(realistic: list[Row]) -> None:
    (plot,) = of(realistic, "perplexity-bytes")
    text = words(plot)
    assert "Points without a name" in text or all(row.label in text for row in realistic)


def test_rows_off_the_scale_are_named_with_their_number(realistic: list[Row]) -> None:
    (row,) = [row for row in realistic if row.pipeline == "hqq(bits=2)"]
    number = decimal(0)(row.perplexity or 0)
    (scatter,), (lines,) = of(realistic, "perplexity-bits"), of(realistic, "methods-bits")
    assert f"hqq(bits=2) ({number})" in scatter.caption
    assert f"hqq(bits=2) {number}" in words(lines)


def test_settings_of_one_method_share_a_line_and_others_do_not() -> None:
    made = rows([*EVERYTHING["methods-bits"](), *family("HQQ", [("hqq-4bit", 4.5, 1.3)])])
    figure = shown(of(made, "methods-bits")[0])
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    by_bits = {row.effective_bits: row.perplexity for row in made if row.methods == ["RTN"]}
    assert list(lines["RTN"].get_xdata()) == sorted(b for b in by_bits if b is not None)
    assert list(lines["RTN"].get_ydata()) == [by_bits[bits] for bits in sorted(b for b in by_bits if b is not None)]
    assert "HQQ" not in lines and "hqq-4bit" in words(of(made, "methods-bits")[0])


def test_a_setting_that_another_of_its_method_beats_is_off_its_line() -> None:
    made = rows([*records(Spec()), *family("RTN", [("rtn-3bit", 3.25, 2.0), ("rtn-4bit-row", 4.1, 2.4), ("rtn-4bit", 4.25, 1.4)])])
    line = {line.get_label(): line for line in shown(of(made, "methods-bits")[0]).axes[0].get_lines()}["RTN"]
    assert list(line.get_xdata()) == [3.25, 4.25]


def test_recovery_counts_the_tokens_of_its_own_training_and_no_step_without_any() -> None:
    made = [*records(Spec()), *recovered("l0", 3.0, {4000: 2.1, 16000: 1.6}), *records(Spec("l0+lora(steps=31)+gptq", "pruning", loss=1.7))]
    for record in made:
        if record.compress and record.cell.pipeline != "dense":
            record.compress.training_tokens = (record.compress.training_tokens or 0) + 1000
    later = [record for record in made if record.cell.pipeline == "l0+lora(steps=31)+gptq"]
    for record in later:
        if record.compress:
            record.compress.training_tokens = 17000
    lines = {line.get_label(): line for line in shown(of(rows(made), "recovery")[0]).axes[0].get_lines()}
    drawn = [list(line.get_xdata()) for line in lines.values() if len(line.get_xdata()) == 3]
    assert drawn == [[0.0, 4.0, 16.0]]
    assert not any("gptq" in label for label in words(of(rows(made), "recovery")[0]).splitlines() if "+ " in label)


def test_each_line_of_recovery_has_a_look_of_its_own_and_the_legend_the_order_of_their_ends() -> None:
    made = [*records(Spec()), *recovered("shortgpt", 3.0, {4000: 2.1, 16000: 1.6}), *recovered("flap", 4.0, {4000: 1.2})]
    axes = shown(of(rows(made), "recovery")[0]).axes[0]
    lines = {drawn.get_label(): drawn.lines[0] for drawn in axes.containers}
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(lines) == len(looks) == 2
    ends = [lines[text.get_text()].get_ydata()[-1] for text in axes.get_legend().get_texts() if text.get_text() in lines]
    assert len(ends) == 2 and ends == sorted(ends, reverse=True)


def test_zeros_that_a_grid_leaves_in_a_cut_model_are_no_sparsity_of_its_pruning() -> None:
    cut = list(records(Spec("flap+gptq", "pruning+quantization", loss=1.9, bits=4.25, sparsity=0.14, size=0.4)))
    for record in cut:
        record.cell.parameters = 1_000_000
        for evidence in (part.evidence for part in (record.quality, record.speed) if part and part.evidence):
            evidence.parameters = 800_000
    (plot,) = of(rows([*EVERYTHING["methods-sparsity"](), *cut]), "methods-sparsity")
    assert "flap+gptq" not in words(plot).splitlines() and "without zeros in pruned weights (flap+gptq)" in plot.caption


def test_degradation_has_a_point_for_each_size() -> None:
    text = words(of(sample("degradation"), "degradation")[0])
    assert all(part in text for part in ("tiny-10000000", "10 M", "300 M", "rtn", "gptq"))
    assert reasons(rows(sized([10_000_000])), "degradation") == [
        "no pipeline was compared with its dense model on two sizes of model (1 here)"
    ]


def test_speedups_are_those_of_the_rows_with_their_roofline() -> None:
    made = sample("speedup")
    figure = shown(of(made, "speedup")[0])
    (row,) = [row for row in made if row.pipeline == "gptq"]
    assert len(figure.axes) == 2
    for ax, over in zip(figure.axes, ("batch", "prompt"), strict=True):
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 2 and line.get_linestyle() != "-"]
        solid = next(line for line in ax.get_lines() if list(line.get_xdata()) == sorted({p[over] for p in row.speed_points}))
        assert solid.get_ydata()[0] == pytest.approx(row.speedup)
        assert any(line.get_ydata()[0] == pytest.approx(row.speedup / row.roofline_fraction) for line in lines)  # type: ignore[operator]
    single = rows(grid(EVERYTHING["speedup"](), [1], [128]))
    assert reasons(single, "speedup") == ["no row has speed-ups at several batches or contexts (1 point in all)"]


def test_speedups_of_the_prompt_are_those_of_the_rows() -> None:
    made = sample("prompt-speedup")
    (row,) = [row for row in made if row.pipeline == "gptq"]
    figure = shown(of(made, "prompt-speedup")[0])
    for ax, over, fixed in zip(figure.axes, ("batch", "prompt"), ("prompt", "batch"), strict=True):
        (at,) = {int(ax.get_title().rpartition(" ")[2])}
        points = sorted((p[over], p["prefill_speedup"]) for p in row.speed_points if p[fixed] == at)
        lines = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in ax.get_lines()]
        assert len(points) == 2 and points in lines


def test_rows_of_one_method_are_told_apart_where_their_speed_ups_are_drawn() -> None:
    of_one = family("RTN", [("rtn-4bit", 4.25, 1.4), ("rtn-8bit", 8.0, 1.01)])
    (plot,) = of(rows(grid([*records(Spec()), *of_one], [1, 4], [128, 512])), "speedup")
    for ax in shown(plot).axes:
        lines = [held.lines[0] for held in ax.containers if str(held.get_label()).startswith("rtn")]
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines) == 2


def test_no_look_is_given_twice_in_one_figure() -> None:
    """Palettes go round after eight colours; further settings of one method meet the looks of those."""
    palette = Palette(tuple(f"m{number}" for number in range(20)))
    methods = [*palette.methods, "m0", "m8", *["m3"] * 12]
    looks = palette.apart(methods)
    assert len(set(looks)) == len(looks)
    assert [look.colour for look in looks] == [palette.look(method).colour for method in methods]


def falling(made: Sequence[Row], name: str) -> list[Row]:
    """The rows with speed-ups of 2 at one sequence and of a half at four."""
    at = {1: (2.0, 1.9, 2.1), 4: (0.5, 0.4, 0.6)}
    changed = []
    for row in made:
        points = [
            point | dict(zip((name, f"{name}_low", f"{name}_high"), at[int(point["batch"] or 0)], strict=True))
            for point in row.speed_points
        ]
        changed.append(row if row.is_reference else row.model_copy(update={"speed_points": points}))
    return changed


def crossings(ax: Axes) -> list[ErrorbarContainer]:
    """Bars of where rows stop being faster than dense: those with a hollow mark and no line."""
    return [held for held in ax.containers if (line := held.lines[0]).get_linestyle() == "None" and line.get_markerfacecolor() == "white"]


@pytest.mark.parametrize(("kind", "name"), [("speedup", "speedup"), ("prompt-speedup", "prefill_speedup")])
def test_where_a_row_stops_being_faster_than_dense_is_marked(kind: str, name: str) -> None:
    changed = falling(sample(kind), name)
    ax = shown(of(changed, kind)[0]).axes[0]
    (bar,) = crossings(ax)
    (row,) = [held for held in ax.containers if held is not bar]
    mark, line = bar.lines[0], row.lines[0]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([pytest.approx(2.0)], [1])
    assert (mark.get_color(), mark.get_marker()) == (line.get_color(), line.get_marker()), "whose it is"
    ((left, right),) = [segment[:, 0] for segment in bar.lines[2][0].get_segments()]
    low, high = (4 ** (math.log(one) / math.log(one / other)) for one, other in ((1.9, 0.4), (2.1, 0.6)))
    assert left == pytest.approx(low) and right == pytest.approx(high)
    flagged = [
        row.model_copy(update={"flags": ["OMP_WAIT_POLICY=PASSIVE: threads sleep"]}) if not row.is_reference else row for row in changed
    ]
    assert crossings(shown(of(flagged, kind)[0]).axes[0]) == []
    of_one = family("RTN", [("rtn-4bit", 4.25, 1.4), ("rtn-8bit", 8.0, 1.01)])
    figure = shown(of(falling(rows(grid([*records(Spec()), *of_one], [1, 4], [128, 512])), name), kind)[0])
    figure.draw_without_rendering()
    heights = [float(held.lines[0].get_transform().transform((2.0, 1.0))[1]) for held in crossings(figure.axes[0])]
    assert len(heights) == 2 and abs(heights[0] - heights[1]) > 5, "one does not hide the other"


def test_memory_bars_end_at_the_sum(realistic: list[Row]) -> None:
    text = words(of(realistic, "memory")[0]).splitlines()
    for row in realistic:
        if row.weight_bytes and row.kv_cache_bytes and row.activation_bytes:
            assert decimal(1, 1e-6)(row.weight_bytes + row.kv_cache_bytes + row.activation_bytes) in text
    assert {"weights", "KV cache", "activations and workspace"} <= set(text)


def test_flips_are_those_of_the_rows(realistic: list[Row]) -> None:
    ax = shown(of(realistic, "flips")[0]).axes[0]
    names = [label.get_text().removesuffix(" *") for label in ax.get_yticklabels()]
    by_name = {row.label: row for row in realistic}
    wrong, right = ([bar.get_width() for bar in container] for container in ax.containers)
    assert [-by_name[name].flips_to_wrong for name in names] == wrong  # type: ignore[operator]
    assert [by_name[name].flips_to_right for name in names] == right


def test_task_differences_are_those_of_the_rows_and_significant_ones_are_marked(realistic: list[Row]) -> None:
    ax = shown(of(realistic, "tasks")[0]).axes[0]
    cells = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in ax.texts}
    names = [label.get_text() for label in ax.get_yticklabels()]
    by_name, form = {row.label: row for row in realistic}, decimal(1, signed=True)
    for y, name in enumerate(names):
        row = by_name[name]
        for x, task in enumerate(sorted(row.task_delta)):
            delta, p = row.task_delta[task], row.task_p[task]
            assert delta is not None and p is not None
            assert cells[x, y] == (form(100 * delta) if delta else "0") + (" *" if p < 0.05 else "")
        assert cells[len(row.task_delta), y] == form(100 * fmean(row.task_delta.values()))  # type: ignore[type-var]
    assert any(text.endswith("*") for text in cells.values())


def test_seeds_show_each_replicate() -> None:
    made = sample("seeds")
    found = [row for row in made if row.pipeline == "gptq"]
    figure = shown(of(made, "seeds")[0])
    marks = next(line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3)
    assert sorted(marks.get_xdata()) == sorted(row.perplexity for row in found if row.perplexity)
    assert f"s = {decimal(2)(found[0].perplexity_seed_sd or 0)}, 3 seeds" in words(of(made, "seeds")[0])
    assert reasons(rows([*records(Spec()), *seeded([0])]), "seeds") == ["no pipeline was measured with more than one seed"]


def test_lines_of_seeds_are_told_apart_by_their_calibration_text() -> None:
    made = [
        r for samples in (8, 32) for seed in (0, 1) for r in records(Spec(f"gptq {samples} {seed}", "quantization", loss=1.3, seed=seed))
    ]
    for record in made:
        _, samples, seed = record.cell.pipeline.split()
        record.cell.pipeline, record.cell.steps, record.cell.calibration = "gptq", [], "fingerprint"
        record.config["calibration"] = {"source": "news", "samples": int(samples), "length": 256, "seed": int(seed)}
    said = words(of(rows([*records(Spec()), *made]), "seeds")[0])
    assert "gptq · news, 8 × 256 tokens" in said and "gptq · news, 32 × 256 tokens" in said


def test_every_kind_has_a_reason_where_the_rows_do_not_allow_it() -> None:
    found = list(figures(rows(records(Spec()))))
    drawn = {plot.kind for plot in found if isinstance(plot, Plot)}
    absent = {gone.kind: gone.reason for gone in found if isinstance(gone, Absent)}
    assert drawn == {"memory"} and set(absent) == {kind.name for kind in KINDS} - drawn
    assert all(reason and "\n" not in reason for reason in absent.values())
    assert list(figures([])) == []


def test_quality_of_two_machines_stands_in_one_figure_and_speed_does_not() -> None:
    here = [*records(Spec()), *records(Spec("rtn", "quantization", loss=1.4, bits=4.25))]
    gptq = records(Spec("gptq", "quantization", loss=1.2, bits=4.25, cpu="Another CPU"))
    alone = rows([*here, *gptq])
    (unpaired,) = of(alone, "perplexity-bits")
    assert ">gptq<" not in unpaired.draw("svg").decode() and "1 without perplexity above dense or bits (gptq)" in unpaired.caption
    made = rows([*here, *records(Spec(cpu="Another CPU")), *gptq])
    (quality,) = of(made, "perplexity-bits")
    assert {"rtn", "gptq", "dense"} <= set(words(quality).splitlines()) and "2 machines" in words(quality)
    assert len(of(made, "memory")) == 2
    assert not any({"rtn", "gptq"} <= set(words(speed).splitlines()) for speed in of(made, "perplexity-speed"))


def test_a_result_with_several_speeds_stands_once_in_a_figure_of_quality() -> None:
    long = [r for r in records(Spec("gptq", "quantization", loss=1.2, bits=4.25, speed="long")) if r.stage != "compress"]
    made = rows([*records(Spec()), *records(Spec("gptq", "quantization", loss=1.2, bits=4.25)), *long])
    assert len([row for row in made if row.pipeline == "gptq"]) == 2
    assert words(of(made, "perplexity-bits")[0]).splitlines().count("gptq") == 1


def test_a_result_under_two_names_stands_once_in_a_figure() -> None:
    made = rows([*records(Spec()), *records(Spec("gptq", "quantization", loss=1.2, bits=4.25))])
    other = made[1].model_copy(update={"replicate": "seed 0", "hardware": "Another CPU"})
    (plot,) = of([*made, other], "perplexity-bits")
    assert len(plot.group.rows) == 2
    (plot,) = of([*made, other.model_copy(update={"hardware": made[1].hardware})], "memory")
    assert len(plot.group.rows) == 2
    sizes = sample("degradation")
    (plot,) = of([*sizes, *(row.model_copy(update={"hardware": "Another CPU"}) for row in sizes)], "degradation")
    assert len(plot.group.rows) == len(sizes)


def test_hostile_names_are_shown_as_they_are() -> None:
    specs = [Spec(suite=HOSTILE), Spec(HOSTILE, "quantization", suite=HOSTILE, loss=1.4, bits=4.25, size=0.4)]
    specs += [replace(specs[1], pipeline="_漢字", loss=1.2, bits=3.0), replace(specs[1], pipeline="x" * 500, loss=1.3, bits=2.0)]
    made = rows(grid([r for spec in specs for r in records(spec)], [1, 2], [128]))
    drawn = of(made)
    assert len(drawn) >= 10
    for plot in drawn:
        text = words(plot)
        assert HOSTILE in text and "x" * 60 not in text
        assert re.fullmatch(r"[a-z0-9.-]+", plot.name)


def test_methods_keep_their_look_over_all_figures(realistic: list[Row]) -> None:
    found = realistic
    palette = Palette.of(found)
    looks = {method: palette.look(method) for method in palette.methods}
    assert len(set(looks.values())) == len(looks) > 8
    assert palette == Palette.of(list(reversed(found)))
    assert len({look for look in FAMILIES.values()}) == len({marker for _, marker in FAMILIES.values()}) == len(FAMILIES)
    assert {method_of(row) for row in found if not row.is_reference} == set(palette.methods)


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="methods-bits"):
        kind("method-bits")


def test_the_command_writes_figures_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from slimbench.harness.cli.board.figures import figures as command

    for record in board():
        Store(tmp_path / "results").put(record)
    command(tmp_path / "results", tmp_path / "out", "png, pdf", ["flips", "seeds"], False)
    said = capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".pdf"}
    assert all(path.name.startswith("flips-tiny-135m-wiki") for path in (tmp_path / "out").iterdir())
    assert "no seeds, tiny-135m · wiki: no pipeline was measured with more than one seed" in said
    with pytest.raises(ConfigError, match="--kind gif"):
        command(tmp_path / "results", tmp_path / "out", "gif", None, False)


def test_a_row_of_an_unknown_family_is_drawn() -> None:
    made = rows([*records(Spec()), *records(Spec("new", "sketching", loss=1.1, bits=4.0, size=0.5))])
    assert {"new", "sketching"} <= set(words(of(made, "perplexity-bytes")[0]).splitlines())


def test_all_text_is_large_enough_to_read(realistic: list[Row]) -> None:
    for plot in of(realistic):
        sizes = [text.get_fontsize() for text in shown(plot).findobj(Text) if isinstance(text, Text) and text.get_text()]
        assert min(sizes) >= 7.5, plot.name


@pytest.mark.parametrize("ends", [(0.55, 1.2), (0.93, 1.04), (1.0, 3.4), (3, 40), (18, 2300), (1e-3, 40)])
def test_a_logarithmic_axis_has_three_numbers_in_view_at_least(ends: tuple[float, float]) -> None:
    axes = Figure().subplots()
    axes.set_ylim(ends)
    log_axis(axes, "y")
    axes.set_ylim(ends)
    FigureCanvasAgg(axes.figure).draw()  # type: ignore[arg-type]
    seen = [label.get_text() for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if ends[0] <= at <= ends[1]]
    assert len(seen) >= 3 and all(seen) and len({*seen}) == len(seen)
    assert all(float(text) > 0 for text in seen)


def test_methods_on_common_grids_stand_where_their_rows_do() -> None:
    made = sample("grids")
    (plot,) = of(made, "grids")
    (ax,) = shown(plot).axes
    drawn = sorted(float(line.get_xdata()[0]) for line in ax.get_lines() if line.get_markersize() == 7 and len(line.get_xdata()))
    cells: dict[tuple[str, str | None], list[float]] = {}
    for row in made:
        if row.grid:
            cells.setdefault((row.methods[0], row.grid), []).append(row.perplexity_delta_percent or 0.0)
    assert drawn == pytest.approx(sorted(fmean(values) for values in cells.values())) and len(drawn) == 4
    assert plot.reading.startswith("gptq loses least") and "(symmetric, searched)" in plot.reading
    assert reasons(sample("board"), "grids") == ["no two methods stand on two grids at equal bits"]


def test_a_draw_of_the_calibration_text_is_one_mark_on_a_common_grid() -> None:
    """A second row of a draw, as with another amount of text, moves no mean: the table of grids does not count it either."""
    made = sample("grids")
    (plot,) = of(made, "grids")
    second = [
        row.model_copy(update={"perplexity_delta_percent": 0.01, "keys": row.keys.model_copy(update={"quality": f"{at:016x}"})})
        for at, row in enumerate(made)
        if not row.is_reference
    ]
    (again,) = of([*made, *second], "grids")
    assert again.reading == plot.reading
    repeated = sum(row.grid is not None for row in second)
    assert again.caption.replace(f" Further rows of a draw, not shown: {repeated}.", "") == plot.caption != again.caption

    def marks(plot: Plot) -> list[list[float]]:
        return [list(line.get_xdata()) for line in shown(plot).axes[0].get_lines()]

    assert marks(again) == marks(plot)

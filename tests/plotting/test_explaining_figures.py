"""Figures of explanations: nothing cut off or empty, one edit or many, and no minus sign before 0."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer

from reftlab.plotting import overview_figure, removal_figure
from reftlab.plotting.amnesic import AmnesicPoint, amnesic_figure
from reftlab.plotting.composition import composition_figure
from reftlab.plotting.contexts import contexts_figure
from reftlab.plotting.direct import direct_figure
from reftlab.plotting.dose import dose_figure
from reftlab.plotting.mediation import mediation_figure
from reftlab.plotting.shapley import leave_one_out_figure

NAME = "logit difference, ' good' − ' bad'"


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def outside(figure):
    """Texts that reach beyond the figure."""
    width, height = figure.canvas.get_width_height()
    found = []
    for axes in figure.axes:
        found += [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.texts]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted((low, high))
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in found
        if text.get_visible() and text.get_text()
    ]
    return [
        text for text, box in boxes if min(box.x0, box.y0) < -2 or box.x1 > width + 2 or box.y1 > height + 2
    ]


def shares(columns, **flowing):
    """Shares of three blocks that flow through the named columns alone."""
    values = np.zeros((3, 1, columns))
    for column, share in flowing.items():
        values[1:, 0, int(column[1:])] = share
    return values


def mediated(values, columns, **options):
    paths, rows = ["blocks[*].output"] * 3, ["0", "1", "2"]
    figure = mediation_figure(values, paths, rows, None, columns, "Effect: -3 [-4, -2] nats", **options)
    return drawn(figure)


def labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_neighbouring_tokens_through_which_nothing_flows_are_one_column_and_the_figure_says_so():
    names = [f"␣word{n}" for n in range(30)]
    values = {"Sufficiency: alone": shares(30, c20=0.5, c29=1.0), "Necessity: without": shares(30, c20=0.4)}
    figure = mediated(values, names)
    first = figure.axes[0]
    assert labels(first) == ["… 20 …", "␣word20", "… 8 …", "␣word29"]
    np.testing.assert_allclose(first.images[0].get_array()[2], [0, 0.5, 0, 1.0])
    assert "less than 1% of the effect" in figure.legends[0].get_title().get_text()
    assert figure.get_size_inches()[0] < 9


def test_few_columns_and_maps_without_any_flow_are_drawn_as_they_are():
    few = mediated({"Sufficiency": shares(3, c1=0.5)}, ["all before", "last", "answer"], every_token=False)
    assert labels(few.axes[0]) == ["all before", "last", "answer"]
    assert not few.legends
    still = mediated({"Sufficiency": shares(12)}, [f"w{n}" for n in range(12)])
    assert len(labels(still.axes[0])) == 12


def test_colours_that_do_not_occur_are_not_in_the_bar():
    bar = mediated({"Sufficiency": shares(3, c1=0.8)}, ["a", "b", "c"]).axes[-1]
    assert bar.get_ylim() == (0.0, 0.8)
    both = mediated({"Sufficiency": shares(3, c1=0.8, c2=-0.1)}, ["a", "b", "c"])
    assert both.axes[-1].get_ylim() == (-0.1, 0.8)
    image = both.axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-0.8, 0.8)
    assert "Effect: −3 [−4, −2] nats" in both.get_suptitle()


def test_grey_is_explained_where_a_cell_was_not_run():
    values = shares(3, c1=0.8)
    assert "grey" not in mediated({"Sufficiency": values}, ["a", "b", "c"]).axes[-1].get_ylabel()
    values[0] = np.nan
    assert "grey: not run" in mediated({"Sufficiency": values}, ["a", "b", "c"]).axes[-1].get_ylabel()


@pytest.mark.parametrize("value", [0.0002, 0.0123, 0.4])
def test_ticks_of_the_share_of_variance_are_distinct_and_apart(value):
    controls = [
        ("variance", value, (0.2 * value, 0.5 * value, 0.8 * value), 0.005),
        ("kurtosis", -0.004, (-0.9, -0.2, 1.8), 0.4),
        ("largest", 5.0, (2.2, 2.8, 4.1), 0.01),
    ]
    tokens = [(f"␣word{n}", 2.0 - n / 3, n) for n in range(12)]
    figure = drawn(contexts_figure("e", [("1", tokens, controls), ("2", tokens, controls)]))
    variance = figure.axes[1]
    low, high = variance.get_ylim()
    ticks = [
        label for place, label in zip(variance.get_yticks(), variance.get_yticklabels(), strict=True)
        if low <= place <= high
    ]  # fmt: skip
    shown = [label.get_text() for label in ticks]
    assert len(set(shown)) == len(shown) >= 2
    titles = [axes._left_title.get_window_extent() for axes in figure.axes[:4]]
    assert all(one.x1 <= two.x0 for one, two in combinations(titles, 2))
    assert "0.00" in [text.get_text() for text in figure.axes[2].texts]


TOKENS = [(f"tok{n}", 0.1 * n, 5 - 0.6 * n) for n in range(16)]


def effects(count):
    return [
        (f"edit{n}", (-0.4, -0.5, -0.3), (17.0, 16.0, 18.0), "share -0.02 [-0.03, 0.00]")
        for n in range(count)
    ]


@pytest.mark.parametrize(("count", "panels", "tall"), [(1, 3, 5), (2, 3, 8), (3, 4, 9), (6, 4, 8)])
def test_direct_effects_of_few_edits_do_not_leave_a_tall_panel_empty(count, panels, tall):
    tokens = {f"edit{n}": TOKENS for n in range(count)}
    figure = drawn(direct_figure(effects(count), tokens, f"change of {NAME} (logits)"))
    assert len(figure.axes) == panels
    assert figure.get_size_inches()[1] < tall
    assert "share −0.02 [−0.03, 0.00]" in figure.axes[0].get_yticklabels()[0].get_text()
    if count == 1:
        raised, lowered = ([label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes[1:])
        assert raised + lowered == [text for text, *_ in TOKENS]


@pytest.mark.parametrize("names", [["sort", "twin"], ["emoji", "a_long_edit_name", "d", "e"]])
def test_a_composition_matrix_fits_its_figure_and_has_no_minus_0(names):
    cells = {(a, b): (-13.0 if a == b else -0.003, a == b) for a in names for b in names}
    lines = [(names[0], names[1], "adds up", (128.0, 16.0), (129.0, 16.2), ["winner"])]
    figure = drawn(composition_figure(names, cells, lines, f"{NAME}\n(logits)"))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert set(shown) == {"−13.0*", "0.0"}
    assert outside(figure) == []


@pytest.mark.parametrize("count", [1, 2])
def test_bars_of_few_edits_are_not_wider_than_tall(count):
    edits = [(f"edit{n}", n, 0.5, (0.4, 0.6), 1.0) for n in range(count)]
    figure = drawn(overview_figure(edits))
    one = {"e": 1.0} if count == 1 else {"e": 1.0, "f": 0.5}
    directions = {name: [("1", 0.9), ("2", 0.01)] for name in one}
    removed = drawn(removal_figure(one, directions, {"e": [0.1, 0.2]}))
    for some in (figure, removed):
        for axes in (*some.axes, *(axes for part in some.subfigs for axes in part.axes)):
            for bar in (bar for bars in axes.containers if isinstance(bars, BarContainer) for bar in bars):
                box = bar.get_window_extent()
                assert box.width < 0.45 * axes.get_window_extent().width
    if count == 1:
        [axes] = removed.axes
        assert labels(axes) == ["1", "2", "all"]
        assert "first to last" not in figure.axes[0].get_xlabel()


def test_bars_of_next_to_no_length_are_marked_and_their_number_is_written():
    lines = [(11.4, 10.0, 12.0), (0.001, 0.0, 0.002), (-0.0, -0.0, 0.0)]
    figure = drawn(
        leave_one_out_figure(
            ["1", "2", "3"], (lines, {}, 13.0), ([(-v, -h, -low) for v, low, h in lines], {}, -13.0),
            "dimension", "answer loss", "nats",
        )
    )  # fmt: skip
    for axes, small in zip(figure.axes, ("+0.001", "−0.001"), strict=True):
        assert [text.get_text() for text in axes.texts] == [small, "0"]
        [marks] = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(marks.get_xdata()) == 3
        frame = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0
            assert box.x1 <= frame.x1


def test_the_axis_of_doses_names_the_behaviour_without_a_break_inside_its_quotes():
    line = ("e", [0.0, 1.0, 2.0], [(0.0, -1.0, 1.0), (1.0, 0.0, 2.0), (2.0, 1.0, 3.0)], [])
    [axes] = drawn(dose_figure([line], NAME, "logits")).axes
    assert axes.get_ylabel() == "logit difference,\n' good' − ' bad'\n(logits)"


@pytest.mark.parametrize(
    "sites",
    [["26"], [f"model.layers.{n}.{part}output" for n in (9, 12) for part in ("", "self_attn.o_proj.")]],
)
def test_labels_of_erasures_stay_inside_the_figure_and_apart(sites):
    points = [
        AmnesicPoint(site, method, (1.4, 1.1, 1.7), (0.1,), (0.2,), (0.9, 0.8, 1.0), (0.6, 0.5, 0.7))
        for site in sites
        for method in ("leace", "inlp")
    ]
    name = "divergence of the next token from that without erasure"
    figure = drawn(amnesic_figure(points, name, "nats", "balanced accuracy", 0.5, "site"))
    assert outside(figure) == []
    above, below = (axes.yaxis.label.get_window_extent() for axes in figure.axes)
    assert above.y0 >= below.y1
    assert labels(figure.axes[1])[0] == ("26" if len(sites) == 1 else "block 9")

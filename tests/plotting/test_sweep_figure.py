"""Heat maps of sweeps: labelled, centred on 0, and legible with many rows and columns."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg

from reftlab.plotting.sweep import HeatMap, sweep_figure


def heat_map(rows, columns, title="blocks[*].output", low=-1.0, high=3.0):
    values = np.linspace(low, high, rows * columns).reshape(rows, columns)
    return HeatMap(title, values, [str(n) for n in range(rows)], [f" word{n}" for n in range(columns)])


def drawn(*panels):
    figure = sweep_figure(panels, "Clean vectors patched in; n = 3", "change of logit difference (logits)")
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 14), (30, 14), (48, 200), (270, 270)])
def test_labels_do_not_overlap_and_the_figure_stays_of_a_size_to_look_at(rows, columns):
    figure = drawn(heat_map(rows, columns))
    assert figure.get_size_inches().max() < 20
    renderer = figure.canvas.get_renderer()
    axes = figure.axes[0]
    for labels, side in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
        boxes = sorted(label.get_window_extent(renderer).get_points()[:, side].tolist() for label in labels)
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(boxes))


def test_colours_are_centred_on_no_change_and_named_with_their_unit():
    figure = drawn(heat_map(4, 4), heat_map(4, 4, low=-9.0, high=1.0))
    images = [image for axes in figure.axes for image in axes.images]
    assert {(image.norm.vmin, image.norm.vcenter, image.norm.vmax) for image in images} == {(-9.0, 0.0, 9.0)}
    red, green, blue, _ = images[0].cmap(images[0].norm(0.0))
    assert min(red, green, blue) > 0.98
    assert figure.axes[-1].get_ylabel().replace("\n", " ") == "change of logit difference (logits)"


def test_cells_below_0_are_marked_where_grey_print_would_not_tell_them_from_those_above():
    marked = drawn(heat_map(2, 4))
    [dashes] = marked.axes[0].collections
    values = heat_map(2, 4).values
    assert dashes.get_offsets().tolist() == [
        [column, row] for row, column in np.argwhere(values < -0.15).tolist()
    ]
    assert "below 0" in marked.legends[0].get_title().get_text()
    one_sign = drawn(heat_map(2, 4, low=0.0))
    assert not one_sign.axes[0].collections
    assert not one_sign.legends


def test_spaces_inside_a_name_and_sites_that_are_blocks_are_written_in_words():
    rows = ["model.layers.4.output", "model.layers.4.mlp.output"]
    axes = drawn(HeatMap("t", np.eye(2), rows, ["all before", "last"], "site", "position")).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all before", "last"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block 4", "model.layers.4.mlp.output"]


def test_rows_go_up_as_blocks_do_and_tokens_show_their_spaces():
    axes = drawn(heat_map(3, 2)).axes[0]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣word0", "␣word1"]
    assert axes.get_xlabel() == "token"
    assert axes.get_ylabel() == "block"


def test_missing_cells_are_grey_and_a_map_of_zeros_is_white():
    panel = heat_map(2, 2)
    panel.values[0, 1] = np.nan
    image = drawn(panel).axes[0].images[0]
    assert image.cmap(image.get_array())[0, 1, :3] == pytest.approx([0.85, 0.85, 0.85], abs=0.01)
    still = drawn(heat_map(2, 2, low=0.0, high=0.0)).axes[0].images[0]
    assert (still.norm.vmin, still.norm.vmax) == (-1.0, 1.0)


def test_nothing_to_draw_is_said():
    figure = drawn(HeatMap("t", np.full((2, 2), np.nan), ["0", "1"], ["a", "b"]))
    assert "no numbers" in figure.axes[0].texts[0].get_text()
    assert pyplot.get_fignums() == []

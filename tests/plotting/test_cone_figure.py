"""The figure of a cone shows each cell's state where it is, labelled, whatever the row's length."""

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from reftlab.plotting import cone_figure
from reftlab.plotting.style import ORANGE, SKY

TOKENS = ["the", " cat", "\n", " said", "🌊", ":", "$x_1$", " a"]


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def picture(tokens=TOKENS, blocks=4, first_block=1, start=3, stop=6, edits=(("edit", 1, 3),), title="row 0"):
    return drawn(cone_figure(tokens, blocks, first_block, start, stop, edits, title))


def colours(figure):
    """The colour of each cell, `(block, token)` of RGBA."""
    image = figure.axes[0].images[0]
    return image.cmap(image.norm(np.asarray(image.get_array())))


def test_each_cell_has_the_colour_of_what_is_done_there():
    cells = colours(picture())
    assert cells.shape[:2] == (4, 8)
    for block in range(4):
        for token in range(8):
            computed, cached = block >= 1 and 3 <= token < 6, block >= 1 and token < 3
            same = {name: np.allclose(cells[block, token], to_rgba(name)) for name in (ORANGE, SKY)}
            assert same == {ORANGE: computed, SKY: cached}


def test_block_0_is_at_the_bottom_and_token_0_on_the_left():
    axes = picture().axes[0]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert axes.get_xlim()[0] < axes.get_xlim()[1]


def test_edits_are_marked_below_the_first_block_that_they_change():
    figure = picture(edits=[("a", 1, 3), ("b", 4, 5), ("c", 1, 3)])
    marks = figure.axes[0].lines[0]
    assert list(zip(marks.get_xdata(), marks.get_ydata(), strict=True)) == [(3, 0.5), (5, 3.5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "where the 3 edits act"
    assert [t.get_text() for t in picture().legends[0].get_texts()][-1] == "edit edit"


def test_axes_and_legend_say_what_they_show():
    figure = picture(title="row 0: 7.0% of the batch's cells")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("token", "block")
    assert axes.get_title(loc="left") == "row 0: 7.0% of the batch's cells"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels[1:3]] == ["cached", "skipped"]
    assert labels[0] == "computed in every step"


def test_short_rows_are_spelled_and_long_ones_numbered():
    names = [label.get_text() for label in picture().axes[0].get_xticklabels()]
    assert len(names) == 8
    assert names[2] == "\\n"
    long = picture([f"w{n}" for n in range(250)], 30, 16, 249, 251)
    assert len(long.axes[0].get_xticks()) < 20
    assert "w3" not in [label.get_text() for label in long.axes[0].get_xticklabels()]


CASES = {
    "nothing": {"start": 0, "stop": 8, "first_block": 0, "edits": ()},
    "no block": {"first_block": 4, "edits": [("unembed", 4, 3)]},
    "one token": {"tokens": ["a"], "start": 0, "stop": 1},
    "one block": {"blocks": 1, "first_block": 0},
    "a long name": {
        "edits": [("x" * 200, 1, 2)],
        "title": "row 3: 12.5% of cells, 6.3% of a plain step's work",
    },
    "many": {
        "tokens": [f"w{n}" for n in range(400)],
        "blocks": 80,
        "edits": [(f"e{n}", n, n) for n in range(80)],
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_figure_draws_without_a_warning_and_fits(case, recwarn):
    figure = picture(**case)
    assert not [w for w in recwarn if "missing from" in str(w.message) or "layout" in str(w.message)]
    assert pyplot.get_fignums() == []
    width, height = figure.get_size_inches() * figure.dpi
    axes, low, high = figure.axes[0], *figure.axes[0].get_xlim()
    ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert ticks
    for text in [*ticks, *figure.legends[0].get_texts(), axes.xaxis.label]:
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= width + 1
        assert box.y0 >= -1
        assert box.y1 <= height + 1
    # The legend stands below everything else.
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 <= figure.axes[0].xaxis.label.get_window_extent().y0 + 1

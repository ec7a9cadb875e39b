"""Figures: labelled, readable with any font, and free of overlaps where names are many."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot

from reftlab.plotting import (
    axes_figure,
    directions_figure,
    drawable,
    edit_figure,
    message_figure,
    overview_figure,
    removal_figure,
    replies_figure,
    sizes_figure,
    tokens_figure,
)

POINTS = np.random.default_rng(0).normal(size=(8, 2))


def drawn(figure):
    figure.canvas.draw()
    return figure


def every_figure():
    bars = [("edit", "", 1.0), ("direction", "1", 0.9), ("random", "1", 0.1)]
    return {
        "directions": directions_figure("e", ["1", "constant"], [2.0, 0.0], [1.0, 0.5], [0.1, 0.0]),
        "tokens": tokens_figure("e", ["1"], [([("🌊", 1.0), ("$x_1$", 0.5)], [("␣no", -1.0)])]),
        "sizes": sizes_figure("e", [0, 1], [0.5, 0.7], [0.9, 0.8]),
        "axes": axes_figure("e", POINTS, POINTS + 1, [0.7, 0.2]),
        "removal": removal_figure({"e": 1.0, "f": 0.2}, {"e": [("1", 0.9)]}, {"e": [0.1, 0.2]}),
        "replies": replies_figure([("prompt 🌊", "$no$", "☃" * 80)]),
        "edit": edit_figure("e", (["1"], [1.0], [0.2]), (POINTS, POINTS + 1, [0.7, 0.2]), bars),
        "overview": overview_figure([("e", 3, 0.5, (0.4, 0.6), 1.0), ("f", 9, 0.2, (0.1, 0.3), None)]),
        "message": message_figure("Tokens", "there are none"),
    }


@pytest.mark.parametrize("name", list(every_figure()))
def test_every_figure_draws_without_a_warning_and_without_pyplot(name, recwarn):
    figure = drawn(every_figure()[name])
    assert not [warning for warning in recwarn if "missing from" in str(warning.message)]
    assert pyplot.get_fignums() == []
    assert figure.get_size_inches().max() < 20


@pytest.mark.parametrize("name", ["directions", "sizes", "axes", "edit", "overview"])
def test_every_axis_says_what_it_shows(name):
    for axes in drawn(every_figure()[name]).axes:
        assert axes.get_ylabel()
        assert axes.get_title(loc="left")


@pytest.mark.parametrize("count", [1, 5, 30, 120])
def test_names_on_the_depth_axis_do_not_meet(count):
    edits = [(f"emoji[{n}]", n, 0.5, (0.4, 0.6), 0.1) for n in range(count)]
    same_block = [(f"a_long_name_{n}", 3, 0.5, (0.4, 0.6), 0.1) for n in range(count)]
    for some in (edits, same_block):
        figure = drawn(overview_figure(some))
        for axes in figure.axes:
            labels = axes.get_xticklabels()
            boxes = [label.get_window_extent() for label in labels]
            if labels[0].get_rotation() == 0:
                assert all(one.x1 < two.x0 for one, two in pairwise(boxes))
            else:
                # Turned by 45°, names are apart when their ends are further apart than a line is high.
                ends = [box.x1 for box in boxes]
                height = labels[0].get_fontsize() * figure.dpi / 72
                assert all(two - one > height for one, two in pairwise(ends))


def test_characters_that_the_font_lacks_are_named():
    assert drawable("the 🌊 is blue") == "the :water wave: is blue"
    assert drawable("❤️") == "❤"
    assert drawable("☃") == "☃"
    assert drawable("\U000f0000") == "‹U+F0000›"


def test_a_dollar_does_not_begin_a_formula():
    assert drawable("$5") == r"\$5"


def test_long_text_is_cut_between_characters():
    assert drawable("🌊🌊🌊", 14) == ":water wave:…"
    assert drawable("abcdef", 3) == "abc…"


def test_points_before_and_after_are_drawn_where_they_are():
    figure = axes_figure("e", POINTS, POINTS + 1, [0.7, 0.2])
    before, after = figure.axes[0].collections
    np.testing.assert_allclose(before.get_offsets(), POINTS)
    np.testing.assert_allclose(after.get_offsets(), POINTS + 1)
    assert "70%" in figure.axes[0].get_xlabel()


def test_an_axis_with_next_to_no_variance_is_not_stretched():
    flat = np.stack([np.full(8, -7.0), np.linspace(-0.1, 0.1, 8)], axis=1)
    (axes,) = axes_figure("e", flat, flat + np.array([14, 0]), [0.999, 0.001]).axes
    low, high = axes.get_ylim()
    assert high - low > 7
    assert "under 1%" in axes.get_ylabel()


def test_the_band_says_how_many_random_directions_it_spans_and_of_which_span():
    removed = [("edit", "", 1.0), ("direction", "1", 0.9), *(("random", str(n), 0.1 * n) for n in range(3))]
    figure = edit_figure("e", (["1"], [1.0], [0.2]), (POINTS, POINTS + 1, [0.7, 0.2]), removed)
    (label,) = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert " ".join(label.split()) == "mean and range of 3 random directions within the same span"

"""Loss and interference: each number drawn once, and ticks that can be read."""

import pytest

from reftlab.plotting import interference_figure, loss_figure


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def marks(axes, marker):
    """Rows at which the marks of one kind stand."""
    return [
        line.get_ydata()[0] for line in axes.lines if line.get_marker() == marker and len(line.get_xdata())
    ]


def test_the_interaction_of_a_pair_is_drawn_once_on_a_line_of_its_own():
    places = [
        ("a, b [1]", [30.0, 80.0], 0.36, 0.36),
        ("a, b [2]", [40.0], 0.2, 0.36),
        ("a, c [1]", [50.0], 0.1, 0.5),
    ]
    figure = interference_figure(places)
    left, right = figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["a, b [1]", "a, b [2]", "interaction, all places", "a, c [1]", "interaction, all places"]
    assert marks(right, "s") == [2, 4]
    assert marks(right, "D") == [0, 1, 3]


def test_a_pair_without_a_shared_place_has_one_line():
    left, right = interference_figure([("a, b", (), None, 0.25)]).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a, b"]
    assert marks(right, "s") == [0]


@pytest.mark.parametrize(
    ("losses", "shown"), [([4.0, 1.2], ["1.5", "2", "3", "4"]), ([3.0, 0.002], ["0.01", "0.1", "1"])]
)
def test_ticks_of_the_loss_are_plain_numbers(losses, shown):
    figure = loss_figure([1, 2], losses)
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    assert [text for text in labels(axis) if low <= float(text) <= high] == shown

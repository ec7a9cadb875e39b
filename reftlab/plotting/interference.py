"""The figure of how much edits interfere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from matplotlib.figure import Figure

from reftlab.plotting.style import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    drawable,
    empty_figure,
    frame,
    message_figure,
)

__all__ = ["interference_figure"]

_TOGETHER = "interaction, all places"

Line = tuple[str, Sequence[float], float | None, float | None]


def interference_figure(lines: Sequence[Line]) -> Figure:
    """Draw, for each pair of edits and shared place, angles on the left and measures on the right.

    The interaction is one number a pair, so it stands once, on a line of its own under the pair's places.

    Args:
        lines: name, principal angles in degrees, commutator and interaction of each.
    """
    if not lines:
        return message_figure("Interference", "there are no two edits")
    rows = _rows(lines)
    figure = empty_figure(8.5, 1.6 + 0.32 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (name, angles, commutator, interaction) in enumerate(rows):
        left.plot(angles, [place] * len(angles), "o", color=BLUE, markersize=6, alpha=0.8)
        if not angles and name != _TOGETHER:
            left.text(
                45, place, "no shared subspace to compare", fontsize=7, color=GREY, ha="center", va="center"
            )
        if commutator is not None:
            right.plot([commutator], [place], "D", color=VERMILLION, markersize=6)
        if interaction is not None:
            right.plot([interaction], [place], "s", color=ORANGE, markersize=6)
    left.set_yticks(range(len(rows)), [drawable(name, 34) for name, *_ in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlim(-3, 93)
    left.set_xticks([0, 30, 60, 90])
    largest = max([1.0, *(v for _, _, c, i in rows for v in (c, i) if v is not None)])
    right.set_xlim(-0.03 * largest, 1.05 * largest)
    frame(left, x="principal angle (degrees): 0 shared, 90 apart", title="What they write")
    frame(right, x="share of the edits' own effects: 0 none", title="What they do to each other")
    right.plot([], [], "D", color=VERMILLION, label="commutator: does the order matter")
    right.plot([], [], "s", color=ORANGE, label="interaction: logits together − sum of both")
    # Below the axes, where no mark can be.
    figure.legend(
        *right.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower right", ncols=2
    )
    return figure


def _rows(lines: Sequence[Line]) -> list[Line]:
    """The lines with the interaction of each pair that shares places moved to a line of its own."""
    rows: list[Line] = []
    for interaction, of_pair in groupby(lines, key=lambda line: line[3]):
        places = list(of_pair)
        if interaction is None or not any(
            angles or commutator is not None for _, angles, commutator, _ in places
        ):
            rows += places
            continue
        rows += [(name, angles, commutator, None) for name, angles, commutator, _ in places]
        rows.append((_TOGETHER, (), None, interaction))
    return rows

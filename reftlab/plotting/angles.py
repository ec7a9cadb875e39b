"""Figures of angles between subspaces, over those of random ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

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

__all__ = ["angles_figure", "spectrum_figure"]

_LEVEL = 0.05
_FOUND, _CLOSE, _CHANCE = ("D", VERMILLION, VERMILLION), ("o", BLUE, BLUE), ("o", BLUE, "white")

Comparison = tuple[str, str, Sequence[float], tuple[float, float], float, float]


def spectrum_figure(angles: Sequence[float], band: Sequence[tuple[float, float, float]], null: str) -> Figure:
    """Principal angles in order, over the band that holds 95% of each at random.

    Args:
        angles: in degrees, ascending.
        band: low end, median and high end of each at random, in degrees.
        null: what is random, in words.
    """
    figure = empty_figure(4.6, 3.4)
    axes = figure.subplots()
    places = range(1, len(angles) + 1)
    low, middle, high = zip(*band, strict=True)
    # A band of one angle has no width of its own, so each end is drawn half a place out.
    edges = [places[0] - 0.4, *places, places[-1] + 0.4]
    axes.fill_between(
        edges, [low[0], *low, low[-1]], [high[0], *high, high[-1]], color=ORANGE, alpha=0.3, linewidth=0,
        label="95% of random subspaces",
    )  # fmt: skip
    axes.plot(
        edges, [middle[0], *middle, middle[-1]], "--", color=ORANGE, linewidth=1.5, label="their median"
    )
    axes.plot(places, angles, "o-", color=BLUE, markersize=6, label="found")
    axes.set_ylim(-3, 93)
    axes.set_yticks([0, 30, 60, 90])
    axes.set_xticks(list(places))
    frame(axes, x="number of the angle", y="principal angle (degrees)", title="0 shared, 90 apart")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3, title=f"at random: {null}",
                  title_fontsize=7)  # fmt: skip
    return figure


def angles_figure(comparisons: Sequence[Comparison], of: int | None = None) -> Figure:
    """Draw a line a comparison: all angles as dots, and where the smallest one lies at random as a bar.

    Args:
        comparisons: panel, name, angles in degrees ascending, the ends of the band of the smallest angle at
            random, p and q; those of one panel one after the other.
        of: how many comparisons there were, where only the closest are drawn.
    """
    if not comparisons:
        return message_figure("Angles", "there are no subspaces to compare")
    panels = [(name, list(lines)) for name, lines in groupby(comparisons, key=lambda line: line[0])]
    counts = [len(lines) for _, lines in panels]
    figure = empty_figure(8.0, 1.1 + 0.24 * sum(counts) + 0.42 * len(panels))
    grid = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, height_ratios=[c + 0.5 for c in counts]
    )
    for (name, lines), axes in zip(panels, grid[:, 0], strict=True):
        for place, (_, _, angles, (low, high), p, q) in enumerate(lines):
            axes.barh(place, high - low, left=low, height=0.62, color=ORANGE, alpha=0.35, linewidth=0)
            axes.plot(angles[1:], [place] * (len(angles) - 1), ".", color=GREY, markersize=4)
            marker, colour, fill = _FOUND if q <= _LEVEL else _CLOSE if p <= _LEVEL else _CHANCE
            axes.plot(angles[:1], [place], marker, color=colour, markerfacecolor=fill, markersize=6)
        axes.set_yticks(range(len(lines)), [drawable(line[1], 52) for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlim(-2, 92)
        axes.set_xticks([0, 30, 60, 90])
        frame(axes, title=drawable(name, 60), grid="x")
    if of is not None and of > len(comparisons):
        title = f"The {len(comparisons)} comparisons of the smallest p-values, of {of}"
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid[-1, 0].set_xlabel("principal angle (degrees): 0 shared, 90 apart", fontsize=9)
    _key(figure)
    return figure


def _key(figure: Figure) -> None:
    words = ("q ≤ 0.05", "p ≤ 0.05, but not among so many comparisons", "no closer than chance")
    shown: list[Line2D | Patch] = [
        Line2D([], [], marker=m, color=c, markerfacecolor=f, linestyle="", label=f"smallest angle: {word}")
        for (m, c, f), word in zip((_FOUND, _CLOSE, _CHANCE), words, strict=True)
    ]
    shown += [
        Line2D([], [], marker=".", color=GREY, linestyle="", label="further angles"),
        Patch(color=ORANGE, alpha=0.35, linewidth=0, label="95% of the smallest angles at random"),
    ]
    figure.legend(handles=shown, fontsize=8, frameon=False, loc="outside lower center", ncols=2)

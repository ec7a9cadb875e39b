"""The figure of what explanations keep of an effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from reftlab.plotting.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    drawable,
    empty_figure,
    frame,
    message_figure,
)

__all__ = ["faithfulness_figure"]

Line = tuple[str, int, tuple[float, float, float], str, Sequence[float]]

_OTHER = "length"
"""Kind of the controls that are no explanation of the same form."""
_FILLED: dict[str, Any] = {"facecolor": "#C9C9C9", "edgecolor": "none"}
_OUTLINE: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "linewidth": 1.0, "linestyle": "--"}

_CURVES = {"directions": (BLUE, "o-", -1), "reading": (ORANGE, "s--", 1)}
_NAMES = {
    "constant": "constant:\nthe mean\nchange",
    "mean per position": "a mean\nfor each\nposition",
    "steering": "steering\nvector",
    "norm-matched steering": "norm-\nmatched\nsteering",
    "linearised": "linear\nform\nM h + c",
}
_CURVE_NAMES = {
    "directions": "only what is written along k directions",
    "reading": "the mean, and what follows the input along k directions",
}


def faithfulness_figure(lines: Sequence[Line], title: str, enough: float) -> Figure:
    """Draw the share that explanations keep: by number of directions, and of the others one by one.

    Args:
        lines: kind, number of directions, share with the ends of its interval, kind of its random
            controls, and the shares that these keep.
        title: what was explained.
        enough: the share that counts as enough.
    """
    single = [line for line in lines if line[0] not in _CURVES]
    curves = {what: sorted(line for line in lines if line[0] == what) for what in _CURVES}
    if not any(not math.isnan(line[2][0]) for line in lines):
        return message_figure(title, "there are no shares to draw")
    figure = empty_figure(9.4, 4.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
    for what, points in curves.items():
        _curve(left, points, *_CURVES[what])
    for place, line in enumerate(single):
        _controls(right, place, line[3:], 0.3)
        _point(right, place, line[2], BLUE, "D")
    right.set_xticks(range(len(single)), [_NAMES[line[0]] for line in single])
    right.set_xlim(-0.6, len(single) - 0.4)
    for axes in (left, right):
        for level, style in ((0.0, "-"), (enough, ":"), (1.0, "-")):
            axes.axhline(level, color=GREY, linewidth=0.9, linestyle=style, zorder=0)
    # Points at the whole effect stay clear of the frame and of the title.
    low, high = left.get_ylim()
    left.set_ylim(min(low, -0.08), max(high, 1.12))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    frame(left, x="k, number of directions", y="share of the effect kept\n(0 as without edits, 1 as with)",
          title="A few directions in the edits' place")  # fmt: skip
    frame(right, title="One form for all inputs in the edits' place")
    right.tick_params(axis="x", labelsize=7.5)
    figure.suptitle(drawable(title), fontsize=11, x=0.01, ha="left")
    handles, labels = _legend(curves, single, enough)
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower left", ncols=2)
    return figure


def _curve(axes: Axes, points: Sequence[Line], colour: str, look: str, side: int) -> None:
    if not points:
        return
    places = [k + 0.09 * side for _, k, *_ in points]
    # Dashes over a whole line let both be seen where the shares are the same.
    axes.plot(places, [line[2][0] for line in points], look[1:], color=colour, linewidth=1.6)
    for place, line in zip(places, points, strict=True):
        _point(axes, place, line[2], colour, look[0])
        _controls(axes, place, line[3:], 0.07)


def _point(axes: Axes, place: float, share: tuple[float, float, float], colour: str, mark: str) -> None:
    value, low, high = share
    if not math.isnan(low):
        axes.plot([place, place], [low, high], "-", color=colour, linewidth=2.2, alpha=0.9, zorder=3)
    axes.plot([place], [value], mark, color=colour, markersize=6, markeredgecolor="white", zorder=4)


def _controls(axes: Axes, place: float, control: tuple[str, Sequence[float]], half: float) -> None:
    """The range of the random controls as a grey bar, or an outline for another form, with their mean."""
    kind, drawn = control
    held = [value for value in drawn if not math.isnan(value)]
    if not held:
        return
    low, high = min(held), max(held)
    look = _OUTLINE if kind == _OTHER else _FILLED
    axes.add_patch(Rectangle((place - half, low), 2 * half, high - low, zorder=1, **look))
    axes.update_datalim([(place - half, low), (place + half, high)])
    middle = sum(held) / len(held)
    axes.plot([place - half, place + half], [middle, middle], "-", color=BLACK, linewidth=1.2, zorder=2)


def _legend(
    curves: dict[str, list[Line]], single: Sequence[Line], enough: float
) -> tuple[list[Line2D | Patch], list[str]]:
    handles: list[Line2D | Patch] = []
    labels: list[str] = []
    for what, points in curves.items():
        if points:
            colour, look, _ = _CURVES[what]
            handles.append(Line2D([], [], color=colour, marker=look[0], linestyle=look[1:], markersize=6))
            labels.append(_CURVE_NAMES[what])
    if single:
        handles.append(Line2D([], [], color=BLUE, marker="D", markersize=6, linestyle=""))
        labels.append("other explanations (bars: 95% intervals)")
    every = (*single, *(one for points in curves.values() for one in points))
    kinds = {line[3] for line in every if line[4]}
    if kinds - {_OTHER}:
        handles.append(Patch(**_FILLED))
        labels.append("random explanations of the same form: range, and mean")
    if _OTHER in kinds:
        handles.append(Patch(**_OUTLINE))
        labels.append("a random direction at the length of each change: range, and mean")
    handles.append(Line2D([], [], color=GREY, linestyle=":"))
    labels.append(f"enough: {enough:g}")
    return handles, labels

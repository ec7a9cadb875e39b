"""The figure of what drives an edit's read directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reftlab.plotting.style import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    drawable,
    empty_figure,
    frame,
    message_figure,
)
from reftlab.plotting.wording import number

__all__ = ["contexts_figure"]

_MOST_DIRECTIONS, _MOST_TOKENS = 4, 12
_LEVEL = 0.05

_BAND: dict[str, Any] = {"color": ORANGE, "alpha": 0.4, "linewidth": 0}
_MEDIAN: dict[str, Any] = {"color": ORANGE, "linewidth": 1.5}
_SPECIAL: dict[str, Any] = {"marker": "D", "color": VERMILLION, "markersize": 7, "linestyle": "none"}
_USUAL: dict[str, Any] = {"marker": "o", "color": BLUE, "markersize": 7, "linestyle": "none"}

_TITLES = {
    "variance": ("how much it varies:\nshare of the variance", ".2%"),
    "kurtosis": ("few tokens carry it:\nexcess kurtosis", ".2f"),
    "largest": ("farthest token:\nlargest |z|", ".1f"),
}

Tokens = Sequence[tuple[str, float, int]]
Controls = Sequence[tuple[str, float, tuple[float, float, float], float]]


def contexts_figure(edit: str, directions: Sequence[tuple[str, Tokens, Controls]]) -> Figure:
    """Draw the tokens that read directions find most and least at, and the directions beside random ones.

    Args:
        edit: key of the edit.
        directions: label, tokens from largest to smallest with their mean z-score and number of places, and
            measure, value, quantiles (low, median, high) of random directions and p; four are drawn.
    """
    if not directions:
        return message_figure(edit, "this edit reads nothing")
    shown = directions[:_MOST_DIRECTIONS]
    heights = [0.2 * max(6, min(_MOST_TOKENS, len(tokens))) for _, tokens, _ in shown]
    across = max(len(controls) for *_, controls in shown)
    figure = empty_figure(9.5, 1.0 + sum(heights) + 0.85 * len(shown))
    grid = figure.subplots(
        len(shown), 1 + across, squeeze=False, width_ratios=[3.0, *[1] * across], height_ratios=heights
    )
    for (label, tokens, controls), row in zip(shown, grid, strict=True):
        _tokens(row[0], label, tokens)
        for axes, control in zip(row[1:], controls, strict=False):
            _control(axes, *control)
        for axes in row[1 + len(controls) :]:
            axes.set_axis_off()
    grid[-1, 0].set_xlabel("mean of v · h at the token, in standard deviations", fontsize=9)
    left = f" (the first {len(shown)} of {len(directions)})" if len(directions) > len(shown) else ""
    title = drawable(f"{edit}: what its read directions find{left}", 110)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _key(figure)
    return figure


def _tokens(axes: Axes, label: str, tokens: Tokens) -> None:
    half = _MOST_TOKENS // 2
    some = list(tokens) if len(tokens) <= _MOST_TOKENS else [*tokens[:half], *tokens[-half:]]
    means = [mean for _, mean, _ in some]
    axes.barh(range(len(some)), means, color=[BLUE if mean > 0 else SKY for mean in means], height=0.7)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(some)), [drawable(f"{text} ×{count}", 24) for text, _, count in some])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    frame(axes, title=f"Direction {label}: tokens, × how often they occur", grid="x")


def _control(axes: Axes, measure: str, value: float, random: tuple[float, float, float], p: float) -> None:
    name, form = _TITLES[measure]
    low, middle, high = random
    axes.bar(0, high - low, bottom=low, width=0.7, **_BAND)
    axes.plot([-0.35, 0.35], [middle, middle], **_MEDIAN)
    axes.plot([0], [value], **(_SPECIAL if p <= _LEVEL else _USUAL))
    ends = np.array([low, high, value])
    room = max(float(np.ptp(ends)), 1e-9)
    axes.set_ylim(float(ends.min()) - 0.15 * room, float(ends.max()) + 0.3 * room)
    axes.annotate(
        number(value, form), (0, value), (0, 7), textcoords="offset points", ha="center", fontsize=8
    )
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if measure == "variance":
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    axes.set_xlim(-0.8, 0.8)
    axes.set_xticks([])
    frame(axes, x=f"p {p:.2g}", title=name)
    axes.title.set_fontsize(8.5)


def _key(figure: Figure) -> None:
    shown: list[Line2D | Patch] = [
        Patch(**_BAND, label="95% of random directions"),
        Line2D([], [], **_MEDIAN, label="their median"),
        Line2D([], [], **_SPECIAL, label=f"this direction, p ≤ {_LEVEL:g}"),
        Line2D([], [], **_USUAL, label="this direction, as random ones"),
    ]
    figure.legend(handles=shown, fontsize=8, frameon=False, loc="outside lower right", ncols=4)

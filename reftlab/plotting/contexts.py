"""The figure of what drives an edit's read directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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

__all__ = ["contexts_figure"]

_MOST_DIRECTIONS, _MOST_TOKENS = 4, 12

_TITLES = {
    "variance": ("share of variance", "{:.1%}"),
    "kurtosis": ("excess kurtosis", "{:.2f}"),
    "largest": ("largest |z|", "{:.1f}"),
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
    counts = [min(_MOST_TOKENS, len(tokens)) for _, tokens, _ in shown]
    figure = empty_figure(9.0, 0.9 + sum(0.7 + 0.2 * max(6, count) for count in counts))
    parts = figure.subfigures(
        len(shown), 1, squeeze=False, height_ratios=[0.7 + 0.2 * max(6, c) for c in counts]
    )
    for (label, tokens, controls), part in zip(shown, parts[:, 0], strict=True):
        grid = part.subplots(1, 1 + len(controls), width_ratios=[3.2, *[1] * len(controls)], squeeze=False)[0]
        _tokens(grid[0], label, tokens)
        for axes, control in zip(grid[1:], controls, strict=True):
            _control(axes, *control)
    figure.suptitle(
        drawable(f"{edit}: what its read directions find; bars in orange: 95% of random directions", 110),
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
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
    frame(axes, x="mean of v · h where it stands (standard deviations)", title=f"Direction {label}: tokens",
          grid="x")  # fmt: skip


def _control(axes: Axes, measure: str, value: float, random: tuple[float, float, float], p: float) -> None:
    name, form = _TITLES[measure]
    low, middle, high = random
    axes.bar(0, high - low, bottom=low, width=0.7, color=ORANGE, alpha=0.4, linewidth=0)
    axes.plot([-0.35, 0.35], [middle, middle], color=ORANGE, linewidth=1.5)
    special = p <= 0.05
    axes.plot([0], [value], "D" if special else "o", color=VERMILLION if special else BLUE, markersize=7)
    ends = np.array([low, high, value])
    room = max(float(np.ptp(ends)), 1e-9)
    axes.set_ylim(float(ends.min()) - 0.15 * room, float(ends.max()) + 0.3 * room)
    axes.annotate(
        form.format(value).replace("-", "−"),
        (0, value),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    if measure == "variance":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlim(-0.8, 0.8)
    axes.set_xticks([])
    frame(axes, x=f"p {p:.2g}", title=name)
    axes.title.set_fontsize(9)

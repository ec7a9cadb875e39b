"""The figure of interchange accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reftlab.plotting.style import BLUE, GREY, drawable, empty_figure, frame

__all__ = ["interchange_figure"]

Interval = tuple[float, float, float]
"""A value and the ends of its interval, NaN where there is none."""


def interchange_figure(
    accuracies: Sequence[tuple[str, Interval]],
    removed: Sequence[tuple[str, Interval]],
    match: str,
    examples: int,
) -> Figure:
    """Draw the accuracy of each way of swapping, and beside it that without each direction.

    Args:
        accuracies: by way of swapping; the first is the learned one.
        removed: by the direction left out; may be empty.
        match: what counts as right, in words.
        examples: their number.
    """
    across = 2 if removed else 1
    height = 1.4 + 0.3 * max(len(accuracies), len(removed), 3)
    figure = empty_figure(4.6 * across, min(height, 12.0))
    axes = figure.subplots(1, across, squeeze=False)[0]
    _draw(axes[0], accuracies, "What is swapped")
    if removed:
        _draw(axes[1], removed, "The learned subspace without direction …")
        # The learned subspace itself, to compare with.
        axes[1].axvline(accuracies[0][1][0], color=GREY, linewidth=1.0, linestyle="--")
    title = f"Interchange accuracy: {match}; n = {examples}, 95% intervals"
    figure.suptitle(drawable(title), fontsize=10, x=0.01, ha="left")
    return figure


def _draw(axes: Any, lines: Sequence[tuple[str, Interval]], title: str) -> None:
    for place, (_, (value, low, high)) in enumerate(lines):
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [place, place], color=BLUE, linewidth=1.6)
        axes.plot([value], [place], "o", color=BLUE, markersize=6)
    axes.set_yticks(range(len(lines)), [drawable(name, 30) for name, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    frame(axes, x="accuracy (share of examples)", title=title, grid="x")

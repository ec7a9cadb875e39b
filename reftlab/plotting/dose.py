"""Dose-response curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reftlab.plotting.style import BLACK, BLUE, GREY, SKY, drawable, empty_figure, frame, message_figure
from reftlab.plotting.wording import wrapped

__all__ = ["dose_figure"]

_MOST_EXAMPLES = 60

Curve = tuple[str, Sequence[float], Sequence[tuple[float, float, float]], Sequence[Sequence[float]]]
"""Label, scales, mean with its interval at each scale, and for each example its value at each scale."""


def dose_figure(curves: Sequence[Curve], name: str, unit: str, note: str = "") -> Figure:
    """Draw a behaviour against the scale of each edit, one panel a curve, on one vertical axis.

    Args:
        curves: what to draw.
        name, unit: what is measured.
        note: what was left out.
    """
    if not curves:
        return message_figure("Dose-response", "there are no curves")
    across = 2 if len(curves) == 4 else min(3, len(curves))
    down = -(-len(curves) // across)
    figure = empty_figure(1.0 + 3.2 * across + (1.2 if across == 1 else 0.0), 0.9 + 2.7 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for number, axes in enumerate(panels.flat):
        if number >= len(curves):
            axes.set_axis_off()
            continue
        _draw(axes, curves[number])
        below = number + across >= len(curves)
        frame(axes, x="scale of the edit" if below else "", title=drawable(curves[number][0], 34))
        if number % across == 0:
            measured = f"{name}\n({unit})" if unit else name
            axes.set_ylabel(wrapped(drawable(measured), 30), fontsize=9)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        loc="outside lower left",
        ncols=2,
    )
    if note:
        figure.suptitle(wrapped(drawable(note), 40 * across), fontsize=9, x=0.01, ha="left")
    return figure


def _draw(axes: Any, curve: Curve) -> None:
    _, scales, means, examples = curve
    middle, low, high = np.array(means, dtype=float).T
    axes.plot(scales, middle, "-o", color=BLUE, linewidth=1.8, markersize=4, label="mean")
    if np.isfinite(low).all():
        axes.fill_between(
            scales,
            low,
            high,
            color=SKY,
            alpha=0.45,
            linewidth=0,
            label="95% interval of the mean over examples",
        )
    for place, values in enumerate(examples[:_MOST_EXAMPLES]):
        label = "single examples" if place == 0 else None
        axes.plot(scales, values, color=GREY, linewidth=0.6, alpha=0.45, label=label, zorder=1.5)
    at = list(scales).index(1.0) if 1.0 in scales else None
    if at is not None:
        axes.plot([1.0], [middle[at]], "o", color="white", markeredgecolor=BLACK, markersize=8,
                  markeredgewidth=1.5, label="as it is: scale 1")  # fmt: skip
    for mark in (0.0, 1.0):
        if min(scales) <= mark <= max(scales):
            axes.axvline(mark, color=BLACK, linewidth=0.8, linestyle=":", zorder=0.5)

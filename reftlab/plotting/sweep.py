"""Heat maps of sweeps: blocks × tokens, layers × heads, senders × receivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from reftlab.plotting.style import BLUE, VERMILLION, drawable, empty_figure, message_figure

__all__ = ["HeatMap", "sweep_figure"]

_DIVERGING = LinearSegmentedColormap.from_list(
    "reftlab", ["#003B5C", BLUE, "#FFFFFF", VERMILLION, "#7A2E00"]
).with_extremes(bad="#D9D9D9")
_MOST_LABELS = 40


@dataclass(frozen=True)
class HeatMap:
    """One panel.

    Attributes:
        title: its title.
        values: `(row, column)`; NaN is drawn grey.
        rows, columns: labels of the rows, from the bottom up, and of the columns.
        y, x: what rows and columns are.
    """

    title: str
    values: Float[np.ndarray, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    y: str = "block"
    x: str = "token"


def sweep_figure(maps: Sequence[HeatMap], title: str, scale: str) -> Figure:
    """Draw heat maps side by side in one colour scale, whose middle, white, is 0.

    Args:
        maps: the panels.
        title: above all of them.
        scale: what the colours mean, with the unit.
    """
    held = [panel.values[np.isfinite(panel.values)] for panel in maps]
    if not maps or not sum(len(values) for values in held):
        return message_figure(title, "there are no numbers to draw")
    most = max(float(np.abs(values).max()) for values in held if len(values)) or 1.0
    across = 2 if len(maps) == 4 else min(len(maps), 3)
    down = -(-len(maps) // across)
    size = [_size(panel) for panel in maps]
    width = min(19.0, max(4.6, across * max(w for w, _ in size) + 1.0))
    height = min(19.0, down * max(h for _, h in size) + 0.7)
    figure = empty_figure(width, height)
    axes = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for number, axis in enumerate(axes.flat):
        if number >= len(maps):
            axis.set_axis_off()
            continue
        image = _draw(axis, maps[number], most, labelled=number % across == 0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=30)
    bar.set_label(_wrapped(drawable(scale), int(height * 12)), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    figure.suptitle(_wrapped(drawable(title), int(width * 13)), fontsize=10, x=0.01, ha="left")
    return figure


def _size(panel: HeatMap) -> tuple[float, float]:
    rows, columns = panel.values.shape
    labels = max((len(label) for label in panel.columns), default=1)
    return (
        1.1 + min(8.5, max(2.6, 0.24 * columns)),
        1.2 + min(8.0, max(1.2, 0.16 * rows)) + 0.07 * min(24, labels),
    )


def _draw(axes: Any, panel: HeatMap, most: float, labelled: bool) -> Any:
    image = axes.imshow(
        np.ma.masked_invalid(panel.values),
        cmap=_DIVERGING,
        norm=TwoSlopeNorm(0.0, -most, most),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(_wrapped(drawable(panel.title), 48), fontsize=9, loc="left")
    rows, columns = panel.values.shape
    axes.set_yticks(*_ticks(panel.rows, rows), fontsize=7)
    turned = max((len(label) for label in panel.columns), default=1) > 2
    axes.set_xticks(*_ticks(panel.columns, columns), fontsize=7, rotation=90 if turned else 0)
    if labelled:
        axes.set_ylabel(panel.y, fontsize=9)
    axes.set_xlabel(panel.x, fontsize=9)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=2, width=0.5)
    return image


def _ticks(labels: Sequence[str], count: int) -> tuple[list[int], list[str]]:
    """Places and texts, so many as can be read."""
    step = -(-count // _MOST_LABELS)
    if step == 1 and count > 16 and all(label.isdigit() for label in labels):
        step = 2
    places = list(range(0, count, step))
    return places, [drawable(_visible(labels[place]), 24) for place in places]


def _visible(label: str) -> str:
    """A token's spaces and line breaks, so that they can be seen."""
    return label.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(20, width)))

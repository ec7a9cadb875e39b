"""Heat maps of sweeps: blocks × tokens, layers × heads, senders × receivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from reftlab.plotting.parts import site_label
from reftlab.plotting.style import BLACK, DIVERGING, drawable, empty_figure, message_figure
from reftlab.plotting.wording import true_minus, wrapped

__all__ = ["HeatMap", "sweep_figure"]

_MOST_LABELS = 40
_FAINT, _MOST_MARKED = 0.05, 900
"""The share of the largest number below which a colour cannot be seen, and cells that have room for marks."""


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


def sweep_figure(maps: Sequence[HeatMap], title: str, scale: str, note: str = "") -> Figure:
    """Draw heat maps side by side in one colour scale, in which white is 0.

    Args:
        maps: the panels.
        title: above all of them.
        scale: what the colours mean, with the unit.
        note: below them.
    """
    held = [panel.values[np.isfinite(panel.values)] for panel in maps]
    if not maps or not sum(len(values) for values in held):
        return message_figure(title, "there are no numbers to draw")
    most = max(float(np.abs(values).max()) for values in held if len(values)) or 1.0
    low, high = (float(end([0.0, *(end(values) for values in held if len(values))])) for end in (min, max))
    # In grey print dark is dark, so that where both signs occur one of them is marked.
    signed = min(-low, high) > _FAINT * most and max(panel.values.size for panel in maps) <= _MOST_MARKED
    across = 2 if len(maps) == 4 else min(len(maps), 3)
    down = -(-len(maps) // across)
    size = [_size(panel) for panel in maps]
    width = min(19.0, max(4.6, across * max(w for w, _ in size) + 1.0))
    height = min(19.0, down * max(h for _, h in size) + 0.7 + (0.25 if note or signed else 0.0))
    figure = empty_figure(width, height)
    axes = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for number, axis in enumerate(axes.flat):
        if number >= len(maps):
            axis.set_axis_off()
            continue
        image = _draw(axis, maps[number], most, labelled=number % across == 0)
        if signed:
            _mark_negative(axis, maps[number].values, most)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=30)
    # Of the colours only those that occur: 0 is one end where all numbers have one sign.
    bar.ax.set_ylim(*((low, high) if low < high else (-most, most)))
    bar.set_label(wrapped(drawable(scale), max(20, int(height * 11))), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    shown = wrapped(drawable(true_minus(title)), int(width * 13))
    figure.suptitle(shown, fontsize=10, x=0.01, ha="left")
    note = "; ".join(part for part in ("− in a cell: below 0" if signed else "", note) if part)
    if note:
        # A legend without marks: a text that the layout makes room for.
        below = wrapped(drawable(note), int(width * 15))
        figure.legend([], [], title=below, title_fontsize=8, frameon=False, loc="outside lower left")
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
        cmap=DIVERGING,
        norm=TwoSlopeNorm(0.0, -most, most),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(wrapped(drawable(panel.title), 48), fontsize=9, loc="left")
    rows, columns = panel.values.shape
    axes.set_yticks(*_ticks([site_label(label) for label in panel.rows], rows), fontsize=7)
    longest = max((len(label) for label in panel.columns), default=1)
    turned = longest > 2 and columns * (longest + 1) > 40
    texts = [drawable(_visible(label), 24) for label in panel.columns]
    axes.set_xticks(*_ticks(texts, columns), fontsize=7, rotation=90 if turned else 0)
    if labelled:
        axes.set_ylabel(panel.y, fontsize=9)
    axes.set_xlabel(panel.x, fontsize=9)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=2, width=0.5)
    return image


def _mark_negative(axes: Any, values: Float[np.ndarray, "row column"], most: float) -> None:
    """A dash in each cell below 0 that is not as good as white."""
    rows, columns = np.nonzero(np.nan_to_num(values) < -_FAINT * most)
    light = np.where(values[rows, columns] < -0.42 * most, "white", BLACK)
    axes.scatter(columns, rows, s=14, marker="_", c=light, linewidths=0.9)


def _ticks(labels: Sequence[str], count: int) -> tuple[list[int], list[str]]:
    """Places and texts, so many as can be read."""
    step = -(-count // _MOST_LABELS)
    if step == 1 and count > 16 and all(label.isdigit() for label in labels):
        step = 2
    places = list(range(0, count, step))
    return places, [labels[place] for place in places]


def _visible(label: str) -> str:
    """A token's spaces at its ends and its line breaks, so that they can be seen."""
    inner = label.strip(" ")
    begin = len(label) - len(label.lstrip(" "))
    shown = "␣" * begin + inner + "␣" * (len(label) - begin - len(inner))
    return shown.replace("\n", "⏎").replace("\t", "⇥")

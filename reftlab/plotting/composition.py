"""The figure of edits together: the composition matrix, and the directions in which they collide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reftlab.plotting.style import BLACK, BLUE, DIVERGING, GREY, ORANGE, drawable, empty_figure, frame
from reftlab.plotting.wording import number, wrapped

__all__ = ["composition_figure"]

_MOST = 8
"""Collisions that are drawn."""
_SHORT = 6
"""Names of so many letters stand side by side."""

Cells = Mapping[tuple[str, str], tuple[float, bool]]
Line = tuple[str, str, str, tuple[float, float], tuple[float, float], Sequence[str]]


def composition_figure(names: Sequence[str], cells: Cells, lines: Sequence[Line], scale: str) -> Figure:
    """Draw what edits do alone, in pairs and in the other order, and where they collide.

    Args:
        names: of the edits or groups.
        cells: a value, and whether its interval leaves 0 out, by row and column: on the diagonal the effect
            of each alone, above it what two together do beyond the sum, below it what the other order
            changes.
        lines: of each collision the two edits, its kind, the mean and the typical amount that each writes,
            and the tokens that the direction promotes.
        scale: what the colours mean, with the unit.
    """
    labels = [drawable(name, 18) for name in names]
    longest = max(map(len, labels))
    matrix = min(7.0, len(names) * (0.9 if len(names) <= 3 else 0.7))
    side = max(2.4, matrix) + 0.07 * longest + 1.2
    shown = lines[:_MOST]
    height = max(matrix + 1.5 + (0.055 * longest if longest > _SHORT else 0.0), 1.5 + 0.6 * len(shown))
    figure = empty_figure(side + (5.2 if shown else 0.0), height)
    panels: Any = figure.subplots(1, 2, width_ratios=[side, 5.2]) if shown else [figure.subplots()]
    _matrix(figure, panels[0], names, cells, scale)
    if shown:
        _collisions(panels[1], shown, len(lines))
    return figure


def _matrix(figure: Figure, axes: Axes, names: Sequence[str], cells: Cells, scale: str) -> None:
    values = np.full((len(names), len(names)), np.nan)
    for (row, column), (value, _) in cells.items():
        values[names.index(row), names.index(column)] = value
    held = np.abs(values[np.isfinite(values)])
    most = float(held.max()) if held.size and held.max() > 0 else 1.0
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=DIVERGING, norm=TwoSlopeNorm(0.0, -most, most),
        interpolation="nearest",
    )  # fmt: skip
    decimals = min(9, max(0, 2 - int(np.floor(np.log10(most)))))
    size = 8.5 if len(names) <= 6 else 6.5
    for (row, column), (value, told) in cells.items():
        place = names.index(column), names.index(row)
        if not np.isfinite(value):
            continue
        dark = abs(value) > 0.42 * most
        shown = number(value, f"+.{decimals}f") if value else "0"
        axes.text(
            *place, f"{shown}{'*' if told else ''}", ha="center", va="center", fontsize=size,
            color="white" if dark else BLACK,
        )  # fmt: skip
        if row == column:
            corner = place[0] - 0.46, place[1] - 0.46
            edge = "white" if dark else BLACK
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=edge, linewidth=1.2))
    labels = [drawable(name, 18) for name in names]
    turned = max(map(len, labels)) > _SHORT
    axes.set_xticks(
        range(len(names)), labels, rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_yticks(range(len(names)), labels)
    frame(axes, title="framed: alone · above: together − sum\nbelow: other order − graph's order", grid="")
    axes.set_xlabel("* 95% interval leaves 0 out; grey: not measured,\nor no site in common", fontsize=8)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03)
    bar.set_label(wrapped(drawable(scale), 34), fontsize=8)
    bar.ax.tick_params(labelsize=7.5)


def _collisions(axes: Axes, lines: Sequence[Line], count: int) -> None:
    labels = []
    for place, (a, b, kind, mean, typical, tokens) in enumerate(lines):
        for edit, colour in enumerate((BLUE, ORANGE)):
            middle, at = mean[edit], place + 0.34 * edit - 0.17
            spread = max(0.0, typical[edit] ** 2 - middle**2) ** 0.5
            axes.barh([at], [middle], height=0.3, color=colour, edgecolor=BLACK, linewidth=0.5)
            axes.plot([middle - spread, middle + spread], [at, at], "-", color=BLACK, linewidth=1.2)
        also = f"\n→ {drawable(' '.join(tokens[:3]), 28)}" if tokens else ""
        labels.append(f"{drawable(a, 16)}, {drawable(b, 16)}: {kind}{also}")
    axes.set_yticks(range(len(lines)), labels)
    # A single collision is drawn no thicker than two are.
    edge = 0.5 if len(lines) > 1 else 1.0
    axes.set_ylim(len(lines) - 1 + edge, -edge)
    axes.axvline(0, color=GREY, linewidth=0.9)
    more = f" (the largest {len(lines)} of {count})" if count > len(lines) else ""
    frame(axes, x="mean amount along the direction (units of the site)", grid="x",
          title=f"Directions that two edits both write along{more}")  # fmt: skip
    axes.tick_params(axis="y", labelsize=7.5)
    axes.barh([0], [0], color=BLUE, label="the first edit named")
    axes.barh([0], [0], color=ORANGE, label="the second")
    axes.plot([], [], "-", color=BLACK, label="± standard deviation")
    figure: Any = axes.figure
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize=7.5, frameon=False, loc="outside lower right", ncols=3
    )

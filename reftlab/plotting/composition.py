"""The figure of edits together: the composition matrix, and the directions in which they collide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reftlab.plotting.style import BLACK, BLUE, GREY, ORANGE, VERMILLION, drawable, empty_figure, frame

__all__ = ["composition_figure"]

_DIVERGING = LinearSegmentedColormap.from_list(
    "reftlab", ["#003B5C", BLUE, "#FFFFFF", VERMILLION, "#7A2E00"]
).with_extremes(bad="#E4E4E4")
_MOST = 8
"""Collisions that are drawn."""

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
    side = min(9.0, 2.9 + 0.55 * len(names))
    shown = lines[:_MOST]
    height = max(side, 1.8 + 0.62 * len(shown))
    figure = empty_figure(side + 1.2 + (5.0 if shown else 0.0), height)
    panels: Any = figure.subplots(1, 2, width_ratios=[side, 5.0]) if shown else [figure.subplots()]
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
        np.ma.masked_invalid(values), cmap=_DIVERGING, norm=TwoSlopeNorm(0.0, -most, most),
        interpolation="nearest",
    )  # fmt: skip
    decimals = min(9, max(0, 2 - int(np.floor(np.log10(most)))))
    size = 8.5 if len(names) <= 6 else 6.5
    for (row, column), (value, told) in cells.items():
        place = names.index(column), names.index(row)
        if not np.isfinite(value):
            continue
        dark = abs(value) > 0.55 * most
        axes.text(
            *place, f"{value:+.{decimals}f}{'*' if told else ''}" if value else "0", ha="center", va="center",
            fontsize=size, color="white" if dark else BLACK,
        )  # fmt: skip
        if row == column:
            axes.add_patch(
                Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, fill=False, edgecolor=BLACK)
            )
    labels = [drawable(name, 18) for name in names]
    turned = max(map(len, labels)) > 4
    axes.set_xticks(
        range(len(names)), labels, rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_yticks(range(len(names)), labels)
    frame(axes, title="framed: alone · above: together − sum\nbelow: other order − graph's order", grid="")
    axes.set_xlabel("* 95% interval leaves 0 out; grey: not measured,\nor no site in common", fontsize=8)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03)
    bar.set_label(drawable(scale), fontsize=8)
    bar.ax.tick_params(labelsize=7.5)


def _collisions(axes: Axes, lines: Sequence[Line], count: int) -> None:
    labels = []
    for place, (a, b, kind, mean, typical, tokens) in enumerate(lines):
        for number, colour in enumerate((BLUE, ORANGE)):
            middle, at = mean[number], place + 0.34 * number - 0.17
            spread = max(0.0, typical[number] ** 2 - middle**2) ** 0.5
            axes.barh([at], [middle], height=0.3, color=colour, edgecolor=BLACK, linewidth=0.5)
            axes.plot([middle - spread, middle + spread], [at, at], "-", color=BLACK, linewidth=1.2)
        also = f"\n→ {drawable(' '.join(tokens[:3]), 28)}" if tokens else ""
        labels.append(f"{drawable(a, 16)}, {drawable(b, 16)}: {kind}{also}")
    axes.set_yticks(range(len(lines)), labels)
    axes.set_ylim(max(4, len(lines)) - 0.5, -0.5)
    axes.axvline(0, color=GREY, linewidth=0.9)
    more = f" (the largest {len(lines)} of {count})" if count > len(lines) else ""
    frame(axes, x="mean amount along the direction (units of the site)", grid="x",
          title=f"Directions that two edits both write along{more}")  # fmt: skip
    axes.tick_params(axis="y", labelsize=7.5)
    axes.barh([0], [0], color=BLUE, label="the first edit named")
    axes.barh([0], [0], color=ORANGE, label="the second")
    axes.plot([], [], "-", color=BLACK, label="± standard deviation")
    axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=3)

"""Probe maps: a heat map of sites × positions, and a line over depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from reftlab.plotting.parts import site_label
from reftlab.plotting.style import BLACK, BLUE, GREY, ORANGE, drawable, empty_figure, frame, message_figure
from reftlab.plotting.wording import number

__all__ = ["probe_line_figure", "probe_map_figure"]

# From white to dark, so that it reads in grey too.
_RISING = LinearSegmentedColormap.from_list(
    "reftlab-rising", ["#FFFFFF", "#9CCAE8", BLUE, "#00263D"]
).with_extremes(bad="#D9D9D9", under="#FFFFFF")
_MOST_LABELS = 32


def probe_map_figure(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    scale: str,
    significant: Bool[np.ndarray, "row column"] | None = None,
    baseline: float = float("nan"),
    baseline_name: str = "chance",
    y: str = "block",
    most: float = float("nan"),
    x: str = "position",
) -> Figure:
    """Draw a score for each site and position; white is no better than the baseline.

    Args:
        values: the score; NaN is drawn grey.
        rows, columns: labels of sites, from the bottom up, and of positions.
        title: above the map.
        scale: what the colours mean.
        significant: cells that get a dot.
        baseline: value of white; the smallest one where it is NaN.
        baseline_name: what the baseline is.
        y: what the rows are.
        most: value of the darkest colour; the largest one where it is NaN.
        x: what the columns are.
    """
    held = values[np.isfinite(values)]
    if not len(held):
        return message_figure(title, "there are no numbers to draw")
    low = float(held.min()) if np.isnan(baseline) else baseline
    high = max(float(held.max()) if np.isnan(most) else most, low + 1e-6)
    wide = max(4.8, 2.4 + 0.55 * len(columns))
    longest = max(len(label) for label in columns)
    tall = min(14.0, max(2.2, 1.3 + 0.2 * len(rows) + 0.05 * min(longest, 24)))
    figure = empty_figure(min(16.0, wide), tall)
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=_RISING, vmin=low, vmax=high, origin="lower", aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    step = -(-len(rows) // _MOST_LABELS)
    places = list(range(0, len(rows), step))
    axes.set_yticks(places, [site_label(rows[place], 40) for place in places], fontsize=8)
    turned = longest > 2 and longest * len(columns) > 40
    axes.set_xticks(
        range(len(columns)), [drawable(label, 24) for label in columns], fontsize=8,
        rotation=45 if turned else 0, ha="right" if turned else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=2, width=0.5)
    bar = figure.colorbar(
        image, ax=axes, pad=0.02, fraction=0.06, extend="min" if held.min() < low else "neither"
    )
    note = "" if np.isnan(baseline) else f"\nwhite: {baseline_name}, {number(baseline)}, or less"
    bar.set_label(scale + note, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    shown = drawable(title)
    if significant is not None:
        _dots(axes, values, significant, low, high)
        shown += (
            "\n● above chance, p ≤ 0.05 for the whole map"
            if significant.any()
            else ("\nno cell above chance at p ≤ 0.05 for the whole map")
        )
    figure.suptitle(shown, fontsize=9, x=0.01, ha="left")
    return figure


def probe_line_figure(
    names: Sequence[str],
    values: Float[np.ndarray, " site"],
    intervals: Float[np.ndarray, "site 2"] | None,
    baseline: float,
    baseline_name: str,
    control: Float[np.ndarray, " site"] | None,
    significant: Bool[np.ndarray, " site"] | None,
    title: str,
    scale: str,
    x: str = "block",
    level: float = 0.95,
) -> Figure:
    """Draw a score over sites, with its interval, the same probes on control labels, and chance.

    Args:
        names: labels of the sites.
        values: the score.
        intervals: lower and upper ends.
        baseline: what is drawn as a dotted line; NaN for none.
        baseline_name: what it is.
        control: the score on control labels.
        significant: sites with a filled mark, all others having an empty one.
        title: above.
        scale: what the score is.
        x: what the sites are.
        level: of the intervals.
    """
    if not np.isfinite(values).any():
        return message_figure(title, "there are no numbers to draw")
    long = max(len(name) for name in names)
    figure = empty_figure(min(14.0, max(5.6, 2.0 + 0.24 * len(names))), 3.9 + 0.05 * min(long, 30))
    axes = figure.subplots()
    places = np.arange(len(names))
    if intervals is not None and np.isfinite(intervals).any():
        axes.fill_between(
            places, intervals[:, 0], intervals[:, 1], color=BLUE, alpha=0.18, linewidth=0,
            label=f"{level:.0%} interval over groups",
        )  # fmt: skip
        if len(names) == 1:
            axes.vlines(places, intervals[:, 0], intervals[:, 1], color=BLUE, linewidth=1.2)
    axes.plot(places, values, color=BLUE, linewidth=1.4, zorder=3)
    filled = np.ones(len(names), dtype=bool) if significant is None else significant
    for mask, face, label in (
        (filled, BLUE, scale if significant is None else f"{scale}, p ≤ 0.05 for the whole line"),
        (~filled, "white", f"{scale}, p > 0.05"),
    ):
        if mask.any():
            axes.plot(
                places[mask], values[mask], "o", markersize=5, markerfacecolor=face, markeredgecolor=BLUE,
                label=label, zorder=4,
            )  # fmt: skip
    if control is not None:
        axes.plot(
            places, control, "s--", color=ORANGE, markersize=3.5, linewidth=1.1, label="on control labels"
        )
    if not np.isnan(baseline):
        axes.axhline(
            baseline, color=BLACK, linestyle=":", linewidth=1.1, label=f"{baseline_name}, {number(baseline)}"
        )
    step = -(-len(names) // _MOST_LABELS)
    shown = list(range(0, len(names), step))
    frame(axes, x=x, y=scale, grid="y")
    turned = long > 3
    axes.set_xticks(
        shown, [site_label(names[place], 30) for place in shown], fontsize=8,
        rotation=45 if turned else 0, ha="right" if turned else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_xlim(-0.6, len(names) - 0.4)
    figure.suptitle(drawable(title), fontsize=9, x=0.01, ha="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _dots(axes: object, values: np.ndarray, significant: np.ndarray, low: float, high: float) -> None:
    """A dot in each significant cell, dark on light and light on dark."""
    across, column = np.nonzero(significant)
    dark = values[across, column] > low + 0.45 * (high - low)
    axes.scatter(column, across, s=9, c=np.where(dark, "white", BLACK), edgecolors=GREY, linewidths=0.3)  # type: ignore[attr-defined]

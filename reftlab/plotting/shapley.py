"""What parts of edits are worth: bars of Shapley values, and of what leaving a part out changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from reftlab.plotting.style import (
    BLACK,
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
from reftlab.plotting.wording import number, wrapped

__all__ = ["leave_one_out_figure", "shapley_figure"]

_MOST_LABELS = 60
_BY = {"position": "edited token", "dimension": "direction of the edit"}

Panel = tuple[Sequence[tuple[float, ...]], Mapping[str, Sequence[float]], float]
"""Value and interval of each part, means for random directions by their kind, and the whole effect."""

_RANDOM = {
    "random in span": ("random direction of the edit's own span", ORANGE, "///"),
    "random in space": ("random direction of the whole space", GREY, "..."),
}


def shapley_figure(
    labels: Sequence[str],
    values: Float[np.ndarray, "part 3"],
    sampling: Float[np.ndarray, "part 2"] | None,
    left_out: Float[np.ndarray, " part"],
    *,
    by: str,
    whole: float,
    name: str,
    unit: str,
    note: str = "",
) -> Figure:
    """Draw a bar a part with its interval, and a mark for what leaving the part out undoes.

    Args:
        labels: of the parts, from the top down.
        values: Shapley value, and low and high end of its interval over the examples; NaN for none.
        sampling: ends of the interval over sampled orders, or None where values are exact.
        left_out: what each part changes when it comes last.
        by: what the parts are.
        whole: the effect of all parts, to which the values sum.
        name, unit: what is measured.
        note: what was sampled.
    """
    if not labels:
        return message_figure("Shapley values", "there are no parts")
    figure = empty_figure(7.0, _height(len(labels)))
    axes, places = figure.subplots(), np.arange(len(labels))
    axes.barh(places, values[:, 0], color=SKY, height=0.5, label="Shapley value")
    _intervals(axes, values, "95% interval over examples")
    if sampling is not None:
        axes.hlines(
            places + 0.34, sampling[:, 0], sampling[:, 1], color=ORANGE, linewidth=3,
            label="95% interval over sampled orders",
        )  # fmt: skip
    axes.plot(
        left_out, places, "D", color="none", markeredgecolor=VERMILLION, markersize=5.5, markeredgewidth=1.4,
        label="what is undone when it alone is left out",
    )  # fmt: skip
    axes.axvline(0, color=BLACK, linewidth=0.8)
    _roomy(axes)
    _rows(axes, labels, by)
    title = f"Shapley values: together {number(whole, '+.3g')} {unit}" + (f"\n{note}" if note else "")
    frame(axes, x=_change_of(name, unit), y=_BY.get(by, by), grid="x")
    axes.set_title(wrapped(drawable(title), 86), fontsize=10 if not note else 9, loc="left")
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2
    )
    return figure


def leave_one_out_figure(
    labels: Sequence[str], left_out: Panel, alone: Panel, by: str, name: str, unit: str
) -> Figure:
    """Draw the change with each part left out on the left, and with each part alone on the right.

    Args:
        labels: of the parts, from the top down.
        left_out: changes against all parts, and the change when all are left out.
        alone: changes against no part, and the change when all act.
        by: what the parts are.
        name, unit: what is measured.
    """
    if not labels:
        return message_figure("Leave one out", "there are no parts")
    random = any(panel[1] for panel in (left_out, alone))
    figure = empty_figure(9.0, _height(len(labels)) + 0.25 * random)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (lines, controls, whole), title in (
        (axes[0], left_out, "Left out, all others act"),
        (axes[1], alone, "Alone, no other acts"),
    ):
        values = np.array(lines, dtype=float).reshape(len(labels), 3)
        for kind, means in controls.items():
            text, colour, hatch = _RANDOM[kind]
            # A band of no width would not be seen.
            axis.axvspan(min(means), max(means), facecolor=colour, edgecolor=colour, alpha=0.35, hatch=hatch,
                         linewidth=1.2, zorder=0.5, label=f"range of {len(means)} draws: {text}")  # fmt: skip
        places = np.arange(len(labels))
        axis.barh(places, values[:, 0], color=BLUE, height=0.6, alpha=0.85, label="one part")
        _intervals(axis, values, "95% interval over examples")
        axis.axvline(whole, color=VERMILLION, linewidth=1.5, linestyle="--", label="all parts at once")
        axis.axvline(0, color=BLACK, linewidth=0.8)
        # A bar of next to no length is still seen by its end.
        axis.plot(values[:, 0], places, "o", color=BLUE, markeredgecolor="white", markersize=6, zorder=3)
        _roomy(axis)
        _small_values(axis, values)
        frame(axis, x=_change_of(name, unit), title=title, grid="x")
    _rows(axes[0], labels, by)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2
    )
    return figure


def _height(parts: int) -> float:
    return min(16.0, 1.9 + max(0.9, 0.3 * parts if parts <= 30 else 9.0 + 0.12 * (parts - 30)))


def _intervals(axes: Any, values: Float[np.ndarray, "part 3"], label: str) -> None:
    """Whiskers, where there are intervals."""
    have = np.isfinite(values).all(1)
    if have.any():
        places = np.flatnonzero(have)
        axes.hlines(places, values[have, 1], values[have, 2], color=BLACK, linewidth=1.3, label=label)
        for end in (1, 2):
            axes.plot(values[have, end], places, "|", color=BLACK, markersize=6)


def _small_values(axes: Any, values: Float[np.ndarray, "part 3"]) -> None:
    """The number beside each bar that is too short to be read."""
    low, high = axes.get_xlim()
    ends = np.where(np.isfinite(values), values, values[:, :1])
    for place, (value, *_) in enumerate(values):
        if abs(value) < 0.03 * (high - low):
            # On the side of 0 that has room.
            side = 1 if high > -low else -1
            at = max(ends[place].max(), 0.0) if side > 0 else min(ends[place].min(), 0.0)
            axes.annotate(
                number(value, "+.2g"), (at, place), (7 * side, 0), textcoords="offset points",
                fontsize=7.5, va="center", ha="left" if side > 0 else "right",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
            )  # fmt: skip


def _roomy(axes: Any) -> None:
    """Keep 0 off the frame where all bars go one way."""
    axes.use_sticky_edges = False
    axes.margins(x=0.05)
    axes.autoscale_view(scaley=False)


def _rows(axes: Any, labels: Sequence[str], by: str) -> None:
    step = -(-len(labels) // _MOST_LABELS)
    places = range(0, len(labels), step)
    size = 8 if len(labels) <= 30 else 6
    axes.set_yticks(list(places), [drawable(labels[place], 30) for place in places], fontsize=size)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(_BY.get(by, by), fontsize=9)


def _change_of(name: str, unit: str) -> str:
    return wrapped(drawable(f"change of {name} ({unit})" if unit else f"change of {name}"), 58)

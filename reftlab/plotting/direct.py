"""The figure of direct and total effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reftlab.plotting.style import BLUE, GREY, ORANGE, drawable, empty_figure, frame, message_figure
from reftlab.plotting.wording import true_minus, wrapped

__all__ = ["direct_figure"]

Interval = tuple[float, float, float]
"""A value and the ends of its interval, NaN where there is none."""
Effect = tuple[str, Interval, Interval, str]
"""An edit's name, its direct and its total effect, and its shares in words."""
Tokens = Sequence[tuple[str, float, float]]
"""Tokens with the direct and the total change of their logits."""

_MOST_EDITS, _MOST_TOKENS = 3, 16
_STACKED = 3
"""Up to so many edits lie above their tokens, which are more; more edits stand beside them."""
_TOTAL: dict[str, Any] = {"marker": "s", "color": ORANGE, "markersize": 5, "linestyle": "none"}
# Hollow, so that the other mark is seen where the two are equal.
_DIRECT: dict[str, Any] = {
    "marker": "o", "color": BLUE, "markerfacecolor": "none", "markeredgewidth": 1.6, "markersize": 8,
    "linestyle": "none",
}  # fmt: skip


def direct_figure(
    effects: Sequence[Effect],
    tokens: Mapping[str, Tokens],
    measured: str,
) -> Figure:
    """Draw each edit's direct and total effect, and beside them the tokens that they change most.

    Args:
        effects: name, direct and total effect of each edit, and the share in words.
        tokens: for each edit the tokens with their direct and total change, in logits; the edits with the
            largest total effect are shown.
        measured: what the effects are of, with its unit.
    """
    if not effects:
        return message_figure("Direct and total effects", "there are no edits")
    order = sorted(effects, key=lambda effect: -abs(effect[2][0]))
    shown = [name for name, *_ in order[:_MOST_EDITS] if tokens.get(name)]
    panels: list[tuple[str, Tokens]]
    panels = [(f"Tokens of {drawable(name, 20)}", _fewer(tokens[name])) for name in shown]
    if len(effects) == 1 and panels:
        panels = _raised_and_lowered(panels[0][1])
    most = max([len(some) for _, some in panels], default=0)
    if len(effects) <= _STACKED and panels:
        heights = [0.7 * len(effects) + 0.2, 0.22 * most + 0.2]
        figure = empty_figure(max(7.2, 3.0 * len(panels)), sum(heights) + 1.9)
        grid = figure.add_gridspec(2, len(panels), height_ratios=heights)
        axes = [figure.add_subplot(grid[0, :])]
        axes += [figure.add_subplot(grid[1, number]) for number in range(len(panels))]
    else:
        height = max(1.6 + 0.55 * len(effects), 1.4 + 0.26 * most)
        figure = empty_figure(4.6 + 2.9 * len(panels), min(height, 12.0))
        ratios = [1.5, *[1.0] * len(panels)]
        axes = list(figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0])
    _draw_effects(axes[0], effects, measured)
    for axis, (title, some) in zip(axes[1:], panels, strict=True):
        _draw_tokens(axis, title, some)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2
    )
    return figure


def _raised_and_lowered(tokens: Tokens) -> list[tuple[str, Tokens]]:
    """The tokens of a single edit in two panels, of which an empty one is left out."""
    parts = (
        ("Tokens that it raises", [token for token in tokens if token[2] >= 0]),
        ("Tokens that it lowers", [token for token in tokens if token[2] < 0]),
    )
    return [part for part in parts if part[1]]


def _draw_effects(axes: Any, effects: Sequence[Effect], measured: str) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8)
    for place, (_, direct, total, _) in enumerate(effects):
        for (value, low, high), shift, form in ((total, 0.13, _TOTAL), (direct, -0.13, _DIRECT)):
            if np.isfinite([low, high]).all():
                axes.plot([low, high], [place + shift] * 2, color=form["color"], linewidth=1.4)
            axes.plot([value], [place + shift], **form)
    axes.plot([], [], **_DIRECT, label="direct: by the residual stream alone")
    axes.plot([], [], **_TOTAL, label="total")
    names = [f"{drawable(effect[0], 24)}\n{true_minus(effect[3])}" for effect in effects]
    axes.set_yticks(range(len(effects)), names)
    axes.set_ylim(len(effects) - 0.5, -0.5)
    frame(axes, x=wrapped(drawable(measured), 60), title="Effect, with 95% interval", grid="x")


def _draw_tokens(axes: Any, title: str, tokens: Tokens) -> None:
    places = np.arange(len(tokens))
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.hlines(places, [d for _, d, _ in tokens], [t for *_, t in tokens], color=GREY, linewidth=0.8)
    axes.plot([t for *_, t in tokens], places, **_TOTAL)
    axes.plot([d for _, d, _ in tokens], places, **_DIRECT)
    axes.set_yticks(places, [drawable(text, 16) for text, *_ in tokens])
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    frame(axes, x="change of the logit", title=title, grid="x")


def _fewer(tokens: Tokens) -> Tokens:
    """Those that change most, in the order in which they came."""
    strongest = sorted(tokens, key=lambda token: -max(abs(token[1]), abs(token[2])))[:_MOST_TOKENS]
    return [token for token in tokens if token in strongest]

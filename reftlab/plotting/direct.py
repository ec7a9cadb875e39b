"""The figure of direct and total effects."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reftlab.plotting.style import BLUE, GREY, ORANGE, drawable, empty_figure, frame, message_figure

__all__ = ["direct_figure"]

Interval = tuple[float, float, float]
"""A value and the ends of its interval, NaN where there is none."""
Effect = tuple[str, Interval, Interval, str]
"""An edit's name, its direct and its total effect, and its shares in words."""

_MOST_EDITS, _MOST_TOKENS = 3, 16
_TOTAL: dict[str, Any] = {"marker": "s", "color": ORANGE, "markersize": 5, "linestyle": "none"}
# Hollow, so that the other mark is seen where the two are equal.
_DIRECT: dict[str, Any] = {
    "marker": "o", "color": BLUE, "markerfacecolor": "none", "markeredgewidth": 1.6, "markersize": 8,
    "linestyle": "none",
}  # fmt: skip


def direct_figure(
    effects: Sequence[Effect],
    tokens: Mapping[str, Sequence[tuple[str, float, float]]],
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
    most = max([len(_fewer(tokens[name])) for name in shown], default=0)
    height = max(1.6 + 0.55 * len(effects), 1.4 + 0.26 * most)
    figure = empty_figure(4.6 + 2.9 * len(shown), min(height, 12.0))
    axes = figure.subplots(1, 1 + len(shown), squeeze=False, width_ratios=[1.5, *[1.0] * len(shown)])[0]
    _draw_effects(axes[0], effects, measured)
    for axis, name in zip(axes[1:], shown, strict=True):
        _draw_tokens(axis, name, _fewer(tokens[name]))
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2
    )
    return figure


def _draw_effects(axes: Any, effects: Sequence[Effect], measured: str) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8)
    for place, (_, direct, total, _) in enumerate(effects):
        for (value, low, high), shift, form in ((total, 0.13, _TOTAL), (direct, -0.13, _DIRECT)):
            if np.isfinite([low, high]).all():
                axes.plot([low, high], [place + shift] * 2, color=form["color"], linewidth=1.4)
            axes.plot([value], [place + shift], **form)
    axes.plot([], [], **_DIRECT, label="direct: by the residual stream alone")
    axes.plot([], [], **_TOTAL, label="total")
    names = [f"{drawable(effect[0], 24)}\n{effect[3]}" for effect in effects]
    axes.set_yticks(range(len(effects)), names)
    axes.set_ylim(len(effects) - 0.5, -0.5)
    label = "\n".join(textwrap.wrap(drawable(measured), 44))
    frame(axes, x=label, title="Effect, with 95% interval", grid="x")


def _draw_tokens(axes: Any, name: str, tokens: Sequence[tuple[str, float, float]]) -> None:
    places = np.arange(len(tokens))
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.hlines(places, [d for _, d, _ in tokens], [t for *_, t in tokens], color=GREY, linewidth=0.8)
    axes.plot([t for *_, t in tokens], places, **_TOTAL)
    axes.plot([d for _, d, _ in tokens], places, **_DIRECT)
    axes.set_yticks(places, [drawable(text, 16) for text, *_ in tokens])
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    frame(axes, x="change of the logit", title=f"Tokens of {drawable(name, 20)}", grid="x")


def _fewer(tokens: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Those that change most, in the order in which they came."""
    strongest = sorted(tokens, key=lambda token: -max(abs(token[1]), abs(token[2])))[:_MOST_TOKENS]
    return [token for token in tokens if token in strongest]

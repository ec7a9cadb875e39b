"""Probes on base and edited runs over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from reftlab.plotting.parts import site_label, site_ticks
from reftlab.plotting.style import BLACK, BLUE, GREY, ORANGE, drawable, empty_figure, frame

__all__ = ["ChangePanel", "probe_change_figure"]


@dataclass(frozen=True, eq=False)
class ChangePanel:
    """One concept.

    Attributes:
        concept: its name.
        score: name of the score.
        base, edited, transfer: scores `(site,)`; NaN where there are none.
        base_ends, edited_ends, transfer_ends: ends of their intervals `(site, 2)`.
        chance: the score without information.
        significant: where base and edited differ.
    """

    concept: str
    score: str
    base: Float[np.ndarray, " site"]
    edited: Float[np.ndarray, " site"]
    transfer: Float[np.ndarray, " site"]
    base_ends: Float[np.ndarray, "site 2"]
    edited_ends: Float[np.ndarray, "site 2"]
    transfer_ends: Float[np.ndarray, "site 2"]
    chance: float
    significant: Bool[np.ndarray, " site"]


def probe_change_figure(
    panels: Sequence[ChangePanel], sites: Sequence[str], axis: str, title: str, level: float
) -> Figure:
    """Draw each concept's scores over the sites: base, edited, and base probes on the edited run.

    Args:
        panels: the concepts.
        sites: labels of the sites.
        axis: what they are.
        title: above all panels.
        level: of the intervals.
    """
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width = max(4.4, min(8.0, 1.6 + 0.3 * len(sites)))
    longest = max(len(site_label(site)) for site in sites)
    figure = empty_figure(min(16.0, across * width), 0.9 + 2.9 * down + 0.04 * longest)
    alike = len({panel.score for panel in panels}) == 1
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=alike)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel)
        name = panel.score if axes in grid[:, 0] or not alike else ""
        frame(axes, x=axis, y=drawable(name), title=drawable(panel.concept, 48))
        site_ticks(axes, sites)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    marks = any(panel.significant.any() for panel in panels)
    if marks and not panels[0].significant.any():
        handles.append(grid.flat[0].plot([], [], **_STAR)[0])
        labels.append(_STAR["label"])
    figure.legend(
        handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=min(3, across + 1)
    )
    figure.suptitle(f"{drawable(title, 90)}; {level:.0%} intervals", fontsize=10, x=0.01, ha="left")
    return figure


_STAR: dict[str, Any] = {
    "linestyle": "", "marker": "*", "color": BLACK, "markersize": 7,
    "label": "base and edited differ (adjusted p ≤ 0.05)",
}  # fmt: skip


def _draw(axes: Any, panel: ChangePanel) -> None:
    places = np.arange(len(panel.base))
    for values, ends, colour, look, label in (
        (panel.base, panel.base_ends, GREY, "s--", "base run"),
        (panel.transfer, panel.transfer_ends, ORANGE, "^:", "base probe on the edited run"),
        (panel.edited, panel.edited_ends, BLUE, "o-", "edited run"),
    ):
        axes.fill_between(places, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
        axes.plot(places, values, look, color=colour, linewidth=1.8, markersize=4.5, label=label)
    axes.axhline(
        panel.chance, color=GREY, linestyle=(0, (1, 3)), linewidth=1.2, label=f"chance, {panel.chance:.3g}"
    )
    axes.margins(y=0.12)
    if panel.significant.any():
        found = places[panel.significant]
        # Above all curves, whatever their scale.
        axes.plot(found, np.full(len(found), 0.96), transform=axes.get_xaxis_transform(), **_STAR)

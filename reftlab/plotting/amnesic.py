"""Amnesic probing: how far erasures shift a behaviour beside their controls, and what probes still find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reftlab.plotting.parts import site_label, site_ticks
from reftlab.plotting.style import BLACK, BLUE, GREY, VERMILLION, drawable, empty_figure, frame
from reftlab.plotting.wording import wrapped

__all__ = ["AmnesicPoint", "amnesic_figure"]

_LOOKS = {"leace": ("LEACE", BLUE, "o"), "inlp": ("INLP", VERMILLION, "s")}
_OTHER = ("", BLACK, "D")


class AmnesicPoint(NamedTuple):
    """One erasure.

    Attributes:
        site: label of its place on the axis.
        method: by which it was erased.
        shift: mean absolute change of the behaviour, and the ends of its interval.
        random, shuffled: the same for each draw of the two controls.
        before, after: a probe's score and the ends of its interval.
    """

    site: str
    method: str
    shift: tuple[float, float, float]
    random: tuple[float, ...]
    shuffled: tuple[float, ...]
    before: tuple[float, float, float]
    after: tuple[float, float, float]


def amnesic_figure(
    points: Sequence[AmnesicPoint], name: str, unit: str, score: str, chance: float, axis: str
) -> Figure:
    """Draw the behaviour's shift above, and what a probe finds before and after the erasure below.

    Args:
        points: the erasures.
        name, unit: of the behaviour.
        score: name of the probe's score.
        chance: the score without information.
        axis: what the sites are.
    """
    sites = list(dict.fromkeys(point.site for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    width = min(13.0, max(5.2, 2.4 + 0.55 * len(sites)))
    figure = empty_figure(width, 5.6 + 0.04 * max(len(site_label(site)) for site in sites))
    above, below = figure.subplots(2, 1, sharex=True)
    gap = 0.7 / len(methods)
    for point in points:
        place = sites.index(point.site) + gap * (methods.index(point.method) - (len(methods) - 1) / 2)
        _shifts(above, point, place, gap)
        _scores(below, point, place)
    below.axhline(chance, color=GREY, linestyle=":", linewidth=1.5)
    above.set_ylim(bottom=0)
    measured = f"|change| of {name}" + (f"\n({unit})" if unit else "")
    title = "Behaviour with the concept erased,\nbeside its controls"
    frame(above, y=wrapped(drawable(measured), 28), title=title)
    frame(below, x=axis, y=f"probe's {score}", title="Can a new probe still find the concept?")
    site_ticks(below, sites, room=0.6)
    figure.legend(
        handles=_handles(points, methods, chance),
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _shifts(axes: Any, point: AmnesicPoint, place: float, gap: float) -> None:
    _, colour, marker = _LOOKS.get(point.method, _OTHER)
    side = gap * 0.24
    for values, offset, look in ((point.random, -side, "_"), (point.shuffled, side, "x")):
        if values:
            axes.plot(
                np.full(len(values), place + offset),
                values,
                look,
                color=GREY,
                markersize=5,
                alpha=0.7,
                zorder=1,
            )
    _with_interval(axes, place, point.shift, colour, marker, True)


def _scores(axes: Any, point: AmnesicPoint, place: float) -> None:
    _, colour, marker = _LOOKS.get(point.method, _OTHER)
    _with_interval(axes, place - 0.045, point.before, colour, marker, False)
    _with_interval(axes, place + 0.045, point.after, colour, marker, True)


def _with_interval(
    axes: Any, place: float, value: tuple[float, float, float], colour: str, marker: str, filled: bool
) -> None:
    middle, low, high = value
    if np.isfinite([low, high]).all():
        axes.plot([place, place], [low, high], color=colour, linewidth=1.5, zorder=2)
    face = colour if filled else "white"
    axes.plot([place], [middle], marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)


def _handles(points: Sequence[AmnesicPoint], methods: Sequence[str], chance: float) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            label=f"{_LOOKS.get(method, _OTHER)[0] or method}, {when}",
            color=_LOOKS.get(method, _OTHER)[1],
            marker=_LOOKS.get(method, _OTHER)[2],
            markerfacecolor=_LOOKS.get(method, _OTHER)[1] if when == "erased" else "white",
        )
        for when in ("before", "erased")
        for method in methods
    ]
    handles.append(Line2D([], [], linestyle="", marker="_", color=GREY, label="random subspaces"))
    if any(point.shuffled for point in points):
        handles.append(Line2D([], [], linestyle="", marker="x", color=GREY, label="shuffled labels"))
    handles.append(Line2D([], [], linestyle=":", color=GREY, label=f"chance, {chance:.3g}"))
    return handles

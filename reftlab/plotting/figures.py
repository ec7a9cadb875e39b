"""Figures of explanations, from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from reftlab.plotting.parts import Tokens, token_bars
from reftlab.plotting.style import (
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
from reftlab.plotting.wording import wrapped

__all__ = [
    "axes_figure",
    "directions_figure",
    "edit_figure",
    "overview_figure",
    "removal_figure",
    "replies_figure",
    "sizes_figure",
    "tokens_figure",
]

Points: TypeAlias = Any
"""A numpy array `(vector, 2)`."""

_MOST_DIRECTIONS, _WIDE, _FEW = 6, 130, 4


def directions_figure(
    edit: str, labels: Sequence[str], gain: Sequence[float], mean: Sequence[float], std: Sequence[float]
) -> Figure:
    """Amount written along each direction, mean and standard deviation, and its gain."""
    if not labels:
        return message_figure(edit, "this edit writes nothing")
    figure = empty_figure(7.0, 3.0)
    left, right = figure.subplots(1, 2)
    _amounts(left, labels, mean, std)
    right.bar(range(len(labels)), gain, color=SKY, edgecolor=BLUE, width=min(0.6, _bar_width(len(labels))))
    right.set_xlim(-0.6, len(labels) - 0.4)
    _named(right, labels)
    frame(right, x="direction", y="singular value (written per unit read)", title="Gain")
    figure.suptitle(drawable(f"{edit}: directions"), fontsize=11, x=0.01, ha="left")
    return figure


def tokens_figure(edit: str, labels: Sequence[str], tokens: Sequence[tuple[Tokens, Tokens]]) -> Figure:
    """Tokens that each direction promotes and suppresses, the first six directions."""
    if not labels:
        return message_figure(edit, "this edit writes nothing")
    shown = list(zip(labels, tokens, strict=True))[:_MOST_DIRECTIONS]
    longest = max(len(up) for _, (up, _) in shown)
    figure = empty_figure(9.0, 0.8 + len(shown) * (0.7 + 0.19 * longest))
    grid = figure.subplots(len(shown), 2, squeeze=False, sharex="row")
    for (label, (up, down)), (left, right) in zip(shown, grid, strict=True):
        for axes, some, colour, word in (
            (left, up, BLUE, "promotes"),
            (right, down, VERMILLION, "suppresses"),
        ):
            token_bars(axes, some, colour, f"Direction {label} {word}", 30)
    for axes in grid[-1]:
        axes.set_xlabel("size of the logit change", fontsize=9)
    figure.suptitle(drawable(f"{edit}: tokens, direct effect"), fontsize=11, x=0.01, ha="left")
    return figure


def sizes_figure(
    edit: str, rows: Sequence[int], relative: Sequence[float], cosine: Sequence[float]
) -> Figure:
    """Relative size and cosine of an edit, example by example."""
    figure = empty_figure(7.0, 2.8)
    left, right = figure.subplots(1, 2)
    left.plot(rows, relative, "o", color=BLUE, markersize=5, alpha=0.8)
    left.axhline(float(np.median(relative)), color=ORANGE, linewidth=1.5, label="median")
    left.set_ylim(0, 1.12 * max([*relative, 1e-9]))
    _legend_above(left)
    frame(left, x="example", y="‖Δ‖ / ‖h‖", title="Size against the vector")
    right.plot(rows, cosine, "o", color=BLUE, markersize=5, alpha=0.8)
    frame(right, x="example", y="cosine of h and h + Δ", title="Turn")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(drawable(f"{edit}: size"), fontsize=11, x=0.01, ha="left")
    return figure


def axes_figure(edit: str, before: Points, after: Points, explained: Sequence[float]) -> Figure:
    """Vectors before and after an edit on the same two principal axes."""
    figure = empty_figure(5.0, 4.0)
    _moves(figure.subplots(), before, after, explained)
    figure.suptitle(drawable(edit), fontsize=11, x=0.01, ha="left")
    return figure


def removal_figure(
    whole: Mapping[str, float],
    directions: Mapping[str, Sequence[tuple[str, float]]],
    controls: Mapping[str, Sequence[float]],
) -> Figure:
    """Change of the answer loss when each edit, and each direction of some, is taken away."""
    if not whole:
        return message_figure("Answer loss", "there are no edits")
    count = len(directions)
    if len(whole) == 1 and list(directions) == list(whole):
        (name,) = whole
        return _single_removal(name, whole[name], directions[name], controls.get(name, ()))
    columns = min(3, max(1, count))
    rows = -(-count // columns)
    figure = empty_figure(max(5.0, 3.0 * columns) if len(whole) <= _FEW else 9.0, 2.8 + 2.5 * rows)
    parts: Any = [figure]
    if rows:
        parts = figure.subfigures(2, 1, height_ratios=[2.8, 2.5 * rows])
    axes = parts[0].subplots()
    axes.bar(range(len(whole)), list(whole.values()), color=VERMILLION, width=_bar_width(len(whole)))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(-0.6, len(whole) - 0.4)
    _named(axes, list(whole), _WIDE if len(whole) > _FEW else 60)
    frame(axes, y="loss change (nats per token)", title="Without the whole edit")
    if rows:
        grid = parts[1].subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[count:]:
            axes.set_axis_off()
        for axes, (key, changes) in zip(grid, directions.items(), strict=False):
            removed = [("direction", label, change) for label, change in changes]
            removed += [("random", str(n), change) for n, change in enumerate(controls.get(key, ()), 1)]
            _losses(axes, removed)
            axes.set_title(drawable(f"{key}, without one direction"), fontsize=10, loc="left")
    return figure


def _single_removal(
    name: str, whole: float, directions: Sequence[tuple[str, float]], random: Sequence[float]
) -> Figure:
    """The only edit, and each of its directions beside it."""
    figure = empty_figure(5.4, 3.3)
    axes = figure.subplots()
    removed = [("edit", "", whole), *(("direction", label, change) for label, change in directions)]
    removed += [("random", str(number), change) for number, change in enumerate(random, 1)]
    _losses(axes, removed)
    axes.set_title(drawable(f"{name}: without one direction, and without all"), fontsize=10, loc="left")
    return figure


def replies_figure(replies: Sequence[tuple[str, str, str]]) -> Figure:
    """Prompts with their replies without and with the edits, as a table."""
    limits = (40, 64, 76)
    cells = [
        [drawable(text.replace("\n", " "), limit) for text, limit in zip(line, limits, strict=True)]
        for line in replies
    ]
    figure = empty_figure(13.0, 0.5 + 0.27 * (len(cells) + 1))
    axes = figure.subplots()
    axes.set_axis_off()
    table = axes.table(
        cells or [["", "", ""]],
        colLabels=["prompt", "reply without edits", "reply with edits"],
        colWidths=[0.22, 0.36, 0.42],
        cellLoc="left",
        bbox=Bbox.unit(),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("#DDDDDD")
        cell.PAD = 0.02
        if row == 0:
            cell.set_text_props(weight="bold")
    return figure


def edit_figure(
    edit: str,
    amounts: tuple[Sequence[str], Sequence[float], Sequence[float]],
    moves: tuple[Points, Points, Sequence[float]],
    removed: Sequence[tuple[str, str, float]] | None,
) -> Figure:
    """Amounts written, vectors before and after, and the loss without it, side by side.

    Args:
        edit: key of the edit.
        amounts: labels, means and standard deviations of its directions.
        moves: points before, after, and explained shares of the two axes.
        removed: what (`edit`, `direction`, `random`), label and loss change of each removal; None
            where there was no loss to measure.
    """
    count = 2 if removed is None else 3
    figure = empty_figure(3.6 * count, 3.1)
    panels = figure.subplots(1, count)
    if amounts[0]:
        _amounts(panels[0], *amounts)
    else:
        panels[0].set_axis_off()
    _moves(panels[1], *moves)
    if removed is not None:
        _losses(panels[2], removed)
    figure.suptitle(drawable(edit), fontsize=11, x=0.01, ha="left")
    return figure


def overview_figure(
    edits: Sequence[tuple[str, int | None, float, tuple[float, float], float | None]],
) -> Figure:
    """Size of every edit and the answer loss without it, in order of depth.

    Args:
        edits: key, block number or None, median relative size, its quartiles, and loss change or None.
    """
    if not edits:
        return message_figure("Overview", "there are no edits")
    changes = [change for *_, change in edits]
    with_loss = any(change is not None for change in changes)
    few, count = len(edits) <= _FEW, 2 if with_loss else 1
    if few:
        figure = empty_figure(1.0 + 3.4 * count, 3.0)
        panels = figure.subplots(1, count, squeeze=False)[0]
    else:
        figure = empty_figure(9.0, 2.8 if count == 1 else 5.0)
        panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    blocks = [block for _, block, *_ in edits]
    by_block = None not in blocks and len(set(blocks)) == len(blocks)
    names = [str(block) for block in blocks] if by_block else [key for key, *_ in edits]
    places = range(len(edits))
    medians = np.array([median for _, _, median, _, _ in edits])
    low, high = np.array([quartiles for _, _, _, quartiles, _ in edits]).T
    spread = np.clip(np.stack([medians - low, high - medians]), 0, None)
    panels[0].errorbar(
        places, medians, yerr=spread, fmt="o", color=BLUE, ecolor=SKY, elinewidth=3, markersize=5,
        label="median, with the middle half of the vectors",
    )  # fmt: skip
    panels[0].set_ylim(0, 1.12 * max(float(high.max()), 1e-9))
    size = "length of the change /\nlength of the vector"
    which, left_out = ("the edit", "it") if len(edits) == 1 else ("each edit", "one edit")
    title = f"How large {which} is against the vector it changes"
    frame(panels[0], y=size, title=wrapped(title, 40 if few else 90))
    if with_loss:
        loss = [change or 0.0 for change in changes]
        panels[1].bar(places, loss, color=VERMILLION, width=_bar_width(len(edits)))
        panels[1].axhline(0, color=GREY, linewidth=0.8)
        title = f"How much the answer loss changes when {left_out} is left out"
        frame(panels[1], y="loss change\n(nats per answer token)", title=wrapped(title, 40 if few else 90))
    axis = "block of the model" if by_block else "edit"
    for axes in panels:
        _named(axes, names, 36 if few else _WIDE)
        axes.set_xlim(-0.6, len(edits) - 0.4)
        if few or axes is panels[-1]:
            axes.set_xlabel(axis if len(edits) == 1 else f"{axis}, first to last", fontsize=9)
    if few:
        figure.legend(fontsize=8, frameon=False, loc="outside lower left")
    else:
        _legend_above(panels[0])
    return figure


def _bar_width(count: int) -> float:
    """Of bars that are not much wider than tall where there are few."""
    return min(0.7, 0.15 + 0.12 * count)


def _amounts(axes: Axes, labels: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
    width = min(0.6, _bar_width(len(labels)))
    axes.bar(range(len(labels)), mean, yerr=std, color=BLUE, ecolor=ORANGE, capsize=3, width=width)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _named(axes, labels)
    frame(axes, x="direction", y="length along the direction", title="Written: mean ± std")


def _moves(axes: Axes, before: Points, after: Points, explained: Sequence[float]) -> None:
    if len(before) <= 60:
        for start, stop in zip(before, after, strict=True):
            axes.annotate(
                "", stop, start, arrowprops={"arrowstyle": "-", "color": GREY, "alpha": 0.4, "linewidth": 0.8}
            )
    axes.scatter(before[:, 0], before[:, 1], s=26, color=BLUE, marker="o", label="before")
    axes.scatter(after[:, 0], after[:, 1], s=30, color=VERMILLION, marker="^", label="after")
    axes.margins(0.12)
    # An axis with next to no variance is not stretched to look like one that has.
    spans = np.ptp(np.concatenate([before, after]), axis=0)
    if spans[1] < 0.25 * spans[0]:
        middle = float(np.concatenate([before, after])[:, 1].mean())
        axes.set_ylim(middle - 0.3 * spans[0], middle + 0.3 * spans[0])
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    one, two = (f"{share:.0%}" if share >= 0.01 else "under 1%" for share in explained)
    frame(axes, x=f"axis 1 ({one} of variance)", y=f"axis 2 ({two})", title="Vectors, PCA of both",
          grid="both")  # fmt: skip


def _losses(axes: Axes, removed: Sequence[tuple[str, str, float]]) -> None:
    """Bars for removed directions and the whole edit, a band for random directions."""
    bars = [(label, change, BLUE) for what, label, change in removed if what == "direction"]
    bars += [("all", change, VERMILLION) for what, _, change in removed if what == "edit"]
    random = [change for what, _, change in removed if what == "random"]
    width = min(0.6, _bar_width(len(bars)))
    axes.bar(range(len(bars)), [c for _, c, _ in bars], color=[colour for *_, colour in bars], width=width)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    if random:
        axes.axhspan(min(random), max(random), color=ORANGE, alpha=0.25, linewidth=0, zorder=0.5)
        draws = f"mean and range of {len(random)} random\ndirections within the same span"
        axes.axhline(float(np.mean(random)), color=ORANGE, linewidth=1.5, label=draws)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes.axhline(0, color=GREY, linewidth=0.8)
    _named(axes, [label for label, *_ in bars])
    frame(axes, x="removed direction", y="loss change (nats per token)", title="Loss change without it")


def _legend_above(axes: Axes) -> None:
    """A legend in the corner over the axes, where no data can be."""
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)


def _named(axes: Axes, names: Sequence[str], room: int = 30) -> None:
    """Tick names; thinned out where there are many, turned where more than `room` characters."""
    shown = [drawable(name, 18) for name in names]
    step = max(1, -(-len(shown) // 40))
    places = range(0, len(shown), step)
    axes.set_xticks(list(places), [shown[place] for place in places])
    if sum(len(shown[place]) + 2 for place in places) > room:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")

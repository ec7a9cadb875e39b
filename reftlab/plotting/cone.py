"""The figure of a causal cone: which of a row's values are computed, cached, or never needed again."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from reftlab.plotting.style import BLACK, ORANGE, SKY, drawable, empty_figure, frame

__all__ = ["cone_figure"]

_SKIPPED = "#E8E8E8"
_NUMBERED = 8
"""Up to so many blocks each has its number."""
_LABELLED = 60
"""More tokens than this are numbered, not spelled."""


def cone_figure(
    tokens: Sequence[str],
    blocks: int,
    first_block: int,
    start: int,
    stop: int,
    edits: Sequence[tuple[str, int, int]],
    title: str,
) -> Figure:
    """Draw the blocks × tokens of one row.

    Args:
        tokens: the row's tokens as text.
        blocks: number of blocks.
        first_block: the first that runs.
        start: the first token that runs.
        stop: the token after the last one that runs.
        edits: name of each edit, the first block that it can change, and its first token.
        title: of the figure.
    """
    states = [
        [
            (2 if start <= token < stop else 1 if token < start else 0) if block >= first_block else 0
            for token in range(len(tokens))
        ]
        for block in range(blocks)
    ]
    spelled = len(tokens) <= _LABELLED
    figure = empty_figure(min(11.0, max(6.0, 1.6 + 0.24 * len(tokens))), min(7.0, 2.4 + 0.13 * blocks))
    axes = figure.subplots()
    axes.imshow(
        states, cmap=ListedColormap([_SKIPPED, SKY, ORANGE]), vmin=0, vmax=2, origin="lower", aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    # Where edits act: at the border below the first block that they can change.
    places: dict[tuple[int, int], list[str]] = {}
    for name, block, token in edits:
        places.setdefault((block, token), []).append(name)
    axes.plot(
        [token for _, token in places], [block - 0.5 for block, _ in places], "v", color=BLACK, markersize=7,
        clip_on=False, zorder=3,
    )  # fmt: skip
    frame(axes, x="token", y="block", title=drawable(title), grid="")
    if spelled:
        axes.set_xticks(range(len(tokens)), [drawable(token.replace("\n", "\\n"), 14) for token in tokens])
        axes.tick_params(axis="x", labelrotation=90, labelsize=6.5)
    if blocks <= _NUMBERED:
        axes.set_yticks(range(blocks))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    names = [name for several in places.values() for name in several]
    legend: dict[str, Artist] = {
        "computed in every step": Patch(color=ORANGE),
        "cached: keys and values, computed once": Patch(color=SKY),
        "skipped: not needed again": Patch(facecolor=_SKIPPED, edgecolor="#BBBBBB"),
    }
    if names:
        what = drawable(f"edit {names[0]}", 30) if len(names) == 1 else f"where the {len(names)} edits act"
        legend[what] = Line2D([], [], linestyle="", marker="v", color=BLACK, markersize=7)
    shown = {max(row) for row in states} | {min(row) for row in states}
    if shown == {2}:
        # Everything runs, so that there is nothing to tell apart.
        legend = {name: mark for number, (name, mark) in enumerate(legend.items()) if number not in (1, 2)}
    figure.legend(
        list(legend.values()), list(legend), fontsize=8, frameon=False, loc="outside lower center", ncols=2
    )
    return figure

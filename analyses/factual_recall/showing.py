"""Figures and tables of the study."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from reftlab.plotting.style import BLACK, BLUE, GREY, ORANGE, VERMILLION, empty_figure, frame

__all__ = ["LEARNED", "alignment_figure", "alignment_table", "probe_figure"]

LEARNED, RANDOM, WHOLE = "learned subspace", "random subspaces", "whole vectors"
STYLES = {
    "trained countries": (BLUE, "o"),
    "held-out countries": (VERMILLION, "s"),
    "held-out countries, other words": (ORANGE, "^"),
    "held-out countries, language": (BLACK, "D"),
}


def alignment_figure(table: pd.DataFrame, rank: int, block: int) -> Figure:
    """Interchange accuracy against the block at one rank, and against rank at one block."""
    figure = empty_figure(10.4, 3.8)
    grid = figure.subplots(1, 3, sharey=True)
    at_rank, at_block = table[table["rank"] == rank], table[table["block"] == block]
    panels = ((at_rank, "block", LEARNED), (at_rank, "block", WHOLE), (at_block, "rank", LEARNED))
    for axes, (data, x, kind) in zip(grid, panels, strict=True):
        for group, (colour, mark) in STYLES.items():
            for swapped, line, own in ((kind, "-", mark), (RANDOM, ":", "")):
                if kind == WHOLE and swapped == RANDOM:
                    continue
                some = data[(data["swapped"] == swapped) & (data["tested_on"] == group)]
                means = some.groupby(x)["accuracy"].mean()
                axes.plot(means.index, means, own + line, color=colour, markersize=5,
                          label=group if axes is grid[0] and swapped == kind else None)  # fmt: skip
    blocks = sorted(at_rank["block"].unique())
    for axes in grid[:2]:
        axes.set_xticks(blocks, [str(one) for one in blocks])
    ranks = sorted(at_block["rank"].unique())
    grid[2].set_xscale("log", base=2)
    grid[2].set_xticks(ranks, [str(one) for one in ranks])
    grid[2].minorticks_off()
    grid[0].set_ylim(-0.03, 1.03)
    frame(grid[0], x="block", y="interchange accuracy", title=f"Learned subspace of rank {rank}")
    frame(grid[1], x="block", title="Whole vectors")
    frame(grid[2], x="rank", title=f"Learned subspace at block {block}")
    grid[0].plot([], [], ":", color=GREY, label="random subspace of the same rank")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def alignment_table(table: pd.DataFrame) -> str:
    """A line a block, rank and way of swapping; a column a group, with the range over seeds."""
    groups = list(STYLES)
    lines = ["| block | rank | swapped | " + " | ".join(groups) + " |", "|---" * (3 + len(groups)) + "|"]
    for (block, rank, swapped), part in table.groupby(["block", "rank", "swapped"], sort=True):
        if swapped == "no swap":
            continue
        cells = []
        for group in groups:
            found = part[part["tested_on"] == group]["accuracy"]
            same = found.max() - found.min() < 0.005
            span = "" if same else f" ({found.min():.2f} to {found.max():.2f})"
            cells.append(f"{found.mean():.2f}{span}")
        lines.append(f"| {block} | {rank} | {swapped} | {' | '.join(cells)} |")
    return "\n".join(lines)


def probe_figure(table: pd.DataFrame, title: str) -> Any:
    """What a probe of the bare model's vectors reads after the swap, block by block."""
    figure = empty_figure(7.6, 3.4)
    axes = figure.subplots()
    styles = ((GREY, "--"), (BLUE, "o-"), (VERMILLION, "s-"))
    for name, (colour, mark) in zip(table.columns[1:], styles, strict=True):
        axes.plot(table["block"], table[name], mark, color=colour, markersize=4, label=name)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_ylim(-0.03, 1.03)
    frame(axes, x="block", y="share of prompts", title=title)
    return figure

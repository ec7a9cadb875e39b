"""The figures of the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from comparing import SIDES, overlap
from runs import Run
from tables import Angles

from reftlab.explaining.geometry.angles import span
from reftlab.plotting.style import BLUE, GREY, ORANGE, SKY, VERMILLION, empty_figure, frame

__all__ = ["agreement_figure", "matrix_figure", "spectra_figure"]

BETWEEN = "the two tasks"
AT_RANDOM = "random vectors, or a random subspace"
MARKS = {"emoji": (VERMILLION, "o"), "capitals": (BLUE, "s"), BETWEEN: (GREY, "^")}


def spectra_figure(found: Angles) -> Any:
    """Principal angles between seeds and between tasks, a panel a rank and side, over both random bands."""
    ranks = sorted({a.rank for a, *_ in found})
    figure = empty_figure(2.1 * len(ranks) + 1.6, 5.0)
    grid = figure.subplots(2, len(ranks), squeeze=False, sharey=True, width_ratios=[3 + r for r in ranks])
    for row, side in zip(grid, SIDES, strict=True):
        for axes, rank in zip(row, ranks, strict=True):
            _spectra(axes, [one for one in found if one[0].rank == rank and one[2] == side])
            title = f"{side}, rank {rank}"
            frame(axes, x="number of the angle", title=title)
        row[0].set_ylabel("principal angle (degrees)", fontsize=9)
    grid[0, 0].set_ylim(-3, 93)
    grid[0, 0].set_yticks([0, 30, 60, 90])
    handles, labels = grid[0, -1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique,
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=2 + (len(ranks) > 2),
    )
    return figure


def _spectra(axes: Any, found: Angles) -> None:
    rank = found[0][0].rank
    places = np.arange(1, rank + 1)
    ends = np.array([places[0] - 0.45, *places[1:-1], places[-1] + 0.45])
    flat = np.array(next(angles["isotropic"].band for *_, angles in found if "isotropic" in angles))
    data = np.mean([angles["data"].band for *_, angles in found], 0)
    for band, options in (
        (
            data,
            {
                "facecolor": "none",
                "edgecolor": SKY,
                "hatch": "////",
                "label": "95% of random, data covariance",
            },
        ),
        (flat, {"color": ORANGE, "alpha": 0.55, "label": "95% of random, every direction alike"}),
    ):
        low, high = (np.interp(ends, places, band[:, column]) for column in (0, 2))
        axes.fill_between(ends, low, high, linewidth=0, **options)
    for number, (kind, (colour, marker)) in enumerate(MARKS.items()):
        own = [angles["data"].angles for a, b, _, angles in found if _kind(a, b) == kind]
        label = f"found, {'between ' if kind == BETWEEN else 'seeds of '}{kind}"
        if not own:
            axes.plot([], [], marker, color=colour, markersize=3, label=label)
        for values in own:
            axes.plot(places + 0.22 * (number - 1), values, marker, color=colour, markersize=3, alpha=0.6,
                      label=label)  # fmt: skip
    axes.set_xticks(places)


def _kind(a: Run, b: Run) -> str:
    return a.task if a.task == b.task else BETWEEN


def matrix_figure(runs: Sequence[Run]) -> Any:
    """Overlap of every two runs' subspaces, write on the left and read on the right."""
    figure = empty_figure(10.0, 5.2)
    groups = list(dict.fromkeys((run.task, run.rank) for run in runs))
    order = [run for group in groups for run in runs if (run.task, run.rank) == group]
    counts = [sum((run.task, run.rank) == group for run in order) for group in groups]
    edges = np.cumsum([0, *counts]) - 0.5
    grid = figure.subplots(1, 2, sharey=True)
    for axes, side in zip(grid, SIDES, strict=True):
        bases = [span(getattr(run, side)) for run in order]
        values = np.array([[overlap(a, b) for b in bases] for a in bases])
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        for edge in edges[1:-1]:
            axes.axhline(edge, color=GREY, linewidth=0.5)
            axes.axvline(edge, color=GREY, linewidth=0.5)
        names = [f"{task}, rank {rank}" for task, rank in groups]
        middles = (edges[1:] + edges[:-1]) / 2
        axes.set_xticks(middles, names, rotation=45, ha="right")
        axes.set_yticks(middles, names)
        frame(axes, title=f"{side} subspaces", grid="")
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.7)
    bar.set_label("overlap: mean squared cosine (1 the same subspace)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def agreement_figure(pairs: pd.DataFrame, runs: pd.DataFrame, swaps: pd.DataFrame) -> Any:
    """Rank against what seeds share: subspace, what is added, what comes of it, and swapped subspaces."""
    figure = empty_figure(10.4, 3.7)
    grid = figure.subplots(1, 4)
    same = pairs[(pairs.task_a == pairs.task_b) & (pairs.rank_a == pairs.rank_b)]
    same = same.rename(columns={"task_a": "task", "rank_a": "rank"})
    panels = (
        ("write_overlap", "overlap of write subspaces", "What they may write"),
        ("mean_change_cosine", "cosine of mean changes", "What they write"),
        ("end_cosine", "cosine after the last block", "What comes of it"),
    )
    for axes, (column, y, title) in zip(grid, panels, strict=False):
        _points(axes, same, column)
        frame(axes, x="rank", y=y, title=title)
    if len(swaps):
        ends = swaps[swaps.kind == "random vector"].dropna(subset="end_cosine")
        _points(grid[2], ends.assign(task=BETWEEN), "end_cosine", label=AT_RANDOM)
        _points(grid[3], swaps[swaps.kind == "other seed"], "share")
        controls = swaps[swaps.kind == "random"]
        _points(grid[3], controls.assign(task=BETWEEN), "share", label=AT_RANDOM)
    for axes in grid[:3]:
        axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.05)
    frame(grid[3], x="rank", y="share of the effect kept", title="In another seed's subspace")
    handles, labels = grid[3].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _points(axes: Any, table: pd.DataFrame, column: str, label: str | None = None) -> None:
    ranks = sorted(set(table["rank"]))
    for number, (task, (colour, marker)) in enumerate(MARKS.items()):
        own = table[table.task == task]
        if not len(own):
            continue
        shift = 0.12 * (number - 0.5) if label is None else 0.0
        x = np.array([ranks.index(rank) for rank in own["rank"]]) + shift
        axes.plot(x, own[column], marker, color=colour, markersize=3, alpha=0.4)
        means = own.groupby("rank")[column].mean()
        places = np.array([ranks.index(rank) for rank in means.index]) + shift
        axes.plot(places, means, f"{marker}-", color=colour, markersize=6, linewidth=1.2,
                  label=label or f"{task}, mean over pairs")  # fmt: skip
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])

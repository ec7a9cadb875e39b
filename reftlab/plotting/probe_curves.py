"""Curves of probes: a code's bits over its examples, and what is left to decode in each round of INLP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from reftlab.plotting.style import BLUE, GREY, ORANGE, drawable, empty_figure, frame

__all__ = ["code_figure", "nullspace_figure"]


def code_figure(
    untils: Sequence[int],
    bits: Sequence[float],
    frequency_bits: Sequence[float],
    uniform_bits: float,
    title: str,
) -> Figure:
    """Draw the bits per example of each block of an online code.

    Args:
        untils: how many examples are coded with each block.
        bits, frequency_bits: what each block costs, by the probe and by the classes' frequencies.
        uniform_bits: what all examples cost uniformly.
        title: short title.
    """
    figure = empty_figure(6.0, 3.4)
    axes = figure.subplots()
    ends = np.asarray(untils, dtype=float)
    counts = np.diff(ends, prepend=0.0)
    # On a logarithmic axis the first block has no left end; it gets the width of half its length.
    edges = np.concatenate([[ends[0] / 2], ends])
    axes.axhline(uniform_bits / ends[-1], color=GREY, linestyle=":", linewidth=1.5, label="uniform code")
    axes.stairs(
        np.asarray(frequency_bits) / counts,
        edges,
        baseline=None,
        color=ORANGE,
        linestyle="--",
        linewidth=1.5,
        label="classes' frequencies so far",
    )
    axes.stairs(
        np.asarray(bits) / counts, edges, baseline=None, color=BLUE, linewidth=2.2, label="probe so far"
    )
    axes.set_xscale("log")
    highest = max(uniform_bits / ends[-1], *(np.asarray([bits, frequency_bits]) / counts).ravel())
    axes.set_ylim(0, 1.08 * highest)
    axes.minorticks_off()
    shown = _readable(ends)
    axes.set_xticks(shown, [f"{int(end)}" for end in shown])
    frame(axes, x="examples coded", y="code length (bits per example)", title=drawable(title))
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def nullspace_figure(
    removed: Sequence[int], accuracies: Sequence[float], chance: float, threshold: float, title: str
) -> Figure:
    """Draw how well a linear classifier does after each round of iterative nullspace projection.

    Args:
        removed: how many directions are gone when each accuracy is measured, from 0.
        accuracies: held-out balanced accuracy.
        chance: what it is without any information.
        threshold: below it an accuracy counts as chance.
        title: short title.
    """
    figure = empty_figure(5.4, 3.4)
    axes = figure.subplots()
    axes.axhspan(0, threshold, color="#EEEEEE", zorder=0, label="counts as chance")
    axes.axhline(chance, color=GREY, linestyle=":", linewidth=1.5, label=f"chance, {chance:.3g}")
    axes.plot(removed, accuracies, "o-", color=BLUE, linewidth=1.8, markersize=5, label="linear classifier")
    axes.set_ylim(max(0.0, min(chance, *accuracies) - 0.08), 1.02)
    most = max(removed)
    axes.set_xlim(-0.04 * max(most, 1), 1.04 * max(most, 1))
    axes.set_xticks(sorted(set(removed)) if len(set(removed)) <= 12 else _spread(most))
    frame(axes, x="directions removed", y="held-out balanced accuracy", title=drawable(title))
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _readable(ends: np.ndarray) -> list[float]:
    """Ends of blocks that are far enough apart on a logarithmic axis to be labelled."""
    kept = [float(ends[-1])]
    for end in ends[-2::-1]:
        if kept[-1] / end >= (ends[-1] / ends[0]) ** (1 / 12):
            kept.append(float(end))
    return kept[::-1]


def _spread(most: int) -> list[int]:
    step = -(-most // 10)
    return list(range(0, most + 1, step))

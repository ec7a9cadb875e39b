"""Figures of lenses and of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reftlab.plotting.parts import Tokens, token_bars
from reftlab.plotting.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    drawable,
    empty_figure,
    frame,
    message_figure,
)
from reftlab.plotting.wording import block_named, true_minus

__all__ = ["lens_figure", "rank_figure", "two_lenses_figure"]

_MOST_DIRECTIONS, _MOST_TOKENS, _MOST_VALUES = 4, 6, 24

_SPECTRA = {
    "linear": ("linear part", BLUE, "o-"),
    "written": ("written vectors", VERMILLION, "s--"),
    "varying": ("written, less their mean", GREY, "^:"),
}


def lens_figure(
    site: str,
    scores: Sequence[tuple[str, float | None, tuple[float, float, float] | None]],
    commonest: float,
) -> Figure:
    """Draw how often lenses name the model's own next token, and how much of the variance they explain.

    Args:
        site: where the vectors come from.
        scores: name, held-out R² or None, and agreement with the ends of its interval or None, of each lens.
        commonest: agreement of always naming the most common token.
    """
    figure = empty_figure(7.0, 3.1)
    left, right = figure.subplots(1, 2)
    for place, (_, r2, agreement) in enumerate(scores):
        colour, hatch = ((GREY, "//"), (BLUE, ""))[place % 2]
        if agreement is not None:
            value, low, high = agreement
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            left.bar(place, value, color=colour, hatch=hatch, edgecolor="white", width=0.6)
            left.errorbar(place, value, yerr=spread, color=BLACK, capsize=4, linewidth=1.2)
        if r2 is not None:
            right.bar(place, max(r2, -1.0), color=colour, hatch=hatch, edgecolor="white", width=0.6)
            shown = f"{r2:.2f}" if r2 >= -1 else f"{r2:.2g}, off the scale"
            right.annotate(
                true_minus(shown), (place, max(r2, 0)), (0, 3), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
    left.axhline(commonest, color=ORANGE, linestyle="--", linewidth=1.5, label="always the most common token")
    left.set_ylim(0, 1.0)
    left.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    right.axhline(0, color=GREY, linewidth=0.8)
    low = min([0.0, *(max(r2, -1.0) for _, r2, _ in scores if r2 is not None)])
    right.set_ylim(1.1 * low, 1.12)
    for axes in (left, right):
        axes.set_xticks(range(len(scores)), [name for name, *_ in scores])
        axes.set_xlim(-0.6, len(scores) - 0.4)
    frame(left, y="share of held-out tokens", title="Same next token as the model, 95% interval")
    frame(right, y="held-out R²", title="What enters the final norm")
    figure.suptitle(drawable(f"Lenses of {block_named(site)}"), fontsize=11, x=0.01, ha="left")
    return figure


def two_lenses_figure(
    edit: str,
    labels: Sequence[str],
    logit: Sequence[tuple[Tokens, Tokens]],
    data: Sequence[tuple[Tokens, Tokens]],
) -> Figure:
    """Draw the tokens that each direction promotes and suppresses, by the logit lens and by the data lens.

    Args:
        edit: key of the edit.
        labels: of the directions, of which the first four are drawn.
        logit, data: for each direction the promoted and the suppressed tokens with their changes.
    """
    if not labels:
        return message_figure(edit, "this edit writes nothing")
    shown = list(zip(labels, logit, data, strict=True))[:_MOST_DIRECTIONS]
    figure = empty_figure(11.0, 0.9 + 2.0 * len(shown))
    grid = figure.subplots(len(shown), 4, squeeze=False)
    for (label, plain, fitted), row in zip(shown, grid, strict=True):
        panels = [(name, *part) for name, pair in (("logit lens", plain), ("data lens", fitted)) for part in
                  ((pair[0], "promotes", BLUE), (pair[1], "suppresses", VERMILLION))]  # fmt: skip
        largest = max([1e-9, *(abs(change) for _, some, *_ in panels for _, change in some)])
        for axes, (name, some, word, colour) in zip(row, panels, strict=True):
            token_bars(axes, some[:_MOST_TOKENS], colour, f"{label} {word} ({name})", 16)
            axes.set_xlim(0, 1.08 * largest)
            axes.title.set_fontsize(9)
    for axes in grid[-1]:
        axes.set_xlabel("size of the logit change", fontsize=9)
    figure.suptitle(drawable(f"{edit}: tokens of its directions, two lenses"), fontsize=11, x=0.01, ha="left")
    return figure


def rank_figure(
    edit: str, spectra: Mapping[str, Sequence[float]], ranks: Mapping[str, float | None]
) -> Figure:
    """Draw singular values as shares of their sum, with the effective rank of each list.

    Args:
        edit: key of the edit.
        spectra: singular values, descending, by `linear`, `written` and `varying`.
        ranks: the effective ranks, by the same names.
    """
    drawn = {name: values for name, values in spectra.items() if len(values)}
    if not drawn:
        return message_figure(edit, "this edit writes nothing")
    figure = empty_figure(5.4, 3.6)
    axes = figure.subplots()
    for name, values in drawn.items():
        words, colour, style = _SPECTRA[name]
        total = sum(values)
        some = [value / total for value in values[:_MOST_VALUES]]
        axes.plot(range(1, len(some) + 1), some, style, color=colour, markersize=5,
                  label=f"{words}: effective rank {ranks[name]:.2f}")  # fmt: skip
    axes.set_ylim(0, None)
    longest = min(_MOST_VALUES, max(map(len, drawn.values())))
    axes.set_xlim(0.6, longest + 0.4)
    axes.set_xticks(range(1, longest + 1, max(1, longest // 12)))
    frame(
        axes,
        x="number of the singular value",
        y="share of their sum",
        title=drawable(f"{edit}: how many dimensions", 60),
    )
    figure.legend(fontsize=8, frameon=False, loc="outside lower center")
    return figure

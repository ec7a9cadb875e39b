"""The figure: for each work one panel, for each environment its fastest way, on a logarithmic axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from works import FORWARD, LONG, MAP, READING, SHORT, TASKS, WIDE

from reftlab.plotting.style import BLACK, BLUE, VERMILLION, empty_figure, frame

if TYPE_CHECKING:
    from report import Measured, Timing

PANELS = {
    SHORT: "Training step, one edit, 8 × (68 + 8) tokens",
    LONG: "Training step, one edit, 8 × (250 + 2) tokens",
    WIDE: "Training step, last(7) at 30 blocks, 8 × (250 + 8)",
    MAP: "Patching map, 30 blocks × 14 tokens",
    READING: "Reading block 5 of 30, 8 × 128 tokens",
    TASKS: "8 tasks in one batch, 32 tokens generated",
}
LABELS = {
    "transformer_lens": "TransformerLens 4",
    "transformer_lens_2": "TransformerLens 2",
    "peft": "PEFT",
}


def chosen(measured: Measured, work: str) -> list[tuple[str, Timing]]:
    """(label, timing) of each bar, slowest first."""
    found: dict[str, Timing] = {}
    for timing in measured.timings.get(work, ()):
        label = _label(work, timing)
        if label and (label not in found or timing.median < found[label].median):
            found[label] = timing
    return sorted(found.items(), key=lambda item: -item[1].median)


def _label(work: str, timing: Timing) -> str:
    """One label for the ways of which only the fastest is drawn; empty for those left out."""
    owner, way = timing.owner, timing.way
    if owner == "plain":
        named = {
            "full forward": "full forward pass",
            "bare batch": "no edits",
            "plain hooks, one forward per cell": "plain hooks, a pass per cell",
            "plain hooks, one forward per cell, last logits only": "",
            "plain hooks, batched": "plain hooks, cells batched",
            "plain hook, logits only where labelled": "plain hook, few logits",
        }
        return named.get(way, "plain hook")
    if way in ("full forward", "bare batch", "bare") or "cone=False" in way:
        return ""
    if work == TASKS:
        shown = {"one batch, one block": "", "eight calls, one block": ", eight calls"}
        return LABELS.get(owner, owner) + shown[way] if way in shown else ""
    # A peer's user can begin a pass in the middle; that is shown beside what its own calls do.
    by_hand = "start_at_layer)" in way or "begins above" in way
    return LABELS.get(owner, owner) + (", from the middle" if by_hand else "")


def draw(measured: Measured) -> Figure:
    """Median times with their middle half, and how many times reftlab's they are."""
    works = [work for work in PANELS if any(t.owner == "reftlab" for t in measured.timings.get(work, ()))]
    if not works:
        works = [work for work in (*PANELS, FORWARD) if work in measured.timings]
    rows = (len(works) + 1) // 2
    figure = empty_figure(11.0, 2.8 * rows + 0.4)
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, work in zip(grid, works, strict=False):
        _panel(axes, measured, work)
    for axes in list(grid)[len(works) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Any, measured: Measured, work: str) -> None:
    every = chosen(measured, work)
    ours = next((timing for label, timing in every if label == "reftlab"), None)
    values = [timing.median for _, timing in every]
    start = min(values) if ours is None else ours.median
    axes.axvline(start, color=BLUE, linewidth=0.9, linestyle=":", zorder=1)
    for place, (label, timing) in enumerate(every):
        mine, plain = label.startswith("reftlab"), timing.owner == "plain"
        colour, shape = (BLUE, "o") if mine else (VERMILLION, "s") if plain else (BLACK, "D")
        low, high = timing.quartiles
        axes.plot([start, timing.median], [place, place], color=colour, linewidth=1.2, alpha=0.35, zorder=2)
        axes.plot([low, high], [place, place], color=colour, linewidth=3.2, alpha=0.6, zorder=3)
        axes.plot([timing.median], [place], shape, color=colour, markersize=6, zorder=4)
        said = f"{timing.median:,.0f} ms"
        if ours is not None and timing is not ours:
            said += f", {_times(timing.over(ours)[0])}"
        axes.annotate(
            said,
            (max(high, timing.median, start), place),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.5, max(values) * (max(values) / min(values)) ** 0.45 * 1.6)
    axes.set_ylim(-0.6, len(every) - 0.4)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    frame(axes, x="ms (logarithmic)", title=PANELS.get(work, work), grid="x")
    axes.set_yticks(range(len(every)), [label for label, _ in every])
    axes.minorticks_off()


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×" if ratio >= 1.5 else f"{ratio:.2f}×"

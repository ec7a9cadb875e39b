"""A graph as a picture and as HTML: model depth from left to right, one lane for each run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from reftlab.graph.edit import Edit
from reftlab.graph.layout import (
    LINE,
    Mark,
    Measure,
    Sheet,
    condition_reads,
    gap_text,
    lay_out,
    shown,
    view_text,
)
from reftlab.graph.nodes import BASE, Read
from reftlab.plotting.style import BLACK, BLUE, FONT, GREEN, ORANGE, PURPLE, VERMILLION, InlineFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reftlab.graph.graph import InterventionGraph

__all__ = ["draw_graph", "graph_html"]

_STYLES = {
    "edit": ("s", VERMILLION, "edit, on prompt tokens"),
    "edit decode": (">", ORANGE, "edit, on generated tokens"),
    "edit both": ("p", PURPLE, "edit, on prompt and generated tokens"),
    "supply": ("D", GREEN, "read that supplies an edit"),
    "condition": ("d", BLACK, "read that a condition looks at"),
    "read": ("o", BLUE, "read"),
}
_FLOW, _INK, _GREY, _LANES = GREEN, BLACK, "#5F5F5F", ("#F3F3F3", "#E6F0F7")
_ARROWS: dict[str, dict[str, Any]] = {
    "flow": {"arrowstyle": "-|>", "color": _FLOW},
    "when": {"arrowstyle": "-|>", "color": _GREY, "linestyle": (0, (3, 2))},
}
_DPI, _MOST_PIXELS = 144, 20000

Placed = dict[str, tuple[Mark, float]]
"""Marks by gid, each with its height on the sheet."""


def draw_graph(graph: InterventionGraph, layers: int | None = None) -> Figure:
    """Draw a graph.

    Args:
        graph: what to draw.
        layers: number of the model's blocks; with it, negative numbers, `[*]` and open slices are
            drawn at their places instead of at the far end or as a band.

    Returns:
        A figure of its own, not one of pyplot's; each node's marks carry the gid `edit:name`,
        `read:label`, `supply:edit` or `condition:number`, its arrows `flow:edit` where values
        flow and `when:edit` where a condition decides, each lane `lane:run`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = InlineFigure(dpi=_DPI)
    layout = lay_out(graph, layers, _measure(FigureCanvasAgg(figure).get_renderer()))
    sheet, placed = layout.sheet, Placed()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = 0.0
    for run, marks in layout.lanes.items():
        y = _draw_lane(axes, sheet, run, marks, y, placed)
    for edit in graph.edits:
        if edit.source is not None:
            _draw_arrows(axes, sheet, placed[f"supply:{edit.name}"], placed[f"edit:{edit.name}"], "flow")
    for number, edits in enumerate(condition_reads(graph).values()):
        for edit in edits:
            _draw_arrows(axes, sheet, placed[f"condition:{number}"], placed[f"edit:{edit.name}"], "when")
    y = _draw_axis(axes, sheet, y)
    y = _draw_legend(axes, sheet, [mark for mark, _ in placed.values()], y)
    axes.set_xlim(0, sheet.width)
    axes.set_ylim(y, -0.12)
    figure.set_size_inches(sheet.width, y + 0.12)
    figure.set_dpi(min(_DPI, _MOST_PIXELS / max(sheet.width, y + 0.12)))
    return figure


def _measure(renderer: Any) -> Measure:
    from matplotlib.font_manager import FontProperties

    @cache
    def measure(text: str, size: float, bold: bool) -> float:
        font = FontProperties(family=FONT, size=size, weight="bold" if bold else "normal")
        return float(renderer.get_text_width_height_descent(text, font, False)[0]) / _DPI

    return measure


def _draw_lane(axes: Any, sheet: Sheet, run: str, marks: list[Mark], y: float, placed: Placed) -> float:
    """Draw one run from `y` down and return where it ends; `placed` learns each mark's height."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    heights = sheet.row_heights(marks) or [0.25]
    bottom = y + 0.34 + sum(heights)
    colour = _LANES[run != BASE]
    round_box = "round,pad=0,rounding_size=0.06"
    box = FancyBboxPatch((0.12, y), sheet.width - 0.24, bottom - y, boxstyle=round_box, fc=colour, ec="none")
    box.set_gid(f"lane:{run}")
    axes.add_patch(box)
    for number, (column, x) in enumerate(sheet.centre.items()):
        if isinstance(column, int) and number % 2:
            stripe = Rectangle((x - sheet.step / 2, y), sheet.step, bottom - y, fc="white", alpha=0.55, lw=0)
            axes.add_patch(stripe)
    what = "base run" if run == BASE else f"run {run} (source)"
    _text(axes, 0.2, y + 0.14, what, 8.5, colour, weight="bold", color=_INK)
    if not marks:
        _text(axes, 0.2, y + 0.36, "no edits, no reads", 7.5, colour, color=_GREY)
    for mark in marks:
        top = y + 0.34 + sum(heights[: mark.row]) + 0.04
        placed[mark.gid] = (mark, top)
        _draw_mark(axes, sheet, mark, top, colour)
    return bottom + 0.12


def _draw_mark(axes: Any, sheet: Sheet, mark: Mark, y: float, lane: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape, colour, _ = _STYLES[mark.style]
    if mark.band:
        band = FancyBboxPatch(
            (mark.x[0], y - 0.07), mark.x[-1] - mark.x[0], 0.14, boxstyle="round,pad=0,rounding_size=0.05",
            fc=colour, ec="white", lw=0.6, zorder=4,
        )  # fmt: skip
        band.set_gid(mark.gid)
        axes.add_patch(band)
        middle = (mark.x[0] + mark.x[-1]) / 2
        _text(axes, middle, y, mark.band, 6.5, None, weight="bold", color="white", ha="center")
    else:
        if len(mark.x) > 1:
            axes.plot([mark.x[0], mark.x[-1]], [y, y], color=colour, lw=1.2, alpha=0.6, zorder=3)
        for x in mark.x:
            (point,) = axes.plot([x], [y], shape, ms=7, color=colour, mec="white", mew=0.7, zorder=4)
            point.set_gid(mark.gid)
    x, y = mark.text_x, y + (0.18 if mark.below else 0.0)
    if sheet.brief and mark.align == "right":
        x -= sheet.text_width(mark)
    for number, line in enumerate(mark.label):
        weight, ink = ("bold", _INK) if number == 0 else ("normal", _GREY)
        align = "left" if sheet.brief else mark.align
        _text(axes, x, y, line, sheet.size, lane, weight=weight, color=ink, ha=align)
        if sheet.brief:
            x += sheet.measure(line, sheet.size, number == 0) + 0.07
        else:
            y += sheet.size * LINE / 72


def _draw_arrows(
    axes: Any, sheet: Sheet, read: tuple[Mark, float], edit: tuple[Mark, float], kind: str
) -> None:
    """Arrows from a read's marks to the edit's, one for each pair of places."""
    from matplotlib.patches import FancyArrowPatch

    (supply, top), (mark, bottom) = read, edit
    starts, ends = _anchors(supply), _anchors(mark)
    count = max(len(starts), len(ends))
    starts, ends = (anchors * count if len(anchors) == 1 else anchors for anchors in (starts, ends))
    for start, end in zip(starts, ends, strict=False):
        # Upright arrows bow to the left, past other marks of their column; the rest bow upwards.
        bow = 0.07 if abs(end - start) < 0.2 else -0.08
        bow = 0.02 if sheet.step >= 0.5 and supply.upright else bow
        arrow = FancyArrowPatch(
            (start, top), (end, bottom), mutation_scale=9, shrinkA=4, shrinkB=4.5, lw=1.0, alpha=0.85,
            connectionstyle=f"arc3,rad={bow}", zorder=2.5, **_ARROWS[kind],
        )  # fmt: skip
        arrow.set_gid(f"{kind}:{mark.gid.removeprefix('edit:')}")
        axes.add_patch(arrow)


def _anchors(mark: Mark) -> list[float]:
    return [mark.x[0] + 0.12] if mark.band else list(mark.x)


def _draw_axis(axes: Any, sheet: Sheet, y: float) -> float:
    """Name the columns under the lanes, leaving out numbers for which there is no room."""
    taken: list[tuple[float, float]] = []
    columns = [(name, x) for name, x in sheet.centre.items() if isinstance(name, str)]
    numbers = [(n, x) for n, x in sheet.centre.items() if isinstance(n, int)]
    numbers.sort(key=lambda item: next(i for i, part in enumerate((10, 5, 2, 1)) if item[0] % part == 0))
    for column, x in [*columns, *numbers]:
        name = shown(str(column).replace("-", "−") if isinstance(column, int) else str(column))
        half = sheet.measure(name, 8.0, False) / 2 + 0.04
        if all(x + half <= a or b <= x - half for a, b in taken):
            taken.append((x - half, x + half))
            _text(axes, x, y + 0.04, name, 8.0, None, color=_INK, ha="center")
    for gap, x in sheet.gaps.items():
        _text(axes, x, y + 0.04, gap_text(gap), 8.0, None, color=_GREY, ha="center")
    if sheet.rest is not None:
        _text(axes, sheet.rest, y + 0.04, "…", 8.0, None, color=_INK, ha="center")
    if not sheet.centre:
        return y
    what = "model depth (block)" if numbers else "model depth"
    _text(axes, sheet.width / 2, y + 0.24, what, 8.5, None, color=_INK, ha="center")
    return y + 0.42


def _draw_legend(axes: Any, sheet: Sheet, marks: list[Mark], y: float) -> float:
    """Explain what occurs, in as many lines as the width needs."""
    keys = [key for key in _STYLES if any(mark.style == key for mark in marks)]
    entries = [(key, _STYLES[key][2]) for key in keys]
    if "supply" in keys:
        entries.append(("flow", "values flow"))
    if "condition" in keys:
        entries.append(("when", "decides whether the edit acts"))
    if any(len(mark.x) > 1 and not mark.band for mark in marks):
        entries.append(("joined", "joined marks: one node at several sites"))
    if any(mark.band for mark in marks):
        entries.append(("band", "bar: all blocks in this range, however many the model has"))
    x = 0.3
    for key, text in entries:
        wide = sheet.measure(text, 7.5, False) + 0.5
        if x > 0.3 and x + wide > sheet.width - 0.1:
            x, y = 0.3, y + 0.2
        _draw_key(axes, key, x, y + 0.04)
        _text(axes, x + 0.17, y + 0.04, text, 7.5, None, color=_INK)
        x += wide
    return y + (0.2 if entries else 0.0)


def _draw_key(axes: Any, key: str, x: float, y: float) -> None:
    if key in _ARROWS:
        style = {**_ARROWS[key], "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
        axes.annotate("", (x + 0.11, y), (x - 0.11, y), arrowprops=style)
    elif key == "joined":
        axes.plot([x - 0.1, x + 0.1], [y, y], "s-", ms=4, lw=1.2, color=_GREY)
    elif key == "band":
        axes.plot([x - 0.08, x + 0.08], [y, y], lw=6, color=_GREY, solid_capstyle="round")
    else:
        axes.plot([x], [y], _STYLES[key][0], ms=7, color=_STYLES[key][1], mec="white", mew=0.7)


def _text(axes: Any, x: float, y: float, text: str, size: float, halo: str | None, **style: Any) -> None:
    """Write plain text, with a halo in the lane's colour where lines may pass behind it."""
    from matplotlib.patheffects import withStroke

    style |= {"va": "center_baseline", "family": FONT, "zorder": 5, "parse_math": False, "usetex": False}
    written = axes.text(x, y, text, size=size, **style)
    if halo is not None:
        written.set_path_effects([withStroke(linewidth=2.2, foreground=halo, alpha=0.85)])


def graph_html(graph: InterventionGraph) -> str:
    """A graph as HTML: a table of its nodes, and its picture."""
    titles = ("run", "node", "site", "positions", "intervention", "source", "when", "tasks", "shared as")
    rows = [_row([run, f"source {run}", *[""] * (len(titles) - 2)]) for run in graph.sources]
    rows += [_row(_cells(node)) for node in graph.nodes if isinstance(node, Edit | Read)]
    picture = io.BytesIO()
    figure = draw_graph(graph)
    figure.savefig(picture, format="png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    wide = round(figure.get_size_inches()[0] * 96)
    return (
        f"<div><table>{_row(titles, 'th')}{''.join(rows)}</table>"
        f"<img alt='the graph as a picture' style='max-width:100%;width:{wide}px' "
        f"src='data:image/png;base64,{encoded}'></div>"
    )


def _cells(node: Edit | Read) -> list[str]:
    site = str(node.at) + ("" if node.view.whole else f" ({view_text(node.view)})")
    if isinstance(node, Read):
        return [node.run, f"read {node.label}", site, str(node.positions or "all"), *[""] * 5]
    positions = str(node.positions) + ("" if node.phase == "prompt" else f", phase {node.phase}")
    does = node.intervention.describe() + (f" at strength {node.strength:g}" if node.strength != 1.0 else "")
    does += "" if node.subspace is None else f" in directions {list(node.subspace)}"
    formula = node.intervention.formula
    read = node.source_read
    source = "" if read is None else f"{read.at} @ {read.positions} of run {read.run}"
    does = f"{does}: {formula}" if formula else does
    when = "" if node.when is None else repr(node.when)
    chosen = [name if d is None else f"{name} in {list(d)}" for name, d in node.tasks]
    where = [node.run, f"edit {node.name}", site, positions]
    return [*where, does, source, when, ", ".join(chosen), node.share or ""]


def _row(cells: Iterable[str], tag: str = "td") -> str:
    written = "".join(f"<{tag} style='text-align:left'>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{written}</tr>"

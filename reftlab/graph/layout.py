"""Where everything stands in the picture of a graph: labels are measured, marks packed into rows.

Sizes are in inches. The narrowest sheet is taken whose height stays in proportion, with labels as
long as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

from reftlab.address import SitePath
from reftlab.graph.depth import Column, DepthAxis, depth_of
from reftlab.graph.edit import Edit
from reftlab.graph.nodes import Read
from reftlab.plotting.style import with_glyphs

if TYPE_CHECKING:
    from reftlab.graph.graph import InterventionGraph

__all__ = ["LINE", "Layout", "Mark", "Measure", "Sheet", "condition_reads", "lay_out", "shown"]

LINE = 1.42
"""The font, and the height of a line in units of its size."""

Measure = Callable[[str, float, bool], float]
"""Inches that a text takes, given its size in points and whether it is bold."""

_WIDTHS, _TALLEST = (7.0, 8.5, 10.0, 12.0, 14.5, 17.5, 21.0), 0.62
_BRIEF, _MEDIUM, _FULL = 0, 1, 2
_LETTERS, _SIZES = (26, 34, 46), (7.0, 7.6, 7.6)


@dataclass(frozen=True)
class Mark:
    """A node as it is drawn.

    Attributes:
        gid: `edit:name`, `read:label`, `supply:edit`, or `condition:number` for a read that conditions
            look at, numbered as `condition_reads` has them.
        style: kind of mark.
        run: its lane.
        columns: the places that it names, or the first and the last one of a band.
        band: what a band is labelled with; empty where the places are known.
        inside: place inside the block, from −0.5 to 0.5.
        label: lines of text, the first one bold.
        fed: whether values flow into it.
        x: inches of its places.
        row: its row in the lane.
        text_x, align: where its text is anchored, and with which side.
        below: whether the text stands under the mark instead of beside it.
    """

    gid: str
    style: str
    run: str
    columns: tuple[Column, ...]
    band: str
    inside: float
    label: tuple[str, ...]
    fed: bool
    x: tuple[float, ...] = ()
    row: int = 0
    text_x: float = 0.0
    align: Literal["left", "right"] = "left"
    below: bool = False


@dataclass(frozen=True)
class Sheet:
    """The paper, with the model's columns placed on it.

    Attributes:
        measure: measures texts.
        size: font size of the labels, in points.
        brief: whether a label is one line instead of several.
        width: of the figure.
        step: width of one block.
        centre: middle of each column.
        rest: where the blocks stand whose number is not known, or None.
    """

    measure: Measure
    size: float
    brief: bool
    width: float
    step: float
    centre: dict[Column, float]
    rest: float | None

    @classmethod
    def of(cls, axis: DepthAxis, measure: Measure, size: float, brief: bool, width: float) -> Sheet:
        """Spread the columns of `axis` over a figure at least `width` wide."""
        named = {name: measure(shown(name), 8.0, False) + 0.24 for name in (*axis.left, *axis.right)}
        blocks = len(axis.blocks) + len(axis.ends)
        spare = width - 0.6 - sum(named.values()) - 0.4 * axis.open
        step = min(0.9 if blocks > 3 else 3.2, max(0.15, spare / max(1, blocks)))
        if not blocks:
            named = {name: wide + min(1.5, spare / len(named)) for name, wide in named.items()}
        x, centre = 0.3, dict[Column, float]()
        for column in chain(axis.left, axis.blocks, (None,), axis.ends, axis.right):
            wide = 0.4 * axis.open if column is None else named.get(str(column), step)
            centre["" if column is None else column] = x + wide / 2
            x += wide
        rest = centre.pop("")
        return cls(measure, size, brief, max(width, x + 0.3), step, centre, rest if axis.open else None)

    def text_width(self, mark: Mark) -> float:
        widths = [self.measure(line, self.size, number == 0) for number, line in enumerate(mark.label)]
        return sum(widths) + 0.07 * (len(widths) - 1) if self.brief else max(widths)

    def row_heights(self, marks: list[Mark]) -> list[float]:
        """Height of each row of a lane."""
        heights = [0.1] * (max((mark.row for mark in marks), default=-1) + 1)
        for mark in marks:
            lines = 1 if self.brief else len(mark.label)
            needed = lines * LINE * self.size / 72 + (0.24 if mark.below else 0.1)
            heights[mark.row] = max(heights[mark.row], needed)
        return heights


@dataclass(frozen=True)
class Layout:
    """A sheet, and the placed marks of each run from top to bottom."""

    sheet: Sheet
    lanes: dict[str, list[Mark]]

    @property
    def height(self) -> float:
        return sum(sum(self.sheet.row_heights(marks)) + 0.46 for marks in self.lanes.values()) + 0.7


def lay_out(graph: InterventionGraph, layers: int | None, measure: Measure) -> Layout:
    """Place a graph: the fullest labels and the narrowest sheet with which it is not too tall."""
    count = len(graph.edits) + len(graph.reads)
    fullest = _FULL if count <= 12 else _MEDIUM if count <= 30 else _BRIEF
    axis = DepthAxis.of(_paths(graph), layers)
    tries: list[Layout] = []
    for detail in range(fullest, _BRIEF - 1, -1):
        marks = list(_marks(graph, layers, detail))
        tries = [_try(graph, axis, marks, detail, measure, width) for width in _WIDTHS]
        if any(layout.height <= _TALLEST * layout.sheet.width for layout in tries):
            break
    good = [layout for layout in tries if layout.height <= _TALLEST * layout.sheet.width]
    wanted = good[0].height if good else min(layout.height for layout in tries)
    # Width that saves no height is left out.
    return next(layout for layout in tries if layout.height <= 1.01 * wanted)


def _try(
    graph: InterventionGraph, axis: DepthAxis, marks: list[Mark], detail: int, measure: Measure, width: float
) -> Layout:
    sheet = Sheet.of(axis, measure, _SIZES[detail], detail == _BRIEF, width)
    widest = max((sheet.text_width(mark) for mark in marks), default=0.0)
    widest = max([widest, *(measure(f"run {run} (source)", 8.5, True) for run in graph.sources)]) + 0.8
    if widest > width:
        sheet = Sheet.of(axis, measure, _SIZES[detail], detail == _BRIEF, widest)
    # A step aside inside a block says something only where the graph has several such places.
    mixed = len({mark.inside for mark in marks}) > 1
    placed = [_place(sheet, mark, mixed) for mark in marks]
    return Layout(sheet, {run: _pack(sheet, [m for m in placed if m.run == run]) for run in graph.run_order})


def _paths(graph: InterventionGraph) -> Iterator[SitePath]:
    for node in graph.nodes:
        nodes = (node, *node.reads) if isinstance(node, Edit) else (node,)
        yield from (n.at for n in nodes if isinstance(n, Edit | Read) and n.at is not None)


def condition_reads(graph: InterventionGraph) -> dict[Read, list[Edit]]:
    """Every read that a condition looks at, once, with the edits whose conditions do."""
    found: dict[Read, list[Edit]] = {}
    for edit in graph.edits:
        for read in edit.condition_reads:
            found.setdefault(read, []).append(edit)
    return found


def _marks(graph: InterventionGraph, layers: int | None, detail: int) -> Iterator[Mark]:
    conditions = condition_reads(graph)
    for number, (read, edits) in enumerate(conditions.items()):
        who = " and ".join(edit.name for edit in edits) if len(edits) < 3 else f"{len(edits)} edits"
        title = shown(f"{read.name + ' ' if read.name else ''}if → {who}", _LETTERS[detail])
        yield _mark(f"condition:{number}", "condition", read, title, layers, detail)
    for node in graph.nodes:
        if isinstance(node, Edit):
            style = "edit" if node.phase == "prompt" else f"edit {node.phase}"
            does = node.intervention.describe()
            does += "" if node.strength == 1.0 else f" · strength {node.strength:g}"
            does += "" if node.subspace is None else f" · directions {list(node.subspace)}"
            further = (does, *_terms(node))
            yield _mark(f"edit:{node.name}", style, node, node.name, layers, detail, further)
            source = node.source_read
            if source is not None:
                title = f"{source.name} → {node.name}" if source.name else f"→ {node.name}"
                yield _mark(f"supply:{node.name}", "supply", source, title, layers, detail)
        elif isinstance(node, Read):
            yield _mark(f"read:{node.label}", "read", node, node.name or "", layers, detail)


def _terms(edit: Edit) -> Iterator[str]:
    """When an edit acts, and with whom it shares its numbers, each a line."""
    if edit.when is not None:
        yield f"if {edit.when!r}"
    if edit.tasks:
        yield f"{'task' if len(edit.tasks) == 1 else 'tasks'} {', '.join(edit.task_names)}"
    if edit.share is not None:
        yield f"shared as {edit.share}"


def _mark(
    gid: str,
    style: str,
    node: Edit | Read,
    title: str,
    layers: int | None,
    detail: int,
    further: tuple[str, ...] = (),
) -> Mark:
    assert node.at is not None
    depth, limit = depth_of(node.at, layers), _LETTERS[detail]
    view = "" if node.view.whole else f" ({node.view})"
    site = shown((str(node.at) if detail == _FULL else depth.tail) + view, limit)
    own = "the edit's tokens" if style == "condition" else "all"
    positions = shown(f"@ {node.positions or own}", limit)
    lines = tuple(shown(line, limit) for line in further)
    # What says when an edit acts is worth its line longer than what it does.
    where = (site, positions, *lines) if detail == _FULL else (f"{site} {positions}", *lines[1:])
    where = where if detail != _BRIEF else where[:1]
    label = tuple(line for line in (title, *where) if line)
    fed = isinstance(node, Edit) and (node.source is not None or node.when is not None)
    return Mark(gid, style, node.run, depth.columns, depth.band, depth.inside, label, fed)


def _place(sheet: Sheet, mark: Mark, mixed: bool) -> Mark:
    x = sorted(sheet.centre[column] for column in mark.columns)
    if mark.band:
        x = [x[0] - 0.42 * sheet.step, x[-1] + 0.42 * sheet.step]
    elif mixed and isinstance(mark.columns[0], int):
        x = [place + mark.inside * sheet.step for place in x]
    return replace(mark, x=tuple(x))


def _pack(sheet: Sheet, marks: list[Mark]) -> list[Mark]:
    """Give each mark the first row in which it and its label meet no other."""
    rows: list[list[tuple[float, float]]] = []
    packed: list[Mark] = []
    last: dict[float, int] = {}
    for bare in sorted(marks, key=lambda mark: mark.x[0]):
        mark = _beside(sheet, bare)
        wide = sheet.text_width(mark)
        start = mark.text_x if mark.align == "left" else mark.text_x - wide
        low, high = min(start, mark.x[0] - 0.1) - 0.06, max(start + wide, mark.x[-1] + 0.1) + 0.06
        # Edits at one place act in the order of the graph, so they are shown from top to bottom.
        row = last.get(mark.x[0], -1) + 1
        while row < len(rows) and any(low < b and a < high for a, b in rows[row]):
            row += 1
        rows += [[] for _ in range(row + 1 - len(rows))]
        rows[row].append((low, high))
        last[mark.x[0]] = row
        packed.append(replace(mark, row=row))
    return packed


def _beside(sheet: Sheet, mark: Mark) -> Mark:
    """Find the side for a mark's label: behind it, before it, or under it where neither has room."""
    wide, edge, x = sheet.text_width(mark), sheet.width - 0.3, mark.x[0]
    behind, before = x + 0.12 + wide <= edge, x - 0.12 - wide >= 0.2
    # Values flow from left to right, and an arrow should not cross the labels at its own ends.
    if mark.style in ("supply", "condition"):
        behind = behind and not before
    elif mark.fed:
        before = False
    if len(mark.x) > 1 or not (behind or before):
        return replace(mark, below=True, text_x=min(x - 0.06, edge - wide))
    if behind:
        return replace(mark, text_x=x + 0.12)
    return replace(mark, text_x=x - 0.12, align="right")


def shown(text: str, limit: int = 26) -> str:
    """`text` with characters that the font lacks as names, cut in its middle to `limit` characters."""
    whole = with_glyphs(text)
    return whole if len(whole) <= limit else f"{whole[: limit * 2 // 3 - 1]}…{whole[-(limit // 3) :]}"

"""Where everything stands in the picture of a graph: labels are measured, marks packed into rows.

Sizes are in inches. The narrowest sheet is taken whose height stays in proportion, with labels as
long as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

from reftlab.address import SitePath, View
from reftlab.graph.depth import Column, DepthAxis, depth_of
from reftlab.graph.edit import Edit
from reftlab.graph.nodes import Read
from reftlab.plotting.style import with_glyphs

if TYPE_CHECKING:
    from reftlab.graph.graph import InterventionGraph

__all__ = [
    "LINE",
    "Layout",
    "Mark",
    "Measure",
    "Sheet",
    "condition_reads",
    "gap_text",
    "lay_out",
    "shown",
    "view_text",
]

LINE = 1.42
"""The font, and the height of a line in units of its size."""

Measure = Callable[[str, float, bool], float]
"""Inches that a text takes, given its size in points and whether it is bold."""

_WIDTHS, _TALLEST = (7.0, 8.5, 10.0, 12.0, 14.5, 17.5, 21.0), 0.62
_BRIEF, _MEDIUM, _FULL = 0, 1, 2
_LETTERS, _SIZES = (26, 34, 46), (7.0, 7.6, 7.6)
_EMPTY = 4
"""So many blocks in a row without a mark are drawn as one gap."""


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
        upright: whether an edit and the read that supplies it are at one site, so that arrows run
            straight down between them.
        x: inches of its places.
        clear: where labels behind it may begin: right of all upright marks of its last block.
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
    upright: bool = False
    x: tuple[float, ...] = ()
    clear: float = 0.0
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
        gaps: first and last block of each run of blocks that is left out, and its middle.
        rest: where the blocks stand whose number is not known, or None.
    """

    measure: Measure
    size: float
    brief: bool
    width: float
    step: float
    centre: dict[Column, float]
    gaps: dict[tuple[int, int], float]
    rest: float | None

    @classmethod
    def of(
        cls,
        axis: DepthAxis,
        marks: Collection[Mark],
        measure: Measure,
        size: float,
        brief: bool,
        width: float,
        titles: float = 0.0,
    ) -> Sheet:
        """Spread the columns of `axis` over a figure at least `width` wide.

        Long runs of blocks without a mark are left out. `titles` is the width of the lanes' titles, which
        arrows down through the lanes should not cross.
        """
        # A band covers all blocks of its range, so then none are left out.
        used = {column for mark in marks for column in mark.columns}
        used |= {*axis.blocks, *axis.ends} if any(mark.band for mark in marks) else set()
        named = {name: measure(shown(name), 8.0, False) + 0.24 for name in (*axis.left, *axis.right)}
        front, ends = _columns(axis.blocks, used), _columns(axis.ends, used)
        gaps = {
            gap: measure(gap_text(gap), 8.0, False) + 0.2 for gap in (*front, *ends) if isinstance(gap, tuple)
        }
        if front and isinstance(front[0], tuple) and not axis.left and any(mark.upright for mark in marks):
            gaps[front[0]] = max(gaps[front[0]], titles)
        blocks = len(front) + len(ends) - len(gaps)
        spare = width - 0.6 - sum(named.values()) - sum(gaps.values()) - 0.4 * axis.open
        step = min(0.9 if blocks > 3 else 3.2, max(0.15, spare / max(1, blocks)))
        if not blocks:
            named = {name: wide + min(1.5, spare / len(named)) for name, wide in named.items()}
        x, centre, left_out = 0.3, dict[Column, float](), dict[tuple[int, int], float]()
        for column in chain(axis.left, front, (None,), ends, axis.right):
            if isinstance(column, tuple):
                wide = gaps[column]
                left_out[column] = x + wide / 2
            else:
                wide = 0.4 * axis.open if column is None else named.get(str(column), step)
                centre["" if column is None else column] = x + wide / 2
            x += wide
        rest = centre.pop("") if axis.open else None
        centre.pop("", None)
        return cls(measure, size, brief, max(width, x + 0.3), step, centre, left_out, rest)

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
    titles = max(measure(f"run {run} (source)", 8.5, True) for run in ("", *graph.sources))
    size, brief = _SIZES[detail], detail == _BRIEF
    sheet = Sheet.of(axis, marks, measure, size, brief, width, titles)
    widest = max((sheet.text_width(mark) for mark in marks), default=0.0)
    widest = max(widest, titles) + 0.8
    if widest > width:
        sheet = Sheet.of(axis, marks, measure, size, brief, widest, titles)
    # A step aside inside a block says something only where the graph has several such places.
    mixed = len({mark.inside for mark in marks}) > 1
    placed = list(_clear(list(_apart(sheet, [_place(sheet, mark, mixed) for mark in marks]))))
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
            further, source = (does, *_terms(node)), node.source_read
            upright = source is not None and source.at == node.at
            mark = _mark(f"edit:{node.name}", style, node, node.name, layers, detail, further)
            yield replace(mark, upright=upright)
            if source is not None:
                title = f"{source.name} → {node.name}" if source.name else f"→ {node.name}"
                mark = _mark(f"supply:{node.name}", "supply", source, title, layers, detail)
                yield replace(mark, upright=upright)
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
    view = "" if node.view.whole else f" ({view_text(node.view)})"
    site = shown((str(node.at) if detail == _FULL else depth.tail) + view, limit)
    own = "the edit's tokens" if style == "condition" else "all"
    positions = shown(f"@ {node.positions or own}", limit)
    lines = tuple(part for line in further for part in _wrapped(line, limit))
    # What says when an edit acts is worth its line longer than what it does.
    where = (
        (site, positions, *lines)
        if detail == _FULL
        else (f"{site} {positions}", *lines[len(_wrapped(further[0], limit)) if further else 0 :])
    )
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


def _apart(sheet: Sheet, marks: list[Mark]) -> Iterator[Mark]:
    """Edits at one place, with the reads that supply them, each a little further right than the one before.

    Their arrows run straight down, and would else hide each other.
    """
    room = sheet.step >= 0.5
    taken: list[tuple[str, tuple[float, ...]]] = []
    for mark in marks:
        if not (room and mark.upright):
            yield mark
            continue
        name = mark.gid.partition(":")[2]
        before = {other for other, x in taken if other != name and set(x) & set(mark.x)}
        taken.append((name, mark.x))
        yield replace(mark, x=tuple(x + 0.14 * min(len(before), 3) for x in mark.x))


def _clear(marks: list[Mark]) -> Iterator[Mark]:
    """Say of each mark where its label may begin without meeting arrows down from its block."""
    last: dict[Column, float] = {}
    for mark in marks:
        if mark.upright:
            last[mark.columns[-1]] = max(mark.x[-1], last.get(mark.columns[-1], 0.0))
    for mark in marks:
        yield replace(mark, clear=max(mark.x[-1], last.get(mark.columns[-1], 0.0) if mark.upright else 0.0))


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
    behind, before = mark.clear + 0.12 + wide <= edge, x - 0.12 - wide >= 0.2
    # Values flow from left to right, and an arrow should not cross the labels at its own ends.
    if mark.style in ("supply", "condition") and not mark.upright:
        behind = behind and not before
    elif mark.fed or mark.upright:
        before = False
    if len(mark.x) > 1:
        # Behind the last mark, so that arrows from and to the others do not cross it.
        before = False
    if not (behind or before):
        return replace(mark, below=True, text_x=min(x - 0.06, edge - wide))
    if behind:
        return replace(mark, text_x=mark.clear + 0.12)
    return replace(mark, text_x=x - 0.12, align="right")


def _columns(numbers: Collection[int], used: Collection[Column]) -> list[int | tuple[int, int]]:
    """Block numbers, with (first, last) in place of each long run of blocks that are not used."""
    found: list[int | tuple[int, int]] = []
    empty: list[int] = []
    for number in (*numbers, None):
        if number is not None and number not in used:
            empty.append(number)
            continue
        found += empty if len(empty) < _EMPTY else [(empty[0], empty[-1])]
        empty = []
        found += [] if number is None else [number]
    return found


def gap_text(gap: tuple[int, int]) -> str:
    """`0 … 20`, the blocks that are left out."""
    return " … ".join(str(number).replace("-", "−") for number in gap)


def view_text(view: View) -> str:
    """A view in words, `head 3` or `heads 2, 5`."""
    return f"head {view.heads[0]}" if view.heads is not None and len(view.heads) == 1 else str(view)


def _wrapped(text: str, limit: int) -> tuple[str, ...]:
    """`text` in one line or, where it is longer than `limit`, broken once at a comma or an operator."""
    whole = with_glyphs(text)
    cuts = [whole.rfind(mark, 0, limit) + len(mark) for mark in (", ", " & ", " | ") if mark in whole[:limit]]
    if len(whole) <= limit or not cuts:
        return (shown(text, limit),)
    return whole[: max(cuts)].rstrip(), shown("    " + whole[max(cuts) :], limit)


def shown(text: str, limit: int = 26) -> str:
    """`text` with characters that the font lacks as names, cut in its middle to `limit` characters."""
    whole = with_glyphs(text)
    return whole if len(whole) <= limit else f"{whole[: limit * 2 // 3 - 1]}…{whole[-(limit // 3) :]}"

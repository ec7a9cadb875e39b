"""What a graph may not say of a real model, told when it is bound."""

from __future__ import annotations

from collections.abc import Iterable

from reftlab.errors import BindError
from reftlab.graph import BASE, InterventionGraph
from reftlab.graph.edit import alike
from reftlab.runtime.places import BoundEdit, BoundRead

__all__ = ["check_edit", "check_runs", "check_shared"]


def check_runs(graph: InterventionGraph) -> None:
    """Refuse edits in runs that nobody reads, and sources that wait for the base run."""
    needed = {read.run for edit in graph.edits for read in edit.reads} | {read.run for read in graph.reads}
    for edit in graph.edits:
        if edit.run != BASE and edit.run not in needed:
            raise BindError(
                f"edit {edit.name!r} acts in run {edit.run!r}, and nothing reads that run; leave the edit "
                f"out, or read from it with source=Read(run={edit.run!r})"
            )
        if edit.run != BASE and any(read.run == BASE for read in edit.reads):
            raise BindError(
                f"edit {edit.name!r} in run {edit.run!r} reads from the base run, which is computed last; "
                "add a source with the same inputs, Source('clean', inputs='base'), and read from that"
            )


def check_edit(bound: BoundEdit) -> None:
    """Refuse sources and conditions of another width, reads that come too late, and tokens that differ."""
    source = bound.source
    if source is not None and source.width != bound.width:
        raise BindError(
            f"edit {bound.edit.name!r} acts on vectors of {bound.width} features at {bound.site}, its "
            f"source reads vectors of {source.width} at {source.site}; choose heads= or features= of "
            "the same width"
        )
    for read in bound.reads:
        if read.run == bound.edit.run and read.order > bound.order:
            raise BindError(
                f"edit {bound.edit.name!r} at {bound.site} needs {read.site} of the same run, which is "
                "reached later; read from another run, or from an earlier site"
            )
    for read in bound.when.values():
        _check_tokens(bound, read)
    for node, width in () if bound.edit.when is None else bound.edit.when.widths:
        read = bound.when[node]
        if read.width not in (0, width):
            raise BindError(
                f"edit {bound.edit.name!r}: its condition has {width} numbers for vectors of "
                f"{read.width} features at {read.site}"
            )


def _check_tokens(bound: BoundEdit, read: BoundRead) -> None:
    if read.positions.generated and not read.follows:
        raise BindError(
            f"edit {bound.edit.name!r}: its condition reads {str(read.positions)!r}; leave the positions "
            "out, and it is asked of the edit's own tokens, generated ones too"
        )
    if read.follows and read.place.stream != bound.place.stream:
        raise BindError(
            f"edit {bound.edit.name!r}: its condition reads {read.site} at the edit's own tokens, and that "
            f"site's tokens are others than those of {bound.site}; give the read positions of its own"
        )
    if read.follows and read.run != bound.edit.run and bound.edit.phase != "prompt":
        raise BindError(
            f"edit {bound.edit.name!r}: its condition reads generated tokens in run {read.run!r}, which has "
            "none"
        )


def check_shared(edits: Iterable[BoundEdit]) -> None:
    """Refuse one intervention for edits that need different ones."""
    first: dict[str, BoundEdit] = {}
    for bound in edits:
        other = first.setdefault(bound.module, bound)
        if bound.edit.share is None and other is bound:
            continue
        if other.edit.share is None or bound.edit.share is None:
            raise BindError(
                f"edit {bound.key!r} and edit {other.key!r} would both be called {bound.module!r}; choose "
                "another word for share="
            )
        same = alike(bound.edit.intervention, other.edit.intervention)
        if not same or bound.width != other.width:
            raise BindError(
                f"edits {other.key!r} and {bound.key!r} share {bound.module!r} and differ: "
                f"{other.edit.intervention.describe()} on {other.width} features and "
                f"{bound.edit.intervention.describe()} on {bound.width}"
            )

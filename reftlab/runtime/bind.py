"""From a graph to the places of a real model, in the order in which they are reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from reftlab.address import (
    ATTENTION_SIDES,
    All,
    Position,
    Site,
    SitePath,
    View,
    head_size,
    resolve,
    splits_by_heads,
)
from reftlab.errors import AddressError, BindError, ReftlabError
from reftlab.graph import Edit, InterventionGraph, Phase, Read
from reftlab.runtime.axes import ATTENTION
from reftlab.runtime.check import check_edit, check_runs, check_shared
from reftlab.runtime.places import BoundEdit, BoundRead, Place
from reftlab.runtime.scan import SiteFacts, scan

__all__ = ["bind_nodes", "bind_reads"]


def bind_nodes(
    graph: InterventionGraph, model: nn.Module, example: Any = None
) -> tuple[tuple[BoundEdit, ...], tuple[BoundRead, ...]]:
    """Resolve every node of a graph against a model.

    Raises:
        AddressError: a path or view that the model does not have.
        BindError: a site that does not fit, or a read taken after the edit that needs it.
    """
    check_runs(graph)
    edit_sites = {edit.name: _sites(edit.at, model, f"edit {edit.name!r}") for edit in graph.edits}
    fed_by = {
        (edit.name, read): _matching_sites(edit, read, edit_sites[edit.name], model)
        for edit in graph.edits
        for read in edit.reads
    }
    read_sites = {read.label: _sites(read.at, model, str(read)) for read in graph.reads}
    groups = (edit_sites, fed_by, read_sites)
    every = (site for group in groups for sites in group.values() for site in sites)  # type: ignore[attr-defined]
    facts = scan(model, every, example)
    edits = []
    for edit in graph.edits:
        for number, site in enumerate(edit_sites[edit.name]):
            feeding = {read: fed_by[edit.name, read][number] for read in edit.reads}
            edits.append(_bound_edit(edit, site, feeding, facts, model))
            check_edit(edits[-1])
    check_shared(edits)
    return tuple(edits), tuple(_each_read(graph.reads, read_sites, facts, model))


def bind_reads(reads: list[Read], model: nn.Module, example: Any = None) -> tuple[BoundRead, ...]:
    """Resolve reads that are not part of a graph."""
    sites = {read.label: _sites(read.at, model, str(read)) for read in reads}
    facts = scan(model, (site for group in sites.values() for site in group), example)
    return tuple(_each_read(reads, sites, facts, model))


def _each_read(
    reads: Any, sites: dict[str, list[Site]], facts: dict[Site, SiteFacts], model: nn.Module
) -> Iterator[BoundRead]:
    for read in reads:
        for site in sites[read.label]:
            label = f"{read.label}[{site.label}]" if site.label and read.name else read.label
            if site.label and not read.name:
                label = f"{site}{read.view.suffix} @ {read.positions or 'all'}"
            yield _bound_read(read, site, facts, model, label)


def _bound_read(
    read: Read, site: Site, facts: dict[Site, SiteFacts], model: nn.Module, label: str
) -> BoundRead:
    positions = read.positions or All()
    place = _place(read.view, positions, facts[site], site, model, str(read))
    phase: Phase = "decode" if positions.generated else "prompt"
    return BoundRead(label, place, _width(place, positions), positions, read.run, phase)


def _bound_edit(
    edit: Edit, site: Site, feeding: dict[Read, Site], facts: dict[Site, SiteFacts], model: nn.Module
) -> BoundEdit:
    """An edit at one of its sites, with its reads at the sites in `feeding`."""
    key = f"{edit.name}[{site.label}]" if site.label else edit.name
    place = _place(edit.view, edit.positions, facts[site], site, model, f"edit {edit.name!r}")

    def fed(read: Read, what: str) -> BoundRead:
        return _fed(edit, read, feeding[read], facts, model, f"{key}.{what}", what == "source")

    source = edit.source_read
    return BoundEdit(
        key,
        edit.share or key,
        edit,
        place,
        _width(place, edit.positions),
        None if source is None else fed(source, "source"),
        {read: fed(read, f"when{number}") for number, read in enumerate(edit.condition_reads)},
    )


def _fed(
    edit: Edit,
    read: Read,
    site: Site,
    facts: dict[Site, SiteFacts],
    model: nn.Module,
    label: str,
    is_source: bool,
) -> BoundRead:
    """A read that an edit needs; where it says no positions, it is at the edit's own tokens."""
    own = (edit.source if is_source else read).positions is None  # type: ignore[union-attr]
    positions = edit.positions if own else read.positions
    assert positions is not None
    place = _place(read.view, positions, facts[site], site, model, f"{read!s} of edit {edit.name!r}")
    owner = (f"{edit.name}.source" if is_source else edit.name) if own or is_source else ""
    phase = edit.phase if own else "prompt"
    return BoundRead(label, place, _width(place, positions), positions, read.run, phase, owner, own)


def _sites(path: SitePath | None, model: nn.Module, who: str) -> list[Site]:
    assert path is not None
    try:
        return resolve(path, model)
    except AddressError as error:
        raise AddressError(f"{who}: {error}") from error


def _matching_sites(edit: Edit, read: Read, own: list[Site], model: nn.Module) -> list[Site]:
    kind = "source" if read == edit.source_read else "condition"
    sites = _sites(read.at, model, f"{kind} of edit {edit.name!r}")
    if len(sites) == 1:
        return sites * len(own)
    if len(sites) != len(own):
        raise BindError(
            f"edit {edit.name!r} acts at {len(own)} sites and its {kind} reads {len(sites)}; they must "
            f"be as many, or {kind} one"
        )
    return sites


def _width(place: Place, positions: Position) -> int:
    """Number of features that a vector at a place has; 0 where that depends on the call."""
    if place.site_width is None:
        return 0
    return positions.joins * (place.site_width if place.index is None else len(place.index))


def _place(view: View, positions: Position, fact: SiteFacts, site: Site, model: nn.Module, who: str) -> Place:
    """Axes, order, width and feature index of a view at a site."""
    if fact.axes is None:
        if fact.calls > 1:
            raise BindError(
                f"{who}: {site} is reached {fact.calls} times in one forward pass, and reftlab cannot say "
                "which one is meant; choose a module that runs once"
            )
        raise BindError(
            f"{who}: {site} has shape {fact.shape}, in which reftlab knows no rows of tokens; it acts on "
            "(row, feature), (row, token, feature), (row, channel, height, width) and attention's (row, "
            "head, token, key)"
        )
    if fact.stream == "calls" and positions == All() and not _is_cell(model, site):
        raise BindError(
            f"{who}: {site} is reached {fact.calls} times in one forward pass; say which of them, as in "
            "positions=[0] for the first, or positions='every'"
        )
    if fact.stream == "row" and positions != All():
        raise BindError(
            f"{who}: {site} has shape {fact.shape}, no token axis, so positions must be 'all', not "
            f"{str(positions)!r}"
        )
    if not fact.dtype.is_floating_point:
        raise BindError(f"{who}: {site} holds {fact.dtype} numbers; reftlab acts on floating-point vectors")
    if site.side in ATTENTION_SIDES or fact.axes == ATTENTION:
        return _attention_place(view, fact, site, who)
    width, part, size = fact.width, None, None
    if site.part:
        from reftlab.address.parts import part_index

        part, size = part_index(model, site)
        width = len(part)
    elif view.heads is not None:
        size = head_size(model, site.module)
        if not splits_by_heads(model, site.module, site.side):
            raise AddressError(
                f"{who}: heads={list(view.heads)}: the features of {site} are not one head after the other; "
                "take 'blocks[i].attn.heads', an output of the query, key or value projection, or features="
            )
    try:
        index = view.index(width, str(site), size)
    except ReftlabError as error:
        raise type(error)(f"{who}: {error}") from error
    if part is not None:
        index = part if index is None else part[index]
    return Place(site, fact.order, fact.axes, fact.stream, fact.width, index)


def _is_cell(model: nn.Module, site: Site) -> bool:
    return isinstance(model.get_submodule(site.module), nn.RNNCellBase)


def _attention_place(view: View, fact: SiteFacts, site: Site, who: str) -> Place:
    """A place whose vectors are rows of scores or of a pattern, one for each head."""
    if view.features is not None or view.feature_slice is not None:
        raise AddressError(
            f"{who}: features= at {site}: its features are keys, of which every call has its own number; use "
            "heads="
        )
    assert fact.axes is not None
    heads = fact.shape[1]
    try:
        view.index(heads, str(site), 1)
    except ReftlabError as error:
        raise type(error)(f"{who}: {error}") from error
    return Place(site, fact.order, fact.axes, fact.stream, None, None, view.heads, heads)

"""From a graph to the places of a real model, in the order in which they are reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reftlab.address import All, Position, Site, SitePath, View, head_size, resolve, splits_by_heads
from reftlab.errors import AddressError, BindError, ReftlabError
from reftlab.graph import BASE, Edit, InterventionGraph, Read
from reftlab.runtime.scan import SiteFacts, scan

__all__ = ["BoundEdit", "BoundRead", "Interventions", "bind_nodes", "bind_reads"]


@dataclass(frozen=True, eq=False)
class BoundRead:
    """A read at one place of one model.

    Attributes:
        label: name of the result.
        site: the place.
        order: when it is reached in a forward pass.
        width: number of features read.
        index: which features of the site's last axis, `(width,)` int64, or None for all.
        positions: which tokens.
        run: in which run.
    """

    label: str
    site: Site
    order: int
    width: int
    index: Tensor | None
    positions: Position
    run: str


@dataclass(frozen=True, eq=False)
class BoundEdit:
    """An edit at one place of one model.

    Attributes:
        key: its name in `BoundModel.interventions`: the edit's name, and `name[label]` where the
            edit's path names several places.
        edit: the node.
        site, order, width, index: as in `BoundRead`.
        source: where its source's vectors come from, or None.
    """

    key: str
    edit: Edit
    site: Site
    order: int
    width: int
    index: Tensor | None
    source: BoundRead | None


class Interventions(nn.ModuleDict):
    """Built interventions by name.

    Unlike its base it takes names of its own methods, `values` or `train`; and its numbers stay
    float32 where the model is cast to another type, as training needs them.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def kept(tensor: Tensor) -> Tensor:
            changed: Tensor = fn(tensor)
            return changed.float() if changed.is_floating_point() else changed

        return super()._apply(kept, recurse)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def bind_nodes(
    graph: InterventionGraph, model: nn.Module, example: Any = None
) -> tuple[tuple[BoundEdit, ...], tuple[BoundRead, ...]]:
    """Resolve every node of a graph against a model.

    Raises:
        AddressError: a path or view that the model does not have.
        BindError: a site that does not fit, or a read taken after the edit that needs it.
    """
    _check_runs(graph)
    edit_sites = {edit.name: _sites(edit.at, model, f"edit {edit.name!r}") for edit in graph.edits}
    source_sites = {
        edit.name: _source_sites(edit, edit_sites[edit.name], model)
        for edit in graph.edits
        if edit.source is not None
    }
    read_sites = {read.label: _sites(read.at, model, str(read)) for read in graph.reads}
    groups = (edit_sites, source_sites, read_sites)
    facts = scan(model, (s for group in groups for sites in group.values() for s in sites), example)
    edits = []
    for edit in graph.edits:
        for number, site in enumerate(edit_sites[edit.name]):
            key = f"{edit.name}[{site.label}]" if site.label else edit.name
            source = None
            if edit.source is not None:
                read = edit.source_read
                assert read is not None
                source = _bound_read(read, source_sites[edit.name][number], facts, model, f"{key}.source")
            place = _place(edit.view, edit.positions, site, facts, model, f"edit {edit.name!r}")
            edits.append(BoundEdit(key, edit, site, *place, source))
    for bound in edits:
        _check_source(bound)
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
                label = f"{site} @ {read.positions or 'all'}"
            yield _bound_read(read, site, facts, model, label)


def _bound_read(
    read: Read, site: Site, facts: dict[Site, SiteFacts], model: nn.Module, label: str
) -> BoundRead:
    positions = read.positions or All()
    place = _place(read.view, positions, site, facts, model, str(read))
    return BoundRead(label, site, *place, positions, read.run)


def _sites(path: SitePath | None, model: nn.Module, who: str) -> list[Site]:
    assert path is not None
    try:
        return resolve(path, model)
    except AddressError as error:
        raise AddressError(f"{who}: {error}") from error


def _source_sites(edit: Edit, own: list[Site], model: nn.Module) -> list[Site]:
    read = edit.source_read
    assert read is not None
    sites = _sites(read.at, model, f"source of edit {edit.name!r}")
    if len(sites) == 1:
        return sites * len(own)
    if len(sites) != len(own):
        raise BindError(
            f"edit {edit.name!r} acts at {len(own)} sites and its source reads {len(sites)}; they must "
            "be as many, or the source one"
        )
    return sites


def _place(
    view: View,
    positions: Position,
    site: Site,
    facts: dict[Site, SiteFacts],
    model: nn.Module,
    who: str,
) -> tuple[int, int, Tensor | None]:
    """Order, width and feature index of a view at a site."""
    fact = facts[site]
    if fact.calls > 1:
        raise BindError(
            f"{who}: {site} is reached {fact.calls} times in one forward pass, and reftlab cannot say "
            "which one is meant; choose a module that runs once"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "encoder" not in site.module.split("."):
        raise BindError(
            f"{who}: {site} is not in the encoder; of an encoder-decoder model reftlab knows the encoder's "
            "tokens only"
        )
    if len(fact.shape) not in (2, 3):
        raise BindError(
            f"{who}: {site} has shape {fact.shape}; reftlab acts on (row, feature) and (row, token, feature)"
        )
    if len(fact.shape) == 2 and positions != All():
        raise BindError(
            f"{who}: {site} has shape {fact.shape}, no token axis, so positions must be 'all', not "
            f"{str(positions)!r}"
        )
    if not fact.dtype.is_floating_point:
        raise BindError(f"{who}: {site} holds {fact.dtype} numbers; reftlab acts on floating-point vectors")
    if view.heads is not None and not splits_by_heads(model, site.module, site.side):
        raise AddressError(
            f"{who}: heads={list(view.heads)}: the features of {site} are not one head after the other; take "
            "'blocks[i].attn.heads', an output of the query, key or value projection, or features="
        )
    try:
        index = view.index(fact.width, str(site), head_size(model, site.module))
    except ReftlabError as error:
        raise type(error)(f"{who}: {error}") from error
    return fact.order, fact.width if index is None else len(index), index


def _check_runs(graph: InterventionGraph) -> None:
    read = {edit.source.run for edit in graph.edits if edit.source is not None} | {r.run for r in graph.reads}
    for edit in graph.edits:
        if edit.run != BASE and edit.run not in read:
            raise BindError(
                f"edit {edit.name!r} acts in run {edit.run!r}, and nothing reads that run; leave the edit "
                f"out, or read from it with source=Read(run={edit.run!r})"
            )
        source = edit.source_read
        if source is not None and source.run == BASE != edit.run:
            raise BindError(
                f"edit {edit.name!r} in run {edit.run!r} reads from the base run, which is computed last; "
                "give the same inputs to a source and read from that"
            )


def _check_source(bound: BoundEdit) -> None:
    source = bound.source
    if source is None:
        return
    if source.width != bound.width:
        raise BindError(
            f"edit {bound.edit.name!r} acts on vectors of {bound.width} features at {bound.site}, its "
            f"source reads vectors of {source.width} at {source.site}; choose heads= or features= of "
            "the same width"
        )
    if source.run == bound.edit.run and source.order > bound.order:
        raise BindError(
            f"edit {bound.edit.name!r} at {bound.site} needs {source.site} of the same run, which is "
            "reached later; read from another run, or from an earlier site"
        )

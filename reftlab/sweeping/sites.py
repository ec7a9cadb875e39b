"""The sites of a sweep, and where in the chain of blocks a change at each of them begins to matter."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import (
    ATTENTION_SIDES,
    Site,
    head_size,
    parse_path,
    portable_names,
    resolve,
    splits_by_heads,
)
from reftlab.errors import AddressError, DataError, RunError
from reftlab.runtime.cone import BlockStack
from reftlab.runtime.options import Options
from reftlab.runtime.places import Place

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["SweptSite", "entry_of", "kind_of", "swept_sites"]

_LOCAL = ("attn.output", "attn.heads", "attn.q", "mlp.output")


@dataclass(frozen=True, eq=False)
class SweptSite:
    """One site of a sweep.

    Attributes:
        name: the place in the model's own words.
        path: the path that named it, such as `blocks[*].output`.
        place: where it is.
        block: number of the block that it is in, or None.
        parts: features of each head, `(d_head,)` int64, or one entry for the whole vector, where None
            stands for all features.
        local: whether a change at one token acts on that token alone inside its block.
    """

    name: str
    path: str
    place: Place
    block: int | None
    parts: tuple[Tensor | None, ...]
    local: bool = False

    @property
    def site(self) -> Site:
        return self.place.site


def swept_sites(reft: BoundModel, sites: Any, heads: bool = False) -> tuple[SweptSite, ...]:
    """Resolve the sites of a sweep.

    Args:
        reft: the bound model.
        sites: one path, or several.
        heads: whether each head is on its own.

    Raises:
        AddressError: a path that the model does not have, or one whose features are no heads.
        DataError: no sites, or one twice.
        RunError: a site whose tensor has no axis of tokens and features, or one that comes before a folded
            edit acts.
    """
    paths = [sites] if isinstance(sites, str) else list(sites)
    if not paths or not all(isinstance(path, str) for path in paths):
        raise DataError(f"sites={sites!r}: expected a path such as 'blocks[*].output', or several")
    model = reft.model
    found = [(path, site) for path in paths for site in resolve(parse_path(path), model)]
    names = [str(site) for _, site in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"sites={sites!r} name {twice[0]} twice")
    # The bound model remembers what it has bound.
    reads = reft._bound(tuple(paths), None)
    reft._folds.check(reft, Options.of(reft.graph), reads)
    places = {str(read.site): read.place for read in reads}
    stack = BlockStack.of(model)
    local = _local(model)
    swept = []
    for path, site in found:
        place = places[str(site)]
        _check(place, str(site))
        block = _block(site.module, stack)
        parts = _heads(model, place) if heads else (place.index,)
        swept.append(
            SweptSite(str(site), path, place, block, parts, _plain_name(site, block, stack) in local)
        )
    counts = {len(site.parts) for site in swept}
    if len(counts) > 1:
        raise DataError(f"sites={sites!r} have {sorted(counts)} heads; sweep those of one number at a time")
    return tuple(swept)


def kind_of(site: SweptSite, stack: BlockStack) -> tuple[str, str, str]:
    """What a site has in common with its like in other blocks: module inside the block, side and part."""
    return _plain_name(site.site, site.block, stack)


def entry_of(site: Site, stack: BlockStack) -> tuple[int, bool] | None:
    """The first block that a change at a site can influence, and whether it is that block's input.

    The number of blocks stands for what comes after the last of them. None where the site is neither in
    the chain of blocks nor at one of its ends.
    """
    block = stack.block_of(site.module)
    if block is not None:
        if site.module == stack.paths[block]:
            if site.leaf:
                return None
            return (block + 1, True) if site.side == "output" else (block, True)
        return block, False
    if site.module in stack.before and site.side == "output" and not site.leaf:
        return 0, True
    return (len(stack), False) if site.module in stack.after else None


def _check(place: Place, name: str) -> None:
    if place.site.side in ATTENTION_SIDES or place.site_width is None:
        raise RunError(
            f"sites: {name} holds attention scores or patterns, whose vectors are as wide as the "
            "prompt is long; sweep sites of features, such as 'blocks[*].attn.heads'"
        )
    if place.stream not in ("tokens", "decoder"):
        raise RunError(f"sites: {name} has no axis of the prompt's tokens, so it has no positions to sweep")


def _heads(model: nn.Module, place: Place) -> tuple[Tensor, ...]:
    """The features of each head at a place."""
    site, size = place.site, head_size(model, place.site.module)
    width = place.site_width if place.index is None else len(place.index)
    whole = bool(site.part) or splits_by_heads(model, site.module, site.side)
    if size is None or not whole or width is None or width % size:
        raise AddressError(
            f"heads=True: the features of {site} are not one head after the other; take "
            "sites='blocks[*].attn.heads', or 'blocks[*].attn.q' and its like"
        )
    features = torch.arange(width) if place.index is None else place.index
    return tuple(features.split(size))


def _block(module: str, stack: BlockStack | None) -> int | None:
    if stack is not None:
        return stack.block_of(module)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return None if number is None else int(number[1])


def _plain_name(site: Site, block: int | None, stack: BlockStack | None) -> tuple[str, str, str]:
    prefix = "" if stack is None or block is None else stack.paths[block]
    return site.module.removeprefix(prefix), site.side, site.part


def _local(model: nn.Module) -> set[tuple[str, str, str]]:
    """Sites inside a block at which a token acts on no other token before the block ends."""
    stack = BlockStack.of(model)
    if stack is None:
        return set()
    known = portable_names(model)
    wanted = [f"blocks[0].{part}" for part in _LOCAL if f"blocks[*].{part}" in known]
    return {
        _plain_name(replace(site, label=""), 0, stack)
        for path in wanted
        for site in resolve(parse_path(path), model)
    }

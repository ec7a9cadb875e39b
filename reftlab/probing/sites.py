"""The rows of a map: what a user names as sites, each a place of its own, and each head of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from reftlab.address import Position, Site, SitePath, View, head_size, parse_path, resolve
from reftlab.address.path import Child, Entries, Every
from reftlab.errors import AddressError, DataError
from reftlab.graph import Read
from reftlab.graph.nodes import replace_read
from reftlab.runtime import BoundModel
from reftlab.runtime.bind import bind_reads

__all__ = ["ProbedSite", "WantedSite", "is_list", "named_site", "path_of", "reads_of", "wanted_sites"]

_VIEW = re.compile(r"(.*) \((heads|features) ([^()]+)\)")


@dataclass(frozen=True)
class ProbedSite:
    """A site of a map.

    Attributes:
        name: the path, such as `blocks[5].output`, or the name of the read; with the heads or features that
            are meant, `blocks[5].attn.heads (heads 3)`.
        raw: the place in the model's own words; the name where the model is not at hand.
        block: number of the block that it is in, as far as the name says, or None.
        head: number of the attention head, where it is one.
        read: what is read there, without positions; None where the name does not say it.
    """

    name: str
    raw: str
    block: int | None
    head: int | None = None
    read: Read | None = field(default=None, repr=False)


@dataclass(frozen=True)
class WantedSite:
    """A site, and its own positions where it names some."""

    site: ProbedSite
    positions: Position | None


def reads_of(sites: Any) -> list[tuple[Read, bool]]:
    """Sites as reads, and whether each is of one head after the other.

    Args:
        sites: a path, a read, or several of both.

    Raises:
        DataError: anything else, or a path with positions.
    """
    given = [sites] if isinstance(sites, str | SitePath | Read) else list(sites) if is_list(sites) else []
    if not given or not all(isinstance(one, str | SitePath | Read) for one in given):
        raise DataError(
            f"sites={sites!r}: expected a path such as 'blocks[*].output', an rl.Read, or several of them"
        )
    found = []
    for one in given:
        if isinstance(one, Read):
            if one.at is None:
                raise DataError(f"sites={one!r}: a read here needs a site, as in rl.Read('blocks[5].output')")
            found.append((one, False))
            continue
        if "@" in str(one):
            raise DataError(
                f"sites={one!r}: give the positions as positions=, 'last' or several, or write "
                f"rl.Read({str(one)!r})"
            )
        path = parse_path(one)
        found.append((Read(path), _is_of_heads(path)))
    return found


def wanted_sites(sites: Any, model: nn.Module) -> list[WantedSite]:
    """Every place that sites name in a model, under a name of its own.

    A path `….attn.heads` names each head, and a read what it says: all heads together unless it has `heads=`.

    Raises:
        AddressError: a site that the model does not have.
        DataError: no sites, or one twice.
    """
    bare = model.model if isinstance(model, BoundModel) else model
    found = []
    for read, by_head in reads_of(sites):
        assert read.at is not None
        places = resolve(read.at, bare)
        own = [replace_read(read, at=_own_path(read.at, place), positions=None) for place in places]
        counted = by_head or any(head < 0 for head in read.heads or ())
        every = replace_read(read, heads=None)
        counts = _head_counts(every, places, model) if counted else [0] * len(places)
        for place, one, count in zip(places, own, counts, strict=True):
            # From here on heads are counted from the first, so that each has one name.
            heads = [head % count for head in one.heads or ()] if counted else list(one.heads or ())
            named = [replace_read(one, heads=heads)] if heads else [one]
            for each in [replace_read(one, heads=head) for head in range(count)] if by_head else named:
                found.append(WantedSite(_probed(each, place), read.positions))
    _refuse_twice(found)
    return found


def named_site(name: str) -> ProbedSite:
    """The site that a collection's read is named for, without its positions."""
    read = _read_of(name)
    head = None if read is None else _only_head(read)
    return ProbedSite(name, name, _block_number(name), head, read)


def _read_of(name: str) -> Read | None:
    """The read without positions that a name such as `blocks[2].attn.heads (heads 3)` speaks of, or None."""
    found = _VIEW.fullmatch(name)
    try:
        if found is None:
            return Read(name)
        return Read(found[1], **{found[2]: _numbers(found[3])})
    except (AddressError, ValueError):
        # A part of a fused projection has no path, and of many features the name tells the first few.
        return None


def path_of(site: Site) -> SitePath:
    """The path of a place in the model's own words."""
    return SitePath(parse_path(f"{site.module}.input").steps, site.side, site.leaf, site.part)


def is_list(value: Any) -> bool:
    """Whether a value is several."""
    return isinstance(value, Sequence | set | tuple) and not isinstance(value, str)


def _probed(read: Read, place: Site) -> ProbedSite:
    """A read of one place as a site."""
    view = read.view.suffix
    name = f"{read.at}{view}"
    if read.name:
        name = f"{read.name}[{place.label}]" if place.label else read.name
    raw, block = f"{place}{view}", _block_number(str(place))
    return ProbedSite(name, raw, block, _only_head(read), replace_read(read, name=None))


def _head_counts(read: Read, places: Sequence[Site], model: nn.Module) -> list[int]:
    """How many heads each place has."""
    bare, example = (model.model, model._example) if isinstance(model, BoundModel) else (model, None)
    counts = []
    for bound in bind_reads([read], bare, example):
        size = head_size(bare, bound.site.module)
        # Refused in the words that it has for heads= of any other read.
        View.of(heads=0).index(bound.width, str(bound.site), size)
        counts.append(bound.width // (size or 1))
    assert len(counts) == len(places)
    return counts


def _is_of_heads(path: SitePath) -> bool:
    """Whether a path ends as the portable name `blocks[i].attn.heads` does."""
    return path.side is None and bool(path.steps) and path.steps[-1] == Child("heads")


def _only_head(read: Read) -> int | None:
    return read.heads[0] if read.heads is not None and len(read.heads) == 1 else None


def _own_path(path: SitePath, site: Site) -> SitePath:
    """The path of one of the places that a path names."""
    if not site.label:
        return path
    wide = [number for number, step in enumerate(path.steps) if _is_wide(step)]
    if len(wide) != 1 or not site.label.isdigit():
        return path_of(site)
    steps = list(path.steps)
    steps[wide[0]] = Entries((int(site.label),))
    return replace(path, steps=tuple(steps))


def _is_wide(step: Any) -> bool:
    if isinstance(step, Child):
        return bool(set("*?") & set(step.name))
    return isinstance(step, Every) or len(step.numbers) > 1


def _block_number(name: str) -> int | None:
    """The first number in a path, which in a model of blocks is the block's."""
    found = re.search(r"(?:^|[.\[])(\d+)(?:[.\]]|$)", name)
    return None if found is None else int(found[1])


def _numbers(text: str) -> Any:
    """What `View` writes behind `heads` or `features`, as an argument."""
    if ":" in text:
        return slice(*(None if not part else int(part) for part in text.split(":")))
    return [int(part) for part in text.split(", ")]


def _refuse_twice(found: Sequence[WantedSite]) -> None:
    """Refuse one site twice at the same positions, and two sites of one name."""
    places = [(one.site.raw, str(one.positions)) for one in found]
    raws: dict[str, str] = {}
    for place, one in zip(places, found, strict=True):
        if places.count(place) > 1:
            raise DataError(f"sites name {one.site.raw!r} twice")
        if raws.setdefault(one.site.name, one.site.raw) != one.site.raw:
            raise DataError(f"sites: two of them are called {one.site.name!r}; give reads other names")

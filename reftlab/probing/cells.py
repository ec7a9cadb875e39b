"""The cells of a map: sites × positions, each with its vectors and which example and token they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from reftlab.address import Position, Site, SitePath, parse_path, parse_position, resolve
from reftlab.address.path import Child, Entries, Every
from reftlab.collecting import Activations, SiteVectors, collect
from reftlab.errors import DataError, did_you_mean
from reftlab.graph import Read
from reftlab.runtime import BoundModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Cell", "Cells", "ProbedSite", "cells_of_activations", "cells_of_model"]

_COPIES = 4
"""How many copies of a cell's vectors a fit may hold at once: the whole, a training fold of it, an inner fold
of that, and the latter scaled."""


@dataclass(frozen=True)
class ProbedSite:
    """A site of a map.

    Attributes:
        name: the path, such as `blocks[5].output`.
        raw: the place in the model's own words; the name where the model is not at hand.
        block: number of the block that it is in, as far as the name says, or None.
    """

    name: str
    raw: str
    block: int | None


@dataclass(frozen=True, eq=False)
class Cell:
    """The vectors at one site and position.

    Attributes:
        name: `"site @ position"`.
        read: the read that gives them in a graph; None where the vectors came under a name that is none.
        values: the vectors, perhaps memory-mapped, and their index.
    """

    name: str
    read: Read | None
    values: SiteVectors

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors and their width."""
        n, width = self.values.vectors.shape
        return n, width

    @property
    def working_bytes(self) -> int:
        """Memory that a fit in memory takes."""
        n, width = self.shape
        return n * width * 8 * _COPIES

    @property
    def to_end(self) -> bool:
        """Whether the last chosen token of each example is known to be its last."""
        return self.read is not None and bool(re.fullmatch(r"all|last(\(\d+\))?", str(self.read.positions)))

    @property
    def examples(self) -> Int[np.ndarray, " n"]:
        """The example of each vector."""
        return np.asarray(self.values.examples.numpy())

    @property
    def rounding(self) -> float:
        """Up to which spread, as a share of their length, vectors of the stored dtype may be the same."""
        dtype = self.values.vectors.dtype
        # Single precision is what a pass is computed in, and half precision how its values are kept.
        return torch.finfo(dtype).eps * (64 if dtype.itemsize > 2 else 1)

    def take(
        self, rows: Any = slice(None), dtype: torch.dtype = torch.float32
    ) -> Float[np.ndarray, "n width"]:
        """Some rows, or all, in another dtype.

        Raises:
            DataError: a number among them is NaN or infinite.
        """
        vectors = self.values.vectors[rows].to(dtype).contiguous().numpy()
        if not np.isfinite(vectors).all():
            raise DataError(f"{self.name}: vectors hold NaN or infinity, which no probe can read")
        return np.asarray(vectors)


@dataclass(frozen=True, eq=False)
class Cells:
    """All cells of a map.

    Attributes:
        sites: the rows of the map.
        columns: names of the positions.
        by_place: the cells by number of site and column; a place without vectors has none.
        examples: number of examples.
        per_token: by column, whether an example may have several vectors there.
        activations: what holds the vectors; a temporary folder lives as long as it.
    """

    sites: tuple[ProbedSite, ...]
    columns: tuple[str, ...]
    by_place: Mapping[tuple[int, int], Cell]
    examples: int
    per_token: tuple[bool, ...]
    activations: Activations

    def of_column(self, column: int) -> Iterable[tuple[int, Cell]]:
        """The cells of a column with the number of their site."""
        return ((site, cell) for (site, own), cell in sorted(self.by_place.items()) if own == column)


def cells_of_model(
    model: nn.Module,
    data: Any,
    sites: Any,
    positions: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path | None,
    **collecting: Any,
) -> Cells:
    """Collect the vectors of a map in one round of passes.

    Args:
        model: a bound model or any other.
        data: as for `rl.collect`.
        sites: a path or several.
        positions: a position, several, or several by name.
        tokenizer, folder, **collecting: as for `rl.collect`.

    Raises:
        AddressError: a site that the model does not have.
        DataError: no sites or positions, or one twice.
    """
    bare = model.model if isinstance(model, BoundModel) else model
    found = [site for path in _paths(sites) for site in _sites(path, bare)]
    _refuse_twice("sites", [site.raw for site in found])
    places = _positions(positions)
    reads = {
        (row, column): Read(site.name, positions=position)
        for row, site in enumerate(found)
        for column, position in enumerate(places.values())
    }
    own = dict.fromkeys(reads.values())
    collected = collect(model, data, *own, tokenizer=tokenizer, folder=folder, **collecting)
    cells = {
        place: Cell(f"{found[place[0]].name} @ {list(places)[place[1]]}", read, collected.flat(read.label))
        for place, read in reads.items()
    }
    return _cells(tuple(found), tuple(places), cells, collected)


def cells_of_activations(activations: Activations, sites: Any, positions: Any) -> Cells:
    """The cells of vectors that were collected already.

    Args:
        activations: the vectors.
        sites: paths in the words of the reads' names, in which `[*]` stands for any block; all for None.
        positions: positions of the reads' names; all for None.

    Raises:
        DataError: a path or a position that none of the reads has.
    """
    named = [(name, *_split(name)) for name in activations]
    names = {site for _, site, _ in named}
    wanted_sites = names
    if sites is not None:
        wanted_sites = set()
        for path in _paths(sites):
            hits = {site for site in names if _matches(str(path), site)}
            if not hits:
                hint = did_you_mean(str(path), names)
                raise DataError(f"sites={str(path)!r} was not collected; there is {_listed(names)}.{hint}")
            wanted_sites |= hits
    columns = list(dict.fromkeys(position for _, site, position in named if site in wanted_sites))
    labels = dict(zip(columns, columns, strict=True))
    if positions is not None:
        chosen = {name: str(position) for name, position in _positions(positions).items()}
        for position in chosen.values():
            if position not in columns:
                raise DataError(f"positions={position!r} was not collected; there is {_listed(columns)}")
        labels = {position: name for name, position in chosen.items()}
        columns = list(chosen.values())
    rows = list(dict.fromkeys(site for _, site, _ in named if site in wanted_sites))
    found = tuple(ProbedSite(site, site, block_number(site)) for site in rows)
    cells = {}
    for name, site, position in named:
        if site in wanted_sites and position in columns:
            shown = f"{site} @ {labels[position]}" if position else site
            read = _read(site, position)
            cells[rows.index(site), columns.index(position)] = Cell(shown, read, activations.flat(name))
    return _cells(found, tuple(labels[position] for position in columns), cells, activations)


def _cells(
    sites: tuple[ProbedSite, ...],
    columns: tuple[str, ...],
    cells: Mapping[tuple[int, int], Cell],
    activations: Activations,
) -> Cells:
    several = []
    for column in range(len(columns)):
        examples = [cell.examples for (_, own), cell in cells.items() if own == column]
        several.append(any(len(np.unique(one)) < len(one) for one in examples))
    return Cells(sites, columns, cells, activations.rows, tuple(several), activations)


def _paths(sites: Any) -> list[SitePath]:
    paths = [sites] if isinstance(sites, str | SitePath) else list(sites) if _is_list(sites) else []
    if not paths or not all(isinstance(path, str | SitePath) for path in paths):
        raise DataError(f"sites={sites!r}: expected a path such as 'blocks[*].output', or several")
    for path in paths:
        if "@" in str(path):
            raise DataError(f"sites={path!r}: give the positions as positions=, 'last' or several")
    return [parse_path(path) for path in paths]


def _positions(positions: Any) -> dict[str, Position]:
    if isinstance(positions, Mapping):
        found = {str(name): parse_position(value) for name, value in positions.items()}
    else:
        several = positions if _is_list(positions) else [positions]
        parsed = [parse_position(value) for value in several]
        _refuse_twice("positions", [str(position) for position in parsed])
        found = {str(position): position for position in parsed}
    if not found:
        raise DataError(f"positions={positions!r}: expected a position such as 'last', or several")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | set | tuple) and not isinstance(value, str)


def _sites(path: SitePath, model: nn.Module) -> list[ProbedSite]:
    """The sites that a path names, each under a path of its own."""
    sites = resolve(path, model)
    return [ProbedSite(_own_path(path, site), str(site), block_number(str(site))) for site in sites]


def _own_path(path: SitePath, site: Site) -> str:
    if not site.label:
        return str(path)
    wide = [number for number, step in enumerate(path.steps) if _is_wide(step)]
    if len(wide) != 1 or not site.label.isdigit():
        return str(SitePath(parse_path(f"{site.module}.input").steps, site.side, site.leaf, site.part))
    steps = list(path.steps)
    steps[wide[0]] = Entries((int(site.label),))
    return str(replace(path, steps=tuple(steps)))


def _is_wide(step: Any) -> bool:
    if isinstance(step, Child):
        return bool(set("*?") & set(step.name))
    return isinstance(step, Every) or len(step.numbers) > 1


def block_number(name: str) -> int | None:
    """The first number in a path, which in a model of blocks is the block's."""
    found = re.search(r"(?:^|[.\[])(\d+)(?:[.\]]|$)", name)
    return None if found is None else int(found[1])


def _split(name: str) -> tuple[str, str]:
    site, _, position = name.partition(" @ ")
    return site, position


def _read(site: str, position: str) -> Read | None:
    """The read that a name speaks of; a name without positions is one that somebody chose."""
    return Read(site, positions=position) if position else None


def _matches(path: str, site: str) -> bool:
    pattern = re.escape(path).replace(r"\*", r"[^.\[\]]+")
    # Names of reads of one module write its number with a bracket, and those of several with a dot.
    plain = re.escape(re.sub(r"\[(\*|\d+)\]", r".\1", path)).replace(r"\*", r"[^.\[\]]+")
    return bool(re.fullmatch(pattern, site) or re.fullmatch(plain, site))


def _refuse_twice(argument: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{argument} name {twice[0]!r} twice")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(map(repr, sorted(shown)[:4])) + (", …" if len(shown) > 4 else "")

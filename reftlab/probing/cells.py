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
from torch import Tensor, nn

from reftlab.address import Position, parse_position
from reftlab.collecting import Activations, SiteVectors, collect
from reftlab.errors import DataError, did_you_mean
from reftlab.graph import Read
from reftlab.graph.nodes import replace_read
from reftlab.probing.sites import ProbedSite, is_list, named_site, reads_of, wanted_sites
from reftlab.training.data import Encoded
from reftlab.training.replies import prompt_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Cell", "Cells", "ProbedSite", "cells_of_activations", "cells_of_model"]

_COPIES = 4
"""How many copies of a cell's vectors a fit may hold at once: the whole, a training fold of it, an inner fold
of that, and the latter scaled."""


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
        chat, system: whether texts went through the chat template, and the system message; None for vectors
            that were there already.
    """

    sites: tuple[ProbedSite, ...]
    columns: tuple[str, ...]
    by_place: Mapping[tuple[int, int], Cell]
    examples: int
    per_token: tuple[bool, ...]
    activations: Activations
    chat: bool | None = None
    system: str | None = None

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
        sites: a path, a read, or several of both.
        positions: a position, several, or several by name, for sites that name none; `last` for None.
        tokenizer, folder, **collecting: as for `rl.collect`.

    Raises:
        AddressError: a site that the model does not have.
        DataError: no sites or positions, or one twice.
    """
    wanted = wanted_sites(sites, model)
    shared = _positions("last" if positions is None else positions)
    own = [one.positions for one in wanted if one.positions is not None]
    if len(own) == len(wanted):
        if positions is not None:
            raise DataError(f"positions={positions!r}: every site has positions of its own; leave it out")
        shared = {}
    columns = dict(shared)
    for position in own:
        if position not in columns.values():
            if str(position) in columns:
                raise DataError(
                    f"positions={positions!r}: {str(position)!r} is the name of another position there, and "
                    "a site has it as its own; name it differently"
                )
            columns[str(position)] = position
    rows = list(dict.fromkeys(one.site for one in wanted))
    reads: dict[tuple[int, int], Read] = {}
    for one in wanted:
        assert one.site.read is not None
        for column, (name, position) in enumerate(columns.items()):
            if position == one.positions or (one.positions is None and name in shared):
                place = rows.index(one.site), column
                if place in reads:
                    raise DataError(f"sites name {one.site.name!r} at {str(position)!r} twice")
                reads[place] = replace_read(one.site.read, positions=position)
    collected = collect(model, data, *reads.values(), tokenizer=tokenizer, folder=folder, **collecting)
    cells = {
        place: Cell(f"{rows[place[0]].name} @ {list(columns)[place[1]]}", read, collected.flat(read.label))
        for place, read in reads.items()
    }
    form = _form(model, data, tokenizer, collecting.get("chat"), collecting.get("system"))
    return replace(_cells(tuple(rows), tuple(columns), cells, collected), **form)


def cells_of_activations(activations: Activations, sites: Any, positions: Any) -> Cells:
    """The cells of vectors that were collected already.

    Args:
        activations: the vectors.
        sites: paths in the words of the reads' names, in which `[*]` stands for any block, or reads; all
            for None.
        positions: positions of the reads' names; all for None.

    Raises:
        DataError: a path or a position that none of the reads has.
    """
    named = [(name, *_split(name)) for name in activations]
    if sites is not None:
        wanted = {name for read, _ in reads_of(sites) for name in _collected(read, named)}
        named = [one for one in named if one[0] in wanted]
    columns = list(dict.fromkeys(position for _, _, position in named))
    labels = dict(zip(columns, columns, strict=True))
    if positions is not None:
        chosen = {name: str(position) for name, position in _positions(positions).items()}
        for position in chosen.values():
            if position not in columns:
                raise DataError(f"positions={position!r} was not collected; there is {_listed(columns)}")
        labels = {position: name for name, position in chosen.items()}
        columns = list(chosen.values())
    rows = list(dict.fromkeys(site for _, site, _ in named))
    found = tuple(named_site(site) for site in rows)
    cells = {}
    for name, site, position in named:
        if position in columns:
            row, column = rows.index(site), columns.index(position)
            shown = f"{site} @ {labels[position]}" if position else site
            read = found[row].read
            # A name without positions is one that somebody chose.
            read = None if read is None or not position else replace_read(read, positions=position)
            cells[row, column] = Cell(shown, read, activations.flat(name))
    return _cells(found, tuple(labels[position] for position in columns), cells, activations)


def _form(
    model: nn.Module, data: Any, tokenizer: Any, chat: bool | None, system: str | None
) -> dict[str, Any]:
    """How `collect` made prompts of the data, which is a question of texts alone."""
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None or not _are_texts(data):
        return {"chat": False, "system": None}
    return dict(prompt_form(model, tokenizer, chat, system))


def _are_texts(data: Any) -> bool:
    """Whether data are neither token ids nor batches, by their first entry."""
    if isinstance(data, list | tuple):
        first = data[0]
        numbers = isinstance(first, list | tuple) and all(type(one) is int for one in first)
        return not (numbers or isinstance(first, Tensor | Encoded) or _has_tokens(first))
    names = getattr(data, "column_names", getattr(data, "columns", data))
    return not (isinstance(data, Tensor | np.ndarray) or _has_tokens(names))


def _has_tokens(names: Any) -> bool:
    batch = isinstance(names, Mapping) and any(isinstance(value, Tensor) for value in names.values())
    return batch or (not isinstance(names, str) and isinstance(names, Iterable) and "input_ids" in names)


def _collected(read: Read, named: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names of what was collected that a read speaks of, at its positions or at all."""
    if read.name:
        hits = [name for name, *_ in named if name == read.name]
    else:
        view = read.view.suffix
        at = None if read.positions is None else str(read.positions)
        hits = [name for name, site, own in named if _matches(str(read.at), view, site) and at in (None, own)]
    if not hits:
        asked = read.label if read.name or read.positions is not None else f"{read.at}{view}"
        names = [name for name, *_ in named] if read.positions is not None else {one[1] for one in named}
        raise DataError(
            f"sites={asked!r} was not collected; there is {_listed(names)}.{did_you_mean(asked, names)}"
        )
    return hits


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


def _positions(positions: Any) -> dict[str, Position]:
    if isinstance(positions, Mapping):
        named = [(str(name), parse_position(value)) for name, value in positions.items()]
    else:
        parsed = map(parse_position, positions if is_list(positions) else [positions])
        named = [(str(position), position) for position in parsed]
    _refuse_twice("positions", [str(position) for _, position in named])
    found = dict(named)
    if not found:
        raise DataError(f"positions={positions!r}: expected a position such as 'last', or several")
    return found


def _split(name: str) -> tuple[str, str]:
    site, _, position = name.partition(" @ ")
    return site, position


def _matches(path: str, view: str, site: str) -> bool:
    """Whether a path, and the heads or features behind it, is that of a site's name."""
    pattern = re.escape(path).replace(r"\*", r"[^.\[\]]+")
    # Names of reads of one module write its number with a bracket, and those of several with a dot.
    plain = re.escape(re.sub(r"\[(\*|\d+)\]", r".\1", path)).replace(r"\*", r"[^.\[\]]+")
    # A path of heads means each of them, as where a model is probed.
    behind = re.escape(view) if view or not path.endswith(".heads") else r"( \(heads [^()]+\))?"
    return bool(re.fullmatch(pattern + behind, site) or re.fullmatch(plain + behind, site))


def _refuse_twice(argument: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{argument} name {twice[0]!r} twice")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(map(repr, sorted(shown)[:4])) + (", …" if len(shown) > 4 else "")

"""What edits are given: vectors that other reads have taken, matched to the edit's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reftlab.errors import RunError
from reftlab.runtime.choose import Chosen, Frame
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.window import Selection

__all__ = ["Supply", "aligned", "given", "row_means"]


@dataclass(frozen=True, eq=False)
class Supply:
    """Vectors that a read has taken.

    Attributes:
        vectors: `(n, width)`.
        tokens: where they come from, one token for each vector; None for vectors that a call gives
            without saying of which tokens.
        rows: number of rows of the batch that they come from.
        here: whether they come from the same pass as the edit that they are for.
    """

    vectors: Tensor
    tokens: Selection | None
    rows: int
    here: bool = False

    @property
    def counts(self) -> list[int]:
        """How many vectors each row has."""
        assert self.tokens is not None
        return self.tokens.counts(self.rows)


def given(value: Any, what: str) -> Supply:
    """Vectors that a call gives in place of a read: `(row, token, width)`, `(n, width)` or `(width,)`.

    Raises:
        RunError: it is no such tensor.
    """
    if (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or not 1 <= value.dim() <= 3
        or not value.numel()
    ):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RunError(
            f"{what}: expected a tensor of numbers (row, token, width), (n, width) or (width,), not {shape}"
        )
    if value.dim() < 3:
        return Supply(value.reshape(-1, value.shape[-1]), None, 1 if value.dim() == 1 else len(value))
    rows, count = value.shape[:2]
    row, token = torch.arange(rows).repeat_interleave(count), torch.arange(count).repeat(rows)
    return Supply(value.reshape(rows * count, -1), Selection(row, token, token), rows)


def aligned(
    supply: Supply,
    node: BoundEdit,
    read: BoundRead,
    chosen: Chosen,
    counts: list[int] | None,
    frame: Frame,
    per_row: bool,
) -> Tensor:
    """The vectors `(n, width)` that belong to an edit's vectors in this pass.

    Args:
        supply: what was read.
        node: the edit.
        read: its read, for error messages.
        chosen: the edit's tokens in this pass.
        counts: how many vectors the edit changes in each row of the layout, over all passes; None
            where later passes will tell.
        frame: the pass.
        per_row: whether one vector of a row may stand for all of the row's.

    Raises:
        RunError: rows or tokens do not match; the message names the row.
    """
    tokens, device = chosen.vectors, supply.vectors.device
    if supply.tokens is None:
        return _unplaced(supply, node, chosen, counts, frame)
    rows = tokens.rows if supply.here else tokens.rows // frame.group
    need = tokens.counts(frame.rows) if supply.here else counts
    have = supply.counts
    number = frame.rows if supply.here else frame.layout.rows
    if supply.rows == 1:
        rows, have = torch.zeros_like(rows), have * number
    if len(have) != number:
        raise RunError(
            f"edit {node.key!r}: its source run {read.run!r} has {len(have)} rows, this one {number}; give "
            "as many, or one for all"
        )
    if per_row and not read.follows and all(count == 1 for count in have):
        return supply.vectors[rows.to(device)]
    for row, (offered, needed) in enumerate(zip(have, have if need is None else need, strict=True)):
        if offered != needed:
            kind = "condition" if per_row else "source"
            raise RunError(
                f"edit {node.key!r}: row {row} edits {needed} tokens ({node.edit.positions}) and its {kind} "
                f"offers {offered} ({read.positions} in run {read.run!r}); they must be as many"
            )
    if supply.here:
        return supply.vectors
    ranks, most = chosen.vector_ranks, supply.counts
    if len(ranks) and bool((ranks >= torch.tensor(most)[rows]).any()):
        raise RunError(
            f"edit {node.key!r}: its source offers {max(most)} time steps in run {read.run!r}, and this run "
            "goes "
            "on longer"
        )
    starts = torch.tensor([0, *most]).cumsum(0)
    return supply.vectors[(starts[rows] + ranks).to(device)]


def row_means(supply: Supply, rows: Tensor) -> Tensor:
    """For each of `rows` the mean vector of that row, `(n, width)`."""
    if supply.tokens is None:
        return (
            supply.vectors.float().mean(0).expand(len(rows), -1) if supply.rows == 1 else supply.vectors[rows]
        )
    device = supply.vectors.device
    number = torch.tensor(supply.counts, device=device)
    sums = supply.vectors.float().new_zeros(supply.rows, supply.vectors.shape[1])
    sums = sums.index_add(0, supply.tokens.rows.to(device), supply.vectors.float())
    return (sums / number[:, None])[(rows if supply.rows > 1 else torch.zeros_like(rows)).to(device)]


def _unplaced(
    supply: Supply, node: BoundEdit, chosen: Chosen, counts: list[int] | None, frame: Frame
) -> Tensor:
    if len(supply.vectors) == 1:
        return supply.vectors.expand(len(chosen.vectors), -1)
    if counts is None or len(supply.vectors) != sum(counts):
        number = "an unknown number of" if counts is None else str(sum(counts))
        raise RunError(
            f"edit {node.key!r} edits {number} vectors ({node.edit.positions}) and reads= gives it "
            f"{len(supply.vectors)}; give as many, row after row, or one for all"
        )
    starts = torch.tensor([0, *counts]).cumsum(0)[chosen.vectors.rows // frame.group]
    return supply.vectors[(starts + chosen.vector_ranks).to(supply.vectors.device)]

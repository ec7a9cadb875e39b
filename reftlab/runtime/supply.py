"""What edits are given: vectors that other reads have taken, matched to the edit's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reftlab.errors import RunError
from reftlab.runtime.choose import Chosen, Frame
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.window import Layout, Selection

__all__ = ["Supply", "aligned", "given", "row_means"]


@dataclass(frozen=True, eq=False)
class Supply:
    """Vectors that a read has taken.

    Attributes:
        vectors: `(n, width)`.
        tokens: where they come from, one token for each vector; None for vectors that a call gives
            without saying of which tokens.
        rows: number of rows of the batch that they come from.
        here: whether they come from the same run as the edit that they are for.
        layout: for attention scores and patterns, whose keys are its columns.
    """

    vectors: Tensor
    tokens: Selection | None
    rows: int
    here: bool = False
    layout: Layout | None = None

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
    if supply.here and read.follows:
        return supply.vectors
    if supply.layout is not None:
        _check_keys(supply.layout, frame.layout, node, read)
    have, rows = _rows_of(supply, node, read, tokens.rows, frame)
    if per_row and not read.follows and all(have[row] == 1 for row in set(rows.tolist())):
        starts = torch.tensor([0, *have]).cumsum(0)
        return supply.vectors[starts[rows].to(device)]
    number = frame.layout.rows
    offered = have * number if len(have) == 1 else have[:: max(1, len(have) // number)]
    partly = supply.here and frame.stop - frame.start < frame.layout.width
    for row, (there, needed) in enumerate(zip(offered, offered if counts is None else counts, strict=True)):
        if there != needed and not (partly and there < needed):
            if per_row and not read.follows and node.edit.phase == "decode":
                raise RunError(_of_the_prompt(node, read))
            kind = "condition" if per_row else "source"
            raise RunError(
                f"edit {node.key!r}: row {row} edits {needed} tokens ({node.edit.positions}) and its {kind} "
                f"offers {there} ({read.positions} in run {read.run!r}); they must be as many"
            )
    ranks, most = chosen.vector_ranks, torch.tensor(have)
    if len(ranks) and bool((ranks >= most[rows]).any()):
        if per_row and not read.follows and node.edit.phase == "both":
            raise RunError(_of_the_prompt(node, read))
        raise RunError(
            f"edit {node.key!r} needs more of {read.site} ({read.positions} in run {read.run!r}) than was "
            "read so far; run the prompt in one piece"
        )
    starts = torch.tensor([0, *have]).cumsum(0)
    return supply.vectors[(starts[rows] + ranks).to(device)]


def _of_the_prompt(node: BoundEdit, read: BoundRead) -> str:
    return (
        f"edit {node.key!r} acts on generated tokens, and its condition reads {str(read.positions)!r}, which "
        "are tokens of the prompt alone; leave the read's positions out, and it is asked of the edit's own "
        "tokens, generated ones too, or read one token for all of a row's, such as 'last'"
    )


def _rows_of(
    supply: Supply, node: BoundEdit, read: BoundRead, rows: Tensor, frame: Frame
) -> tuple[list[int], Tensor]:
    """How many vectors each row of a supply has, and its rows for `rows` of the batch."""
    have = supply.counts
    if len(have) == 1:
        return have, torch.zeros_like(rows)
    # Beams stand beside one another; what an encoder was read for stands for all of a row's.
    expected = (frame.layout.rows, frame.rows) if supply.here else (frame.layout.rows,)
    if len(have) not in expected:
        raise RunError(
            f"edit {node.key!r}: its source run {read.run!r} has {len(have)} rows, this one "
            f"{frame.layout.rows}; give as many, or one for all"
        )
    return have, rows // max(1, frame.rows // len(have))


def _check_keys(there: Layout, here: Layout, node: BoundEdit, read: BoundRead) -> None:
    """Refuse attention rows whose keys are other columns, or padded on other sides."""
    offered = there.prompts * here.rows if there.rows == 1 else there.prompts
    pairs = zip(offered, here.prompts, strict=False)
    if len(offered) == here.rows and not all(a is b or torch.equal(a, b) for a, b in pairs):
        raise RunError(
            f"edit {node.key!r}: the keys of {read.site} are the columns of the batch, and run {read.run!r} "
            "is padded otherwise than this one; give both the same padding and lengths"
        )


def row_means(
    supply: Supply, node: BoundEdit, read: BoundRead, chosen: Chosen, counts: list[int] | None, frame: Frame
) -> Tensor:
    """For each of an edit's vectors the mean of what was read in its row, `(n, width)`.

    Raises:
        RunError: another number of rows, or a row of which nothing was read.
    """
    if supply.tokens is None:
        number = frame.layout.rows
        per_row = len(supply.vectors) in (1, number)
        if not per_row and (counts is None or len(supply.vectors) != sum(counts)):
            raise RunError(
                f"edit {node.key!r}: reads= gives it {len(supply.vectors)} vectors for {number} rows; give "
                "one a row, one for all, or one for each vector that it edits"
            )
        owner = (
            torch.arange(len(supply.vectors))
            if per_row
            else torch.arange(number).repeat_interleave(torch.tensor(counts))
        )
        supply = Supply(supply.vectors, Selection(owner, owner, owner), int(owner.max()) + 1)
    have, rows = _rows_of(supply, node, read, chosen.vectors.rows, frame)
    missing = [row for row in rows.tolist() if have[row] == 0]
    if missing:
        raise RunError(f"edit {node.key!r}: row {missing[0]} has no vector of {read.site} to average")
    device = supply.vectors.device
    sums = supply.vectors.float().new_zeros(len(have), supply.vectors.shape[1])
    assert supply.tokens is not None
    sums = sums.index_add(0, supply.tokens.rows.to(device), supply.vectors.float())
    return (sums / torch.tensor(have, device=device)[:, None])[rows.to(device)]


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

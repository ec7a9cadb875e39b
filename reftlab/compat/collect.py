"""What `CollectIntervention`s see in a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reftlab.address import PerRow
from reftlab.compat.builtin import directions_of
from reftlab.compat.calls import Call
from reftlab.runtime.places import BoundEdit
from reftlab.runtime.window import Selection

__all__ = ["Collector"]


class Collector:
    """Watches a bound model, and keeps the vectors of the edits that only collect.

    Args:
        call: the call.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._kept: dict[str, list[Tensor]] = {e.name: [] for e in call.entries if e.collects}

    def __call__(
        self, node: BoundEdit, tokens: Selection, base: Tensor, new: Tensor, source: Tensor | None
    ) -> None:
        name = node.edit.name
        if name in self._kept:
            self._kept[name].append(self._arranged(name, tokens, base, node.edit.heads))

    def collected(self) -> list[Tensor]:
        """One tensor `(row, unit, width)` or `(row, head, unit, …)` for each such intervention and pass.

        Where several sequences are generated for a prompt, each is a row, those of one prompt together.
        """
        return [tensor for entry in self.call.entries for tensor in self._kept.get(entry.name, ())]

    def _arranged(self, name: str, tokens: Selection, vectors: Tensor, heads: Any) -> Tensor:
        columns, rows = self.call.columns[name], self.call.rows
        width, position = self.call.width, self.call.positions.get(name)
        later = bool((tokens.columns >= width).any()) if width else False
        # Rows whose units are all padding are not among the tokens.
        seen = sum(map(bool, position.rows)) if isinstance(position, PerRow) and not later else rows
        group = len(set(tokens.rows.tolist())) // max(seen, 1)
        if later:
            wanted = [sorted(set(tokens.columns.tolist()))] * rows
        elif columns is None:
            wanted = [list(range(max(width, 1)))] * rows
        else:
            wanted = [list(row) for row in columns]
        wanted = [row for row in wanted for _ in range(group)]
        where = {
            place: n
            for n, place in enumerate(zip(tokens.rows.tolist(), tokens.columns.tolist(), strict=True))
        }
        # Columns of padding are left out of the graph, and come back as zeros.
        padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        found = torch.stack(
            [padded[[where.get((row, column), -1) for column in chosen]] for row, chosen in enumerate(wanted)]
        )
        if heads is not None:
            found = found.unflatten(-1, (len(heads), -1)).transpose(1, 2)
        return self._chosen(name, found, group)

    def _chosen(self, name: str, found: Tensor, group: int) -> Tensor:
        """The directions that the call names, where it does, from `group` rows for each of its own."""
        directions = self.call.subspaces.get(name)
        if directions is None:
            return found
        own = next(e.intervention for e in self.call.entries if e.name == name)
        rows = [vectors[..., directions_of(own, directions[n // group])] for n, vectors in enumerate(found)]
        return torch.stack(rows)

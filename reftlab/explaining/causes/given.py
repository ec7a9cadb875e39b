"""Edits that note what stands at their sites, or put given vectors there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlab.address import Site
from reftlab.graph import Edit, InterventionGraph
from reftlab.interventions import Intervention

if TYPE_CHECKING:
    from reftlab.graph import Phase
    from reftlab.runtime import BoundModel

__all__ = ["Noted", "Placed", "placed_at", "whole_place"]


@dataclass(frozen=True, eq=False)
class Noted:
    """What stood at a site in one call.

    Attributes:
        vectors: `(row, number, width)`, each row's real tokens by number; 0 where there was none.
        there: `(row, number)`, whether something was noted.
    """

    vectors: Float[Tensor, "row number width"]
    there: Bool[Tensor, "row number"]


class _Given(Intervention):
    """Leaves vectors as they are and notes them, or puts given ones in their place."""

    counts_positions = counts_rows = True

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._noting = False
        self._table: Tensor | None = None
        self._row_of: Tensor | None = None
        self._features: Tensor | None = None

    def note(self) -> None:
        """Note from now on what passes."""
        self._parts, self._noting, self._table = [], True, None

    def noted(self) -> Noted:
        """What passed since `note`; from now on nothing is noted."""
        rows, numbers, vectors = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        shape = int(rows.max()) + 1, int(numbers.max()) + 1
        table = vectors.new_zeros(*shape, vectors.shape[1])
        there = torch.zeros(shape, dtype=torch.bool)
        table[rows, numbers], there[rows, numbers] = vectors, True
        self._parts, self._noting = [], False
        return Noted(table, there)

    def give(
        self,
        noted: Noted,
        row_of: Int[Tensor, " row"] | None = None,
        features: Bool[Tensor, "row width"] | None = None,
    ) -> None:
        """Put what was noted in the place of what passes, from now on.

        Args:
            noted: the vectors.
            row_of: which of its rows is meant for each row of the batch; the same one unless given.
            features: which features are replaced in each row of the batch; all unless given.
        """
        self._table, self._row_of, self._features, self._noting = noted.vectors, row_of, features, False

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        positions: Int[Tensor, " n"] | None = None,
        rows: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n width"]:
        assert positions is not None
        assert rows is not None
        rows, positions = rows.cpu(), positions.cpu()
        if self._noting:
            self._parts.append((rows, positions, base.detach().float().cpu()))
        if self._table is None:
            return base
        new = self._table[rows if self._row_of is None else self._row_of[rows], positions].to(base)
        return new if self._features is None else torch.where(self._features[rows].to(base.device), new, base)


class Placed:
    """Edits of one bound model that note or give vectors, by the numbers of their sites.

    Attributes:
        bound: the bare model with these edits alone.
        names: the edits' names, one a site.
    """

    def __init__(self, bound: BoundModel, names: Sequence[str]) -> None:
        self.bound, self.names = bound, tuple(names)

    def __getitem__(self, number: int) -> Any:
        return self.bound.interventions[self.names[number]]

    def note(self) -> None:
        """Note what passes each site from now on."""
        for number in range(len(self.names)):
            self[number].note()

    def noted(self) -> list[Noted]:
        """What passed each site since."""
        return [self[number].noted() for number in range(len(self.names))]


def whole_place(site: Site) -> str:
    """The path of a site with all its features, also where it is only some of them."""
    return str(replace(site, part="", label=""))


def placed_at(reft: BoundModel, paths: Sequence[str], prefix: str, phase: Phase = "both") -> Placed:
    """Edits at all tokens of sites, which as yet change nothing.

    Add them on the right of a bound model, and they see what its edits have made; on the left, and what
    they give is what its edits are given.

    Args:
        reft: the bound model whose model they are for.
        paths: one site each.
        prefix: of their names.
        phase: which tokens, of the prompt, of the answer, or both.
    """
    names = [f"{prefix}_{number}" for number in range(len(paths))]
    edits = [
        Edit(name, at=path, positions="all", phase=phase, intervention=_Given())
        for name, path in zip(names, paths, strict=True)
    ]
    bound = InterventionGraph(*edits).bind(reft.model, reft.tokenizer, example=reft._example)
    bound.eval()
    return Placed(bound, names)

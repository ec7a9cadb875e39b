"""Swaps in a rotated space: distributed alignment search, and along principal axes.

Symbols, for a vector `h` and the source's vector `s` of `width` numbers:
`R` (k × width) has orthonormal rows, the rotated directions; `⊙` multiplies number by number.
What lies outside the rows of `R` stays the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlab.errors import InterventionError
from reftlab.interventions.base import (
    Intervention,
    as_feature_vector,
    as_matrix,
    check_rank,
    check_width,
    whole,
)
from reftlab.interventions.basis import OrthonormalBasis

__all__ = ["PCASwap", "RotatedSwap"]

_Own = TypeVar("_Own", bound="PCASwap")


def swapped(base: Tensor, source: Tensor, basis: Tensor, amounts: Tensor | None) -> Tensor:
    """`base + ((source − base) basis ⊙ amounts) basisᵀ`, all of it where `amounts` is None."""
    difference = (source - base) @ basis
    return base + (difference if amounts is None else difference * amounts) @ basis.T


class RotatedSwap(Intervention):
    """Distributed alignment search: swap directions of a learned rotation.

        h + Rᵀ(R s − R h)

    Rotate both vectors, give the base the source's numbers, rotate back. `subspace=` says which
    rotated numbers are swapped. With all directions of a full rotation this is `Swap`, whatever
    the rotation, so learn either a full rotation with a subspace or a `rank`: both swap as many
    directions, and the low-rank form keeps only the parameters that it needs.

    Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed
    Neural Representations" (2023, arXiv:2303.02536).

    Args:
        rank: number of directions k; None for a full rotation.

    >>> swap = RotatedSwap(rank=2).build(width=8)
    >>> swap(torch.zeros(3, 8), torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """

    takes_source = "required"
    takes_subspace = "basis"

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.rank = None if rank is None else whole(rank, "rank", 1)

    def setup(self, width: int) -> None:
        check_rank(self.rank or width, width)
        self.basis = OrthonormalBasis(width, self.rank or width)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        return swapped(base, source, self.basis(), subspace)


class PCASwap(Intervention):
    """Swap principal components of the vector for the source's.

        h + σ ⊙ Cᵀ C((s − h) ⊘ σ)

    `C` (k × width) are the components as orthonormal rows, `σ` (width) the spread of each feature
    (1 unless given), `⊘` divides number by number. Both vectors are centred by the same mean, which
    therefore cancels. `subspace=` chooses components. With all components and no subspace this is
    `Swap`. pyvene's PCA rotation (Wu et al. 2024, arXiv:2403.07809) with one difference: what the
    components leave out stays the base's, there it is lost.

    Args:
        components: C, `(k, width)`.
        mean: `(width,)`, what `coordinates` subtracts; 0 unless given.
        scale: σ, `(width,)`, above 0; 1 unless given.

    >>> swap = PCASwap.fit(torch.randn(50, 8), components=3).build(width=8)
    >>> swap.directions
    3
    """

    takes_source = "required"
    takes_subspace = "basis"
    components: Tensor
    mean: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        components: Tensor | Sequence[Sequence[float]],
        mean: Tensor | Sequence[float] | None = None,
        scale: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        rows = as_matrix(components, "components").clone(memory_format=torch.contiguous_format)
        products = rows @ rows.T
        if (products - torch.eye(len(rows), device=rows.device)).abs().max() > 1e-3:
            raise InterventionError(
                f"components={tuple(rows.shape)}: expected orthonormal rows, as in PCA's components_; "
                f"their products reach {float((products.fill_diagonal_(0)).abs().max()):.3g}, their squared "
                f"lengths {float((rows * rows).sum(1).max()):.3g}"
            )
        # Arguments are saved with the graph, so the state need not hold them once more.
        self.register_buffer("components", rows, persistent=False)
        for name, value in (("mean", mean), ("scale", scale)):
            self.register_buffer(name, as_feature_vector(value, name, rows.shape[1]), persistent=False)
        if self.scale is not None and not bool((self.scale > 0).all()):
            raise InterventionError(f"scale has {float(self.scale.min()):g}; expected numbers above 0")

    @classmethod
    def fit(
        cls: type[_Own],
        vectors: Float[Tensor, "n width"],
        components: int | None = None,
        *,
        standardise: bool = False,
    ) -> _Own:
        """Find the components of vectors with scikit-learn's PCA.

        Args:
            vectors: `(n, width)`, at least two.
            components: how many to keep, k; as many as there can be unless given.
            standardise: whether each feature is first divided by its standard deviation, which
                becomes `scale`.

        Raises:
            InterventionError: vectors or a number of components that cannot be used.
        """
        from sklearn.decomposition import PCA

        data = as_matrix(vectors, "vectors").cpu().double()
        most = min(data.shape)
        if len(data) < 2:
            raise InterventionError(f"vectors={tuple(data.shape)}: expected at least two vectors to fit")
        if components is not None and whole(components, "components", 1) > most:
            raise InterventionError(
                f"components={components}: {data.shape[0]} vectors of {data.shape[1]} numbers have "
                f"at most {most} components"
            )
        mean = data.mean(0)
        spread = data.std(0, correction=0).clamp_min(1e-12) if standardise else None
        centred = data - mean if spread is None else (data - mean) / spread
        found = PCA(n_components=components or most, svd_solver="full").fit(centred.numpy())
        return cls(torch.tensor(found.components_), mean, spread)

    @property
    def rank(self) -> int:
        """Number of components k."""
        return int(self.components.shape[0])

    def setup(self, width: int) -> None:
        check_width(self.components, "components", width)

    def coordinates(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n k"]:
        """The numbers that are swapped, C((h − mean) ⊘ σ)."""
        centred = vectors if self.mean is None else vectors - self.mean
        return (centred if self.scale is None else centred / self.scale) @ self.components.T

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        components, difference = self.components.float(), source - base
        if self.scale is not None:
            difference = difference / self.scale.float()
        amounts = difference @ components.T
        moved = (amounts if subspace is None else amounts * subspace) @ components
        return base + (moved if self.scale is None else moved * self.scale.float())

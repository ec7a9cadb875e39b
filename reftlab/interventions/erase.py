"""Erasing what a linear classifier could read, and projecting directions out.

Symbols, for a vector `h` of `width` numbers: `μ` (width) is a mean of such vectors; `U` (k × width)
has orthonormal rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from reftlab.errors import InterventionError
from reftlab.interventions.base import Affine, Intervention, as_feature_vector, as_matrix, check_width

__all__ = ["Erase", "ProjectOut"]


class NothingToEraseError(InterventionError):
    """Labels that no linear classifier can tell from the vectors."""


_Eraser = TypeVar("_Eraser", bound="Erase")
_Projection = TypeVar("_Projection", bound="ProjectOut")


class Erase(Intervention):
    """Erase a concept so that no linear classifier can find it, with the least change: LEACE.

        h − A B (h − μ)

    `A` (width × k) and `B` (k × width) are fitted; for labels of k + 1 classes, A B = W⁺ P W with
    the whitening W of the vectors and the projection P on what W cov(h, label) spans.

    Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (2023,
    arXiv:2306.03819). Fitted by the authors' package `concept-erasure`; a fitted edit,
    also a loaded one, needs it no more.

    Args:
        left: A, `(width, k)`.
        right: B, `(k, width)`.
        mean: μ, `(width,)` or one number for all; 0 unless given.

    >>> vectors, labels = torch.randn(100, 8), torch.arange(100) % 2
    >>> Erase.fit(vectors, labels).build(width=8)(vectors).shape
    torch.Size([100, 8])
    """

    left: Tensor
    right: Tensor
    mean: Tensor | None

    def __init__(
        self,
        left: Tensor | Sequence[Sequence[float]],
        right: Tensor | Sequence[Sequence[float]],
        mean: Tensor | Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        # Row after row, as they are loaded again: products of other layouts may differ in the last bit.
        rows = as_matrix(right, "right").clone(memory_format=torch.contiguous_format)
        columns = as_matrix(left, "left").clone(memory_format=torch.contiguous_format)
        if columns.shape != rows.shape[::-1]:
            raise InterventionError(
                f"left has the shape {tuple(columns.shape)}; right of shape {tuple(rows.shape)} needs "
                f"{tuple(rows.shape[::-1])}"
            )
        vector = as_feature_vector(mean, "mean", rows.shape[1])
        # Arguments are saved with the graph, so the state need not hold them once more.
        for name, tensor in (("left", columns), ("right", rows), ("mean", vector)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def fit(cls: type[_Eraser], vectors: Float[Tensor, "n width"], labels: Any, **options: Any) -> _Eraser:
        """Fit the eraser on vectors and what is to be erased from them.

        Args:
            vectors: `(n, width)`.
            labels: `(n,)` whole numbers or bools, one class each, or `(n, k)` numbers that are to become
                unpredictable.
            **options: of `concept_erasure.LeaceFitter`, such as `shrinkage=False`.

        Raises:
            InterventionError: vectors or labels that cannot be used, or that are uncorrelated, so that
                there is nothing to erase.
        """
        try:
            from concept_erasure import LeaceEraser  # type: ignore[import-untyped]
        except ImportError as error:
            raise InterventionError(
                "Erase.fit needs the package concept-erasure; install it with `pip install concept-erasure`"
            ) from error
        data, targets = _with_labels(vectors, labels)
        # In double precision, since it inverts a covariance.
        eraser = LeaceEraser.fit(data.double(), targets.double(), **options)
        kept = eraser.proj_left.abs().sum(0) * eraser.proj_right.abs().sum(1) > 0
        if not bool(kept.any()):
            raise NothingToEraseError(
                "labels do not go together with the vectors linearly; there is nothing to erase"
            )
        return cls(eraser.proj_left[:, kept], eraser.proj_right[kept], eraser.bias)

    def setup(self, width: int) -> None:
        check_width(self.right, "right", width)

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        centred = base if self.mean is None else base - self.mean.float()
        return base - centred @ self.right.float().T @ self.left.float().T

    def affine(self) -> Affine:
        mean = None if self.mean is None else self.mean.float()
        return Affine.removing(self.left.float(), self.right.float(), mean)


class ProjectOut(Intervention):
    """Project directions out: give all vectors the same value along them.

        h − Uᵀ U (h − μ)

    `U` are the directions made orthonormal, in their order. Along them every vector becomes the
    mean μ, or 0 without one. With the difference of two classes' means as the direction, the
    classes' means coincide afterwards: mean projection, Haghighatkhah et al., "Better Hit the Nail
    on the Head than Beat around the Bush" (2022, arXiv:2212.04273). With a direction of one's own
    and no mean it is directional ablation.

    Args:
        vectors: the directions, `(width,)` or `(k, width)`, linearly independent, of any lengths.
        mean: μ, `(width,)` or one number for all; 0 unless given.

    >>> ProjectOut([0.0, 2.0]).build(width=2)(torch.tensor([[3.0, 4.0]])).tolist()
    [[3.0, 0.0]]
    """

    takes_subspace = "basis"
    vectors: Tensor
    mean: Tensor | None
    basis: Tensor

    def __init__(
        self,
        vectors: Tensor | Sequence[float] | Sequence[Sequence[float]],
        mean: Tensor | Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        rows = as_matrix(vectors, "vectors").clone()
        vector = as_feature_vector(mean, "mean", rows.shape[1])
        lengths = rows.norm(dim=1, keepdim=True)
        if bool((lengths == 0).any()):
            raise InterventionError("vectors has one of length 0, which is no direction")
        # float64, so that nearly parallel directions still give an orthonormal basis.
        q, r = torch.linalg.qr((rows / lengths).double().T)
        if len(rows) > rows.shape[1] or bool((r.diagonal().abs() < 1e-6).any()):
            raise InterventionError(
                f"vectors of shape {tuple(rows.shape)} are not linearly independent; leave out those that "
                "the others make up"
            )
        basis = (q * r.diagonal().sign()).T.float().contiguous()
        for name, tensor in (("vectors", rows), ("mean", vector), ("basis", basis)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def fit(cls: type[_Projection], vectors: Float[Tensor, "n width"], labels: Any) -> _Projection:
        """Take the differences of the classes' means from the first class's as directions.

        Args:
            vectors: `(n, width)`.
            labels: `(n,)` whole numbers or bools, at least two classes.

        Raises:
            InterventionError: vectors or labels that cannot be used.
        """
        data, classes = _with_labels(vectors, labels)
        if classes.shape[1] < 2 or not bool((classes.sum(1) == 1).all()):
            raise InterventionError("labels: expected classes of at least two kinds, one for each vector")
        means = (classes.double().T @ data.double()) / classes.double().sum(0)[:, None]
        # The mean of the classes' means moves both classes alike, however many vectors each has.
        return cls(means[1:] - means[0], means.mean(0))

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return int(self.vectors.shape[0])

    def setup(self, width: int) -> None:
        check_width(self.vectors, "vectors", width)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n width"]:
        amounts = (base if self.mean is None else base - self.mean.float()) @ self.basis.float().T
        return base - (amounts if subspace is None else amounts * subspace) @ self.basis.float()

    def affine(self) -> Affine:
        basis, mean = self.basis.float(), None if self.mean is None else self.mean.float()
        return Affine.removing(basis.T, basis, mean)


def _with_labels(vectors: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Vectors `(n, width)` and labels as numbers `(n, k)`, classes one-hot in their order."""
    data = as_matrix(vectors, "vectors")
    try:
        targets = torch.as_tensor(labels, device=data.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"labels={labels!r}: expected numbers, one for each vector") from error
    if targets.dim() not in (1, 2) or len(targets) != len(data):
        raise InterventionError(
            f"labels have the shape {tuple(targets.shape)}; {len(data)} vectors need ({len(data)},) or "
            f"({len(data)}, k)"
        )
    if targets.dim() == 2:
        return data, targets
    if targets.is_floating_point() or targets.is_complex():
        raise InterventionError(
            "labels are fractions, one for each vector; give classes as whole numbers, or numbers to erase "
            "as (n, 1)"
        )
    found, numbers = targets.unique(return_inverse=True)
    if len(found) < 2:
        raise InterventionError(f"labels hold {len(found)} class; at least two are needed")
    return data, functional.one_hot(numbers, len(found))

"""Steering: a fixed direction added in proportion, and a learned one that also detects its concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.errors import InterventionError
from reftlab.interventions.base import (
    Affine,
    Intervention,
    as_matrix,
    as_vector,
    check_width,
    flag,
    number,
    whole,
)
from reftlab.interventions.basis import OrthonormalBasis
from reftlab.interventions.passing import PassMean

__all__ = ["ReFTr1", "Steer"]

_Own = TypeVar("_Own", bound="Steer")


class Steer(Intervention):
    """Move the vector along a steering vector, by a fixed amount or in proportion to its own length.

        h + α v        or, norm-matched,        h + α ‖h‖ v / ‖v‖

    Norm-matched, α is a share of the vector's own length and means the same at every layer and in
    every model; the direction alone of `v` counts then. Constant steering follows Turner et al.,
    "Activation Addition" (2023, arXiv:2308.10248); a vector that is a difference of means,
    Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2023, arXiv:2312.06681).

    Args:
        vector: v, `(width,)`, not all zero.
        amount: α.
        norm_matched: which of the two forms.

    >>> Steer([0.0, 3.0], 0.5, norm_matched=True).build(width=2)(torch.tensor([[4.0, 0.0]])).tolist()
    [[4.0, 2.0]]
    """

    vector: Tensor

    def __init__(
        self, vector: Tensor | Sequence[float], amount: float = 1.0, norm_matched: bool = False
    ) -> None:
        super().__init__()
        value = as_vector(vector, "vector")
        if value is None or value.dim() != 1 or not bool(value.any()):
            raise InterventionError(f"vector={vector!r}: expected numbers (width,), not all of them 0")
        self.register_buffer("vector", value, persistent=False)
        self.amount, self.norm_matched = number(amount, "amount"), flag(norm_matched, "norm_matched")

    @classmethod
    def fit(
        cls: type[_Own],
        positive: Float[Tensor, "n width"],
        negative: Float[Tensor, "m width"],
        amount: float = 1.0,
        norm_matched: bool = False,
    ) -> _Own:
        """Steer from the mean of some vectors to the mean of others.

        Args:
            positive: vectors with what is wanted, `(n, width)`.
            negative: vectors without it, `(m, width)`.
            amount: α.
            norm_matched: as for the class.

        Raises:
            InterventionError: vectors that cannot be used, or that have the same mean.
        """
        above, below = as_matrix(positive, "positive"), as_matrix(negative, "negative")
        if above.shape[1] != below.shape[1]:
            raise InterventionError(
                f"positive vectors have {above.shape[1]} numbers, negative ones {below.shape[1]}"
            )
        return cls(above.mean(0) - below.mean(0), amount, norm_matched)

    def setup(self, width: int) -> None:
        check_width(self.vector, "vector", width)

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        vector = self.vector.float()
        if not self.norm_matched:
            return base + self.amount * vector
        return base + self.amount * base.norm(dim=1, keepdim=True) * (vector / vector.norm())

    def affine(self) -> Affine | None:
        if self.norm_matched:
            return None
        return Affine.adding(self.amount * self.vector.float())


class ReFTr1(Intervention):
    """Rank-1 ReFT: one learned direction that detects a concept in each token and steers by it.

        h + mean(top-k(d)) w,   d = ReLU(w · h)

    `w` (width) has length 1; `d` is the detection score of each of a row's edited tokens, and all of
    them move by the mean of the row's k highest. With `amount` given they move by that instead,
    which is how a trained direction steers: `h + amount · w`, the amount being a multiple of the
    highest detection on the training data. The penalty, `sparsity` times the mean over all
    tokens of `d`, the top k counted as 0, asks the other tokens not to detect anything.

    What counts as a row's tokens is what one call of the model edits: in a decoding step the one
    new token, in a prompt all edited ones. Where nobody says which row a vector is from, each stands
    alone. A row of fewer than k tokens takes the mean of all of them.

    Wu et al., "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders" (2025,
    arXiv:2501.17148), the method ReFT-r1. The length of `w` is 1 by
    construction here, where the authors' code renormalises after each step; their penalty grows over
    training, as this one does.

    Args:
        k: how many of a row's highest detections are averaged.
        sparsity: weight of the penalty at the end of training; it grows from 0 in a straight line.
        amount: fixed amount to steer by; None to steer by what is detected.

    >>> edit = ReFTr1(k=1).build(width=8)
    >>> edit.detect(torch.zeros(3, 8)).tolist()
    [0.0, 0.0, 0.0]
    """

    counts_rows = True

    def __init__(self, k: int = 1, *, sparsity: float = 0.0, amount: float | None = None) -> None:
        super().__init__()
        self.k, self.sparsity = whole(k, "k", 1), number(sparsity, "sparsity", 0.0)
        self.amount = None if amount is None else number(amount, "amount")

    def setup(self, width: int) -> None:
        self.basis = OrthonormalBasis(width, 1)
        self.elsewhere = PassMean()
        # Where no one calls `schedule`, the penalty has its full weight.
        self.progress = 1.0

    @property
    def direction(self) -> Float[Tensor, " width"]:
        """w, of length 1."""
        return self.basis()[:, 0]

    def detect(self, base: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """The detection score of each vector, ReLU(w · h), in float32."""
        return torch.relu(base.float() @ self.direction)

    def forward(  # type: ignore[override]
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        rows: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n width"]:
        if self.amount is not None:
            return base + self.amount * self.direction
        scores = self.detect(base)
        highest, others = self._by_row(scores, rows)
        self.elsewhere.note(others)
        return base + highest[:, None] * self.direction

    def _by_row(self, scores: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean of its row's k highest scores for each vector, and all scores with those at 0."""
        if rows is None:
            return scores, torch.zeros_like(scores)
        found, row = rows.to(scores.device).unique(return_inverse=True)
        # Highest first within each row, so that a score's rank in its row is its distance to the start.
        order = torch.argsort(scores.detach(), descending=True, stable=True)
        order = order[torch.argsort(row[order], stable=True)]
        counts = torch.bincount(row, minlength=len(found))
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(row)
        rank[order] = torch.arange(len(row), device=row.device) - starts[row[order]]
        top = rank < self.k
        kept = torch.where(top, scores, 0.0)
        sums = torch.zeros(len(found), device=scores.device).index_add(0, row, kept)
        return (sums / counts.clamp(max=self.k))[row], torch.where(top, 0.0, scores)

    def schedule(self, progress: float) -> None:
        """Set how much of the penalty's weight applies; `progress` is from 0 to 1."""
        self.progress = number(progress, "progress", 0.0, 1.0)

    def penalty(self) -> Float[Tensor, ""] | None:
        """`progress · sparsity` times the last pass's mean of `d`, the top k as 0; None without sparsity."""
        mean = self.elsewhere.value()
        return None if mean is None or not self.sparsity else self.progress * self.sparsity * mean

    def affine(self) -> Affine | None:
        if self.amount is None:
            return None
        return Affine.adding(self.amount * self.direction.detach())

"""Swapped runs: how far the decodability of two runs of the same examples differs by chance.

Differences between scores of held-out predictions hang on both probes' training data, which intervals over
resampled predictions overlook. Here base and edited vectors of whole groups are swapped at random and the
probes are refitted for every swap, the true order being one of them. If the edit changes nothing that
depends on which run a vector comes from, swapped and true runs are alike, and the test is exact. What is
refitted is ridge regression, by the inner products of all vectors, which are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
from jaxtyping import Bool, Float, Int

from reftlab.probing.folds import fold_numbers

__all__ = ["Swaps", "swap_statistics"]

_STRENGTH = 0.1
"""Of ridge regression, in mean variances of the directions that the vectors span."""

_FOLDS = 5
_DIGITS = 5
"""Differences of correlations that are smaller are those of rounding."""


@dataclass(frozen=True, eq=False)
class Swaps:
    """Which groups swap their runs, number 0 being none.

    Attributes:
        groups: group of each vector, as a number.
        count: number of swaps, without the true order.
        seed: the same swaps of the same groups in every cell.
    """

    groups: Int[np.ndarray, " n"]
    count: int
    seed: int

    @property
    def folds(self) -> Int[np.ndarray, " n"]:
        """Folds by group, drawn without looking at labels."""
        count = min(_FOLDS, len(np.unique(self.groups)))
        return fold_numbers(None, self.groups, "regression", count, self.seed)

    def rows(self, number: int) -> Bool[np.ndarray, " n"]:
        """Which vectors change their run."""
        _, own = np.unique(self.groups, return_inverse=True)
        if number == 0:
            return np.zeros(len(own), dtype=bool)
        drawn = np.random.default_rng([self.seed, number]).random(int(own.max()) + 1) < 0.5
        return np.asarray(drawn[own])


def swap_statistics(
    base: Float[np.ndarray, "n width"],
    edited: Float[np.ndarray, "n width"],
    columns: Float[np.ndarray, "n column"],
    swaps: Swaps,
) -> Float[np.ndarray, "sign swap"]:
    """How much better held-out labels are predicted of the edited run than of the base run, and the reverse.

    The statistic is the difference of the two runs' correlations of labels and held-out predictions,
    averaged over the columns; its negative is the second row.

    Args:
        base, edited: vectors of the same examples.
        columns: labels around 0.
        swaps: the swaps, and the folds.
    """
    n, numbers = len(base), swaps.folds
    both = np.concatenate([base, edited]).astype(np.float64)
    both -= both.mean(0)
    # Of both runs together, so that it is the same after any swap.
    spread = both.std(0)
    both /= np.where(spread > 0, spread, 1.0)
    products = both @ both.T
    found = np.empty(swaps.count + 1)
    for number in range(swaps.count + 1):
        swapped = swaps.rows(number)
        first = np.where(swapped, np.arange(n) + n, np.arange(n))
        second = np.where(swapped, np.arange(n), np.arange(n) + n)
        before, after = (
            _agreement(products[np.ix_(rows, rows)], columns, numbers) for rows in (first, second)
        )
        found[number] = after - before
    found = found.round(_DIGITS)
    return np.stack([found, -found])


def _agreement(products: np.ndarray, columns: np.ndarray, folds: np.ndarray) -> float:
    """Correlation of labels with what kernel ridge regression predicts of the fold that it has not seen."""
    predicted = np.empty_like(columns)
    for fold in range(int(folds.max()) + 1):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        own, across = products[np.ix_(train, train)], products[np.ix_(test, train)]
        # Around the training part's mean, which is the same as fitting an intercept.
        means = own.mean(0)
        across = across - across.mean(1, keepdims=True) - means + means.mean()
        own = own - means[:, None] - means + means.mean()
        size = float(np.trace(own)) / len(own)
        # Where all vectors are the same any strength will do: there is nothing to learn.
        own[np.diag_indices(len(own))] += _STRENGTH * (size if size > 1e-9 else 1.0)
        targets = columns[train] - columns[train].mean(0)
        weights = scipy.linalg.solve(own, targets, assume_a="pos", check_finite=False)
        predicted[test] = across @ weights + columns[train].mean(0)
    a, b = columns - columns.mean(0), predicted - predicted.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    # A predictor that says the same of all tells nothing, whatever the sign of its rounding.
    known = size > 1e-6 * (a**2).sum(0)
    correlation: Any = np.where(known, (a * b).sum(0) / np.where(known, size, 1.0), 0.0)
    return float(correlation.mean())

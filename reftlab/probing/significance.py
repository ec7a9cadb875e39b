"""Shuffled labels: what a probe finds by chance, in one cell and in the best of a whole map.

A probe's held-out predictions hang on the labels of the other folds, and so do those of the other folds
on its own. Shuffling labels against predictions that stay what they are overlooks this: for a linear
probe the spread of such scores is too small by √2, and a map of random vectors is "significant" far too
often. Here the probe is refitted for every shuffle, the true labels being one of them, with folds that
are drawn without looking at labels, so that true and shuffled labels are treated alike and the test is
exact whatever the statistic. What makes this cheap is that ridge regression's held-out predictions are
linear in the labels: one factorisation serves all shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
from jaxtyping import Float, Int

from reftlab.probing.estimators import Probe, out_of_fold
from reftlab.probing.folds import Split, constant_in_groups, fold_numbers
from reftlab.probing.labels import Kind

__all__ = [
    "Shuffles",
    "adjusted_p_values",
    "label_columns",
    "linear_statistics",
    "refitted_statistics",
    "rotated",
]

_STRENGTHS = (0.01, 1.0)
"""Ridge strengths, in mean variances of the directions that the vectors span; the better one counts."""

_FOLDS = 5
_NUMBERS_AT_ONCE = 4_000_000

Chunks = Callable[[], Iterator[tuple[slice, np.ndarray]]]
Statistics = Float[np.ndarray, "strength shuffle"]


def label_columns(y: np.ndarray, kind: Kind, classes: int) -> Float[np.ndarray, "n column"]:
    """Labels as numbers around 0: one column for two classes or for numbers, else one a class or label."""
    if kind == "multilabel":
        columns = y.astype(np.float64)
    elif kind == "regression":
        columns = y[:, None].astype(np.float64)
    elif classes == 2:
        columns = (y == 1)[:, None].astype(np.float64)
    else:
        columns = (y[:, None] == np.arange(classes)).astype(np.float64)
    return np.asarray(columns - columns.mean(0))


@dataclass(frozen=True, eq=False)
class Shuffles:
    """Shuffles of the labels of vectors, number 0 being the true order.

    Where each group has one label, groups swap labels. Otherwise groups of equal size swap their labels
    whole, and then labels are shuffled inside each group.

    Attributes:
        groups: group of each vector.
        whole: whether each group has one label.
        count: number of shuffles, without the true order.
        seed: the same shuffles of the same groups.
    """

    groups: Int[np.ndarray, " n"]
    whole: bool
    count: int
    seed: int

    @classmethod
    def of(cls, y: np.ndarray, groups: np.ndarray, count: int, seed: int) -> Shuffles:
        """Shuffles for labels `y` of vectors in `groups`."""
        _, own = np.unique(groups, return_inverse=True)
        return cls(own, constant_in_groups(y, own), count, seed)

    @cached_property
    def folds(self) -> Int[np.ndarray, " n"]:
        """Folds by group, the same for all shuffles."""
        folds = min(_FOLDS, int(self.groups.max()) + 1)
        return fold_numbers(None, self.groups, "regression", folds, self.seed)

    def rows(self, number: int) -> Int[np.ndarray, " n"]:
        """Whose label each vector has in a shuffle."""
        small = len(self.groups) * (self.count + 1) <= _NUMBERS_AT_ONCE
        return self._table[number] if small else self._drawn(number)

    @cached_property
    def _table(self) -> list[np.ndarray]:
        return [self._drawn(number) for number in range(self.count + 1)]

    def _drawn(self, number: int) -> Int[np.ndarray, " n"]:
        n = len(self.groups)
        if number == 0:
            return np.arange(n)
        generator = np.random.default_rng([self.seed, number])
        _, first = np.unique(self.groups, return_index=True)
        if self.whole:
            return np.asarray(first[generator.permutation(len(first))[self.groups]])
        # Vectors by group, so that those of a group stand together.
        order = np.argsort(self.groups, kind="stable")
        sizes = np.bincount(self.groups)
        starts = sizes.cumsum() - sizes
        partner = np.arange(len(sizes))
        for size in np.unique(sizes):
            alike = np.flatnonzero(sizes == size)
            partner[alike] = generator.permutation(alike)
        inside = np.lexsort((generator.random(n), self.groups[order]))
        offset = inside - starts[self.groups[order]]
        rows = np.empty(n, dtype=np.int64)
        rows[order] = order[starts[partner[self.groups[order]]] + offset]
        return rows

    def blocks(self, columns: int, numbers: int) -> Iterator[tuple[int, int]]:
        """Ranges of shuffles, the true order included, whose labels are about so many numbers."""
        step = max(1, numbers // (len(self.groups) * columns))
        for start in range(0, self.count + 1, step):
            yield start, min(start + step, self.count + 1)


def linear_statistics(
    chunks: Chunks, width: int, columns: np.ndarray, shuffles: Shuffles, at_once: int = _NUMBERS_AT_ONCE
) -> Statistics:
    """How well ridge regression predicts held-out labels, for the true and all shuffled ones.

    The statistic is the correlation of labels and held-out predictions, averaged over the columns.

    Args:
        chunks: gives the vectors in parts, each time anew; label-blind preparation is up to it.
        width: of the vectors.
        columns: labels around 0, `(n, column)`.
        shuffles: the shuffles and folds.
        at_once: how many shuffled labels are worked at together, as numbers.
    """
    numbers = shuffles.folds
    count = int(numbers.max()) + 1
    grams = np.zeros((count, width, width), dtype=np.float32)
    for rows, part in chunks():
        for fold in range(count):
            own = part[numbers[rows] == fold]
            grams[fold] += own.T @ own
    gram = grams.sum(0)
    # Where all vectors are the same any strength will do: there is nothing to learn.
    scale = np.trace(gram) / min(width, len(columns)) or 1.0
    found = np.empty((len(_STRENGTHS), shuffles.count + 1))
    labels = columns.astype(np.float32)
    for level, strength in enumerate(_STRENGTHS):
        ridge = np.float32(strength * scale) * np.eye(width, dtype=np.float32)
        factors = [scipy.linalg.cho_factor(gram - own + ridge) for own in grams]
        for start, stop in shuffles.blocks(columns.shape[1], max(at_once, len(labels))):
            shuffled = np.stack([labels[shuffles.rows(number)] for number in range(start, stop)], 1)
            predicted = _held_out(chunks, shuffled.reshape(len(labels), -1), factors, numbers, width)
            found[level, start:stop] = _correlation(shuffled, predicted.reshape(shuffled.shape))
    return found


def refitted_statistics(
    probe: Probe,
    vectors: np.ndarray,
    y: np.ndarray,
    classes: int,
    shuffles: Shuffles,
) -> Statistics:
    """The same statistic of the probe itself, refitted for each shuffle."""
    numbers = shuffles.folds
    folds = [
        Split(np.flatnonzero(numbers != fold), np.flatnonzero(numbers == fold), ())
        for fold in range(int(numbers.max()) + 1)
    ]
    found = np.empty((1, shuffles.count + 1))
    for number in range(shuffles.count + 1):
        shuffled = y[shuffles.rows(number)]
        scores = out_of_fold(probe, vectors, shuffled, folds, classes).scores
        columns = label_columns(shuffled, probe.kind, classes)
        found[0, number] = _correlation(columns[:, None], scores[:, None])[0]
    return found


def adjusted_p_values(statistics: Sequence[Statistics]) -> Float[np.ndarray, " cell"]:
    """p-values that hold for all cells together, by the step-down maximum statistic.

    Each cell's statistic is counted in standard deviations of its shuffles, the largest over the
    strengths; a cell's p-value is the share of shuffles in which the largest of it and all weaker
    cells reaches what the cell has. The chance of any false alarm in the whole map is then at most the
    level, however the cells depend on each other.

    Westfall and Young, "Resampling-Based Multiple Testing" (1993), algorithm 2.8.

    Args:
        statistics: of each cell `(strength, shuffle)`, the first shuffle the true labels.
    """
    heights = []
    for own in statistics:
        spread = own.std(1, keepdims=True)
        heights.append(((own - own.mean(1, keepdims=True)) / np.where(spread > 0, spread, np.inf)).max(0))
    height = np.stack(heights)
    order = np.argsort(height[:, 0])
    reached = np.maximum.accumulate(height[order], 0) >= height[order, :1]
    stepped = np.maximum.accumulate(reached.mean(1)[::-1])[::-1]
    adjusted = np.empty(len(order))
    adjusted[order] = stepped
    return adjusted


def rotated(vectors: np.ndarray) -> np.ndarray:
    """Scaled vectors, in as many coordinates as they span where that is fewer than the width.

    Ridge regression knows vectors by their inner products alone, which rows of the Cholesky factor of
    those products share, so this changes no prediction beyond rounding.
    """
    scaled = vectors - vectors.mean(0, dtype=np.float64).astype(vectors.dtype)
    spread = scaled.std(0)
    scaled /= np.where(spread > 0, spread, 1)
    n, width = scaled.shape
    if n >= width:
        return np.asarray(scaled)
    products = (scaled @ scaled.T).astype(np.float64)
    # Centred vectors span one coordinate less than there are of them.
    size = np.trace(products) / n
    if size == 0:
        return np.asarray(scaled[:, :1])
    products[np.diag_indices(n)] += 1e-6 * size
    return np.linalg.cholesky(products).astype(np.float32)


def _held_out(
    chunks: Chunks, shuffled: np.ndarray, factors: Sequence[Any], numbers: np.ndarray, width: int
) -> np.ndarray:
    products = np.zeros((len(factors), width, shuffled.shape[1]), dtype=np.float32)
    for rows, part in chunks():
        for fold in range(len(factors)):
            own = numbers[rows] == fold
            products[fold] += part[own].T @ shuffled[rows][own]
    together = products.sum(0)
    weights = [
        scipy.linalg.cho_solve(factor, together - own, check_finite=False)
        for factor, own in zip(factors, products, strict=True)
    ]
    predicted = np.empty_like(shuffled)
    for rows, part in chunks():
        for fold, weight in enumerate(weights):
            own = numbers[rows] == fold
            predicted[np.arange(rows.start, rows.stop)[own]] = part[own] @ weight
    return predicted


def _correlation(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson's, of each shuffle `(n, shuffle, column)`, averaged over columns; 0 for what is constant."""
    a = labels - labels.mean(0)
    b = predicted - predicted.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    found = (a * b).sum(0) / np.where(size > 0, size, np.inf)
    return np.asarray(np.nan_to_num(found).mean(-1))

"""Linear probes on vectors that do not fit into memory, fitted chunk by chunk by stochastic gradients.

All folds, strengths and labels learn side by side, so that an epoch reads the file once. A chunk is made
of blocks from all over the file in an order that changes with each epoch, since neighbours are often alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn import config_context
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from reftlab.probing.cells import Cell
from reftlab.probing.estimators import Predictions, blank, predictions
from reftlab.probing.folds import Splits, fold_of
from reftlab.probing.labels import Kind
from reftlab.probing.significance import Chunks

__all__ = ["EPOCHS", "Stream", "fit_on_all_streamed", "out_of_fold_streamed", "scaled_chunks"]

EPOCHS = 5
"""How often each chunk is learned from."""

_ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
_UNCHOSEN_ALPHA = 1e-3
_BLOCKS = 16
_COPIES = 6
_LEAST = 1e-7


@dataclass(frozen=True, eq=False)
class Stream:
    """A cell read in chunks.

    Attributes:
        cell: the vectors.
        rows: how many of them are in memory at once.
        seed: of the order of the chunks.
    """

    cell: Cell
    rows: int
    seed: int

    @classmethod
    def of(cls, cell: Cell, memory: int, seed: int) -> Stream:
        """Chunks of such a size that they and their copies take half of `memory` bytes."""
        n, width = cell.shape
        return cls(cell, min(n, max(_BLOCKS, memory // (2 * _COPIES * 4 * width))), seed)

    def in_order(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The vectors from the first to the last."""
        n, _ = self.cell.shape
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            yield rows, self.cell.take(rows)

    def shuffled(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and vectors of chunks in random order."""
        n, _ = self.cell.shape
        generator = np.random.default_rng([self.seed, epoch])
        size = max(1, self.rows // _BLOCKS)
        starts = generator.permutation(np.arange(0, n, size))
        for first in range(0, len(starts), _BLOCKS):
            slices = [slice(start, min(start + size, n)) for start in starts[first : first + _BLOCKS]]
            numbers = np.concatenate([np.arange(one.start, one.stop) for one in slices])
            vectors = np.concatenate([self.cell.take(one) for one in slices])
            order = generator.permutation(len(numbers))
            yield numbers[order], vectors[order]


@dataclass(eq=False)
class _Learner:
    """One training part at one strength: a scaler, and a head for the labels or each of several.

    Attributes:
        rows: which vectors it learns from, `(n,)` bool.
        alpha: strength of regularisation.
        scaler: fitted before the heads learn; learners of the same rows share it.
    """

    rows: np.ndarray
    alpha: float
    scaler: StandardScaler
    kind: Kind
    columns: list[np.ndarray]
    heads: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.centre, self.spread = 0.0, 1.0
        if self.kind == "regression":
            own = self.columns[0][self.rows]
            self.centre, self.spread = float(own.mean()), float(own.std()) or 1.0
        self.classes = [np.unique(column[self.rows]) for column in self.columns]
        self.weights = [_balanced(column, self.rows) for column in self.columns]

    def learn(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        own = self.rows[rows]
        if not own.any():
            return
        scaled = self.scaler.transform(vectors[own])
        if not self.heads:
            self.heads = [self._head(scaled.shape[1]) for _ in self.columns]
        for head, column, classes, weights in zip(
            self.heads, self.columns, self.classes, self.weights, strict=True
        ):
            y = column[rows[own]]
            if self.kind == "regression":
                head.partial_fit(scaled, (y - self.centre) / self.spread)
            elif len(classes) > 1:
                head.partial_fit(scaled, y, classes=classes, sample_weight=weights[y])

    def fitted(self) -> Any:
        """What was learned, as one estimator."""
        heads = []
        for head, classes in zip(self.heads, self.classes, strict=True):
            if self.kind == "regression":
                head.coef_ = head.coef_ * self.spread
                head.intercept_ = head.intercept_ * self.spread + self.centre
            one_class = self.kind != "regression" and len(classes) == 1
            heads.append(classes[0] if one_class else Pipeline([("scale", self.scaler), ("probe", head)]))
        if self.kind != "multilabel":
            return heads[0]
        together = MultiOutputClassifier(self._head(1))
        together.estimators_ = heads
        together.classes_ = self.classes
        return together

    def _head(self, width: int) -> Any:
        if self.kind == "regression":
            # A step of 1 / ‖h‖² would fit a vector at once, and scaled vectors have ‖h‖² near the width.
            return SGDRegressor(alpha=self.alpha, average=True, eta0=0.5 / width, random_state=0)
        return SGDClassifier(loss="log_loss", alpha=self.alpha, average=True, random_state=0)


def out_of_fold_streamed(
    stream: Stream, y: np.ndarray, splits: Splits, kind: Kind, classes: int
) -> Predictions:
    """Predictions on what is held out, as `out_of_fold` gives them in memory.

    Args:
        stream: the vectors.
        y: labels as numbers.
        splits: the folds; of inner splits the first one chooses the strength.
        kind: what the labels are.
        classes: number of classes.
    """
    learned = _learn(stream, y, [(split.train, split.inner) for split in splits.folds], kind)
    found = blank(len(y), y, kind, classes)
    folds = fold_of(splits.folds, len(y))
    for rows, vectors in stream.in_order():
        for fold, fitted in enumerate(learned):
            own = folds[rows] == fold
            if own.any():
                part = predictions(fitted, vectors[own], kind, classes)
                places = np.arange(rows.start, rows.stop)[own]
                found.predicted[places], found.scores[places] = part.predicted, part.scores
    return found


def fit_on_all_streamed(stream: Stream, y: np.ndarray, splits: Splits, kind: Kind) -> Any:
    """The estimator on all vectors."""
    return _learn(stream, y, [(np.arange(len(y)), splits.whole)], kind)[0]


def scaled_chunks(stream: Stream) -> Chunks:
    """The vectors in order, scaled to mean 0 and variance 1, each time they are asked for."""
    scaler = StandardScaler()
    for _, vectors in stream.in_order():
        scaler.partial_fit(vectors)

    def chunks() -> Iterator[tuple[slice, np.ndarray]]:
        for rows, vectors in stream.in_order():
            yield rows, scaler.transform(vectors).astype(np.float32)

    return chunks


def _learn(stream: Stream, y: np.ndarray, parts: Sequence[tuple[np.ndarray, Any]], kind: Kind) -> list[Any]:
    """An estimator for each training part, its strength chosen inside it."""
    columns = list(y.T) if y.ndim == 2 else [y]
    alphas = _chosen(stream, y, parts, kind, columns)
    learners = [
        _Learner(_mask(train, len(y)), alpha, StandardScaler(), kind, columns)
        for (train, _), alpha in zip(parts, alphas, strict=True)
    ]
    _run(stream, learners)
    return [learner.fitted() for learner in learners]


def _chosen(
    stream: Stream,
    y: np.ndarray,
    parts: Sequence[tuple[np.ndarray, Any]],
    kind: Kind,
    columns: list[np.ndarray],
) -> list[float]:
    tried: list[list[_Learner]] = []
    tests: list[np.ndarray] = []
    for train, inner in parts:
        if not len(inner):
            tried.append([])
            tests.append(np.zeros(len(y), dtype=bool))
            continue
        own, scaler = _mask(train[inner[0][0]], len(y)), StandardScaler()
        tried.append([_Learner(own, alpha, scaler, kind, columns) for alpha in _ALPHAS])
        tests.append(_mask(train[inner[0][1]], len(y)))
    _run(stream, [learner for learners in tried for learner in learners])
    fitted = [[learner.fitted() for learner in learners] for learners in tried]
    losses = [np.zeros(len(own)) for own in fitted]
    for rows, vectors in stream.in_order():
        for tries, test, loss in zip(fitted, tests, losses, strict=True):
            held = np.arange(rows.start, rows.stop)[test[rows]]
            for number, one in enumerate(tries if len(held) else ()):
                loss[number] += _loss(one, vectors[test[rows]], y[held], kind, y[test])
    return [_ALPHAS[int(loss.argmin())] if len(loss) else _UNCHOSEN_ALPHA for loss in losses]


def _run(stream: Stream, learners: Sequence[_Learner]) -> None:
    if not learners:
        return
    scalers = {id(learner.scaler): learner for learner in learners}
    # The vectors were checked when they were read, and checks take longer than a chunk's arithmetic.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for rows, vectors in stream.in_order():
            for learner in scalers.values():
                own = learner.rows[rows]
                if own.any():
                    learner.scaler.partial_fit(vectors[own])
        for epoch in range(EPOCHS):
            for numbers, vectors in stream.shuffled(epoch):
                for learner in learners:
                    learner.learn(numbers, vectors)


def _loss(fitted: Any, vectors: np.ndarray, y: np.ndarray, kind: Kind, held_out: np.ndarray) -> float:
    """Loss on some held-out vectors: squared, or the log-loss with classes weighted equally."""
    if kind == "regression":
        return float(((fitted.predict(vectors) - y) ** 2).sum())
    if kind == "multilabel":
        return sum(
            _loss(one, vectors, y[:, n], "classification", held_out[:, n])
            for n, one in enumerate(fitted.estimators_)
        )
    if isinstance(fitted, int | np.integer):
        return 0.0
    classes = np.asarray(fitted.classes_)
    column = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    said = fitted.predict_proba(vectors)[np.arange(len(y)), column]
    said = np.where(classes[column] == y, said, 0).clip(min=_LEAST)
    return float(-(np.log(said) / np.bincount(held_out)[y]).sum())


def _balanced(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The weight of each class by its number, so that all weigh the same together."""
    if column.dtype.kind == "f":
        return np.ones(1)
    counts = np.bincount(column[rows], minlength=int(column.max()) + 1)
    weights = rows.sum() / np.maximum(counts, 1) / max(1, int((counts > 0).sum()))
    return np.asarray(weights)


def _mask(rows: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[rows] = True
    return mask

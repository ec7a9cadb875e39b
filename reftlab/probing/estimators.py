"""Estimators by name, regularised inside each training fold, and predictions on what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.model_selection._search import BaseSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from reftlab.errors import DataError
from reftlab.probing.directions import MeanDifference
from reftlab.probing.folds import Split
from reftlab.probing.labels import Kind

__all__ = ["ALPHAS", "C_GRID", "UNCHOSEN_C", "Predictions", "Probe", "blank", "fit_on_all", "out_of_fold"]
__all__ += ["predictions", "probe_of"]

C_GRID = (0.001, 0.01, 0.1, 1.0)
"""Inverse strengths of L2 regularisation of logistic regression on scaled vectors."""

ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Strengths of ridge regression on scaled vectors."""

UNCHOSEN_C, _UNCHOSEN_ALPHA = 0.1, 100.0
"""Where the rarest class is in too few groups to choose."""

_NAMES = ("auto", "logistic", "ridge", "mean_difference", "lda")
_LEAST = 1e-7


@dataclass(frozen=True, eq=False)
class Probe:
    """What is fitted in each cell.

    Attributes:
        name: `logistic`, `ridge`, `mean_difference`, `lda`, or the text of the user's own estimator.
        own: the user's estimator, never fitted itself; None for those by name.
        kind: what the labels are.
    """

    name: str
    own: BaseEstimator | None
    kind: Kind

    @property
    def short_name(self) -> str:
        """The name, or the class of what decides in the user's own estimator, its last step."""
        return self.name if self.own is None else _decides(self.own)

    def build(self, inner: Sequence[tuple[np.ndarray, np.ndarray]] = (), classes: int = 2) -> Any:
        """A new estimator.

        Args:
            inner: splits of the training part, by which regularisation is chosen; none for a fixed one.
            classes: number of classes in the training part.
        """
        if self.own is not None:
            built = clone(self.own)
        elif self.name == "mean_difference":
            built = MeanDifference()
        elif self.name == "lda":
            classes = 2 if self.kind == "multilabel" else classes
            # Equal priors, as balanced class weights are for logistic regression.
            built = LinearDiscriminantAnalysis(
                solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
            )
        else:
            built = _regularised(self.name, inner)
        return MultiOutputClassifier(built) if self.kind == "multilabel" else built


def probe_of(estimator: Any, kind: Kind) -> Probe:
    """What `estimator` means for labels of a kind.

    Raises:
        DataError: no name of an estimator, no estimator, or one for other labels.
    """
    if isinstance(estimator, str):
        name = estimator
        if name not in _NAMES:
            raise DataError(
                f"estimator={name!r}: expected one of {', '.join(map(repr, _NAMES))}, or an estimator of "
                "scikit-learn's kind"
            )
        if name == "auto":
            name = "ridge" if kind == "regression" else "logistic"
        if (name == "ridge") != (kind == "regression"):
            right = "'ridge'" if kind == "regression" else "'logistic', 'mean_difference' or 'lda'"
            what = "numbers" if kind == "regression" else "classes"
            raise DataError(f"estimator={name!r}: the labels are {what}; take {right}, or say kind=")
        return Probe(name, None, kind)
    if isinstance(estimator, type) or not all(
        hasattr(estimator, verb) for verb in ("fit", "predict", "get_params")
    ):
        raise DataError(
            f"estimator={estimator!r:.80}: expected one of {', '.join(map(repr, _NAMES))}, or an object with "
            "scikit-learn's fit, predict and get_params"
        )
    fits = is_regressor(estimator) if kind == "regression" else is_classifier(estimator)
    if not fits:
        right = "a regressor" if kind == "regression" else "a classifier"
        raise DataError(
            f"estimator={estimator!r:.80}: the labels are for {right} ({kind}); give one, or kind="
        )
    return Probe(" ".join(repr(estimator).split()), estimator, kind)


def _decides(estimator: Any) -> str:
    if isinstance(estimator, BaseSearchCV):
        return _decides(estimator.estimator)
    steps = [step for _, step in getattr(estimator, "steps", ()) if not isinstance(step, str)]
    return _decides(steps[-1]) if steps else type(estimator).__name__


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions on held-out rows.

    Attributes:
        predicted: numbers of classes `(n,)`, 0 and 1 `(n, label)`, or numbers `(n,)`.
        scores: how strongly each class or label is spoken for, `(n, classes)` or `(n, label)`; a column
            for two classes alone; the predictions themselves for numbers. NaN where an estimator gives none.
    """

    predicted: np.ndarray
    scores: np.ndarray


def out_of_fold(
    probe: Probe,
    vectors: np.ndarray,
    y: np.ndarray,
    folds: Sequence[Split],
    classes: int,
) -> Predictions:
    """Fit on each training part, and predict what was held out of it.

    Args:
        probe: what is fitted.
        vectors: `(n, width)`.
        y: labels as numbers.
        folds: the splits.
        classes: number of classes.
    """
    empty = blank(len(y), y, probe.kind, classes)
    for split in folds:
        fitted = _fitted(probe, vectors[split.train], y[split.train], split.inner)
        found = predictions(fitted, vectors[split.test], probe.kind, classes)
        empty.predicted[split.test], empty.scores[split.test] = found.predicted, found.scores
    return empty


def blank(n: int, y: np.ndarray, kind: Kind, classes: int) -> Predictions:
    """Room for predictions of `n` rows."""
    if kind == "multilabel":
        return Predictions(np.empty((n, y.shape[1]), y.dtype), np.full((n, y.shape[1]), np.nan))
    width = 1 if kind == "regression" or classes == 2 else classes
    return Predictions(np.empty(n, y.dtype), np.full((n, width), np.nan))


def predictions(fitted: Any, vectors: np.ndarray, kind: Kind, classes: int) -> Predictions:
    """What a fitted estimator, or the one class that was there to learn, says of vectors."""
    if isinstance(fitted, int | np.integer):
        scores = np.zeros((len(vectors), classes))
        scores[:, fitted] = 1
        return Predictions(np.full(len(vectors), fitted), scores[:, 1:] if classes == 2 else scores)
    if isinstance(fitted, MultiOutputClassifier):
        columns = [predictions(one, vectors, "classification", 2) for one in fitted.estimators_]
        return Predictions(
            np.stack([one.predicted for one in columns], 1),
            np.concatenate([one.scores for one in columns], 1),
        )
    predicted = np.asarray(fitted.predict(vectors))
    if kind == "regression":
        predicted = predicted.reshape(len(vectors))
        return Predictions(predicted, predicted[:, None].astype(np.float64))
    return Predictions(predicted, _class_scores(fitted, vectors, classes))


def _class_scores(fitted: Any, vectors: np.ndarray, classes: int) -> np.ndarray:
    held = np.asarray(fitted.classes_).astype(int)
    if hasattr(fitted, "decision_function"):
        # Not rounded to 0 and 1 as probabilities of far-off vectors are, so that their order remains.
        own = np.asarray(fitted.decision_function(vectors), dtype=np.float64)
        own = np.stack([-own, own], 1) if own.ndim == 1 else own
        if own.shape[1] != len(held):
            own = (
                np.asarray(fitted.predict_proba(vectors)) if hasattr(fitted, "predict_proba") else own[:, :0]
            )
        elif len(held) > 2 and hasattr(fitted, "predict_proba"):
            # Of several classes, probabilities compare between vectors; one class's decision does not.
            own = np.asarray(fitted.predict_proba(vectors))
    elif hasattr(fitted, "predict_proba"):
        own = np.asarray(fitted.predict_proba(vectors), dtype=np.float64)
    else:
        own = np.full((len(vectors), len(held)), np.nan)
    if own.shape[1] != len(held):
        own = np.full((len(vectors), len(held)), np.nan)
    if classes == 2 and len(held) == 2:
        return own[:, 1:]
    scores = np.full((len(vectors), classes), np.nanmin(own) if np.isfinite(own).any() else np.nan)
    scores[:, held] = own
    return scores[:, 1:] if classes == 2 else scores


def _fitted(probe: Probe, vectors: np.ndarray, y: np.ndarray, inner: Any) -> Any:
    """A fitted estimator; where control labels leave one class in a training part, that class."""
    if probe.kind == "classification":
        held = np.unique(y)
        if len(held) == 1:
            return held[0]
        # Inner splits are made for the true labels; control labels may leave one class alone in a part.
        usable = all(len(np.unique(y[train])) > 1 for train, _ in inner)
        return probe.build(inner if usable else (), len(held)).fit(vectors, y)
    if probe.kind == "regression":
        return probe.build(inner).fit(vectors, y)
    columns = [
        _fitted(Probe(probe.name, probe.own, "classification"), vectors, column, inner) for column in y.T
    ]
    together = probe.build(inner)
    together.estimators_ = columns
    return together


def fit_on_all(probe: Probe, vectors: np.ndarray, y: np.ndarray, inner: Any) -> Any:
    """The estimator on all vectors, its regularisation chosen by the inner splits."""
    fitted = probe.build(inner, len(np.unique(y)) if y.ndim == 1 else 2).fit(vectors, y)
    if isinstance(fitted, MultiOutputClassifier):
        fitted.estimators_ = [_chosen(one) for one in fitted.estimators_]
    return _chosen(fitted)


def _chosen(fitted: Any) -> Any:
    return fitted.best_estimator_ if isinstance(fitted, GridSearchCV) else fitted


def _regularised(name: str, inner: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
    """A scaler and a linear model in one pipeline, so that both see the training part alone."""
    if name == "ridge":
        pipeline = Pipeline([("scale", StandardScaler()), ("probe", Ridge(alpha=_UNCHOSEN_ALPHA))])
        grid: dict[str, Any] = {"probe__alpha": ALPHAS}
        scoring: Any = "neg_mean_squared_error"
    else:
        head = LogisticRegression(C=UNCHOSEN_C, class_weight="balanced", max_iter=2000)
        pipeline = Pipeline([("scale", StandardScaler()), ("probe", head)])
        grid, scoring = {"probe__C": C_GRID}, _balanced_log_likelihood
    return GridSearchCV(pipeline, grid, cv=list(inner), scoring=scoring) if len(inner) else pipeline


def _balanced_log_likelihood(fitted: Any, vectors: np.ndarray, y: np.ndarray) -> float:
    """What balanced logistic regression maximises, on vectors that it has not seen."""
    classes = np.asarray(fitted.classes_)
    column = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    known = classes[column] == y
    chosen = np.where(known, fitted.predict_proba(vectors)[np.arange(len(y)), column], 0).clip(min=_LEAST)
    return float(np.average(np.log(chosen), weights=compute_sample_weight("balanced", y)))

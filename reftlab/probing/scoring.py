"""Scores of held-out predictions under weights, so that bootstrap replicates are one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from reftlab.probing.estimators import Predictions
from reftlab.probing.labels import Kind

__all__ = ["HEADLINE", "METRICS", "bootstrap_intervals", "chance_levels", "scores_of", "weighted_scores"]

METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("balanced_accuracy", "accuracy", "auroc"),
    "multilabel": ("balanced_accuracy", "accuracy", "auroc"),
    "regression": ("r2",),
}
HEADLINE: Mapping[Kind, str] = {kind: names[0] for kind, names in METRICS.items()}

_NUMBERS_AT_ONCE = 2_000_000

Weights = Float[np.ndarray, "replicate n"]
Values = Float[np.ndarray, " replicate"]


def chance_levels(y: np.ndarray, kind: Kind, classes: int) -> dict[str, float]:
    """What each score is without any knowledge of the vectors: by the commonest class, or by the mean."""
    if kind == "regression":
        return {"r2": 0.0}
    if kind == "multilabel":
        share = y.mean(0)
        return {
            "balanced_accuracy": 0.5,
            "accuracy": float(np.maximum(share, 1 - share).mean()),
            "auroc": 0.5,
        }
    share = np.bincount(y, minlength=classes) / len(y)
    return {"balanced_accuracy": 1 / classes, "accuracy": float(share.max()), "auroc": 0.5}


def scores_of(y: np.ndarray, found: Predictions, kind: Kind, classes: int) -> dict[str, float]:
    """Each score of all held-out predictions together."""
    weights = np.ones((1, len(y)))
    return {
        name: float(value[0]) for name, value in weighted_scores(y, found, kind, classes, weights).items()
    }


def weighted_scores(
    y: np.ndarray, found: Predictions, kind: Kind, classes: int, weights: Weights
) -> dict[str, Values]:
    """The scores where each vector counts so many times.

    Args:
        y: labels as numbers.
        found: the predictions.
        kind: what the labels are.
        classes: number of classes.
        weights: how often each vector counts, `(replicate, n)`.

    Returns:
        By name `(replicate,)`; NaN where a replicate has nothing to score, such as one class alone.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "regression":
            return {"r2": _r2(y, found.predicted, weights)}
        if kind == "multilabel":
            columns = [
                _binary(y[:, n], found.predicted[:, n], found.scores[:, n], weights)
                for n in range(y.shape[1])
            ]
            return {name: np.nanmean([one[name] for one in columns], 0) for name in columns[0]}
        if classes == 2:
            return _binary(y, found.predicted, found.scores[:, 0], weights)
        return _classes(y, found, classes, weights)


def bootstrap_intervals(
    y: np.ndarray,
    found: Predictions,
    kind: Kind,
    classes: int,
    groups: np.ndarray,
    replicates: int,
    level: float,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals over resampled groups, the predictions staying what they are.

    Args:
        y, found, kind, classes: as for `weighted_scores`.
        groups: group of each vector; groups are drawn with replacement.
        replicates: how many draws; 0 gives NaN.
        level: share of the draws between the two ends.
        seed: the same draws for all cells of the same groups.
    """
    names = METRICS[kind]
    if not replicates:
        return dict.fromkeys(names, (float("nan"), float("nan")))
    held, own = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(seed)
    values: dict[str, list[Any]] = {name: [] for name in names}
    step = max(1, _NUMBERS_AT_ONCE // len(y))
    for start in range(0, replicates, step):
        size = min(step, replicates - start)
        counts = generator.multinomial(len(held), np.full(len(held), 1 / len(held)), size)
        drawn = weighted_scores(y, found, kind, classes, counts[:, own].astype(np.float64))
        for name in names:
            values[name].append(drawn[name])
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: _ends(np.concatenate(parts), ends) for name, parts in values.items()}


def _ends(values: Values, ends: list[float]) -> tuple[float, float]:
    if not np.isfinite(values).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, ends)
    return float(low), float(high)


def _r2(y: np.ndarray, predicted: np.ndarray, weights: Weights) -> Values:
    total = weights.sum(1)
    left = weights @ (y - predicted) ** 2
    mean = weights @ y / total
    # Around a mean near the replicates' own, so that large labels lose no digits.
    centre = y.mean()
    spread = weights @ (y - centre) ** 2 - total * (mean - centre) ** 2
    return np.asarray(1 - left / spread)


def _binary(y: np.ndarray, predicted: np.ndarray, scores: np.ndarray, weights: Weights) -> dict[str, Values]:
    right = (predicted == y).astype(np.float64)
    recalls = [weights @ (right * (y == number)) / (weights @ (y == number)) for number in (0, 1)]
    return {
        "balanced_accuracy": np.nanmean(recalls, 0),
        "accuracy": weights @ right / weights.sum(1),
        "auroc": _auroc(y == 1, scores, weights),
    }


def _classes(y: np.ndarray, found: Predictions, classes: int, weights: Weights) -> dict[str, Values]:
    right = (found.predicted == y).astype(np.float64)
    recalls = [weights @ (right * (y == number)) / (weights @ (y == number)) for number in range(classes)]
    areas = [_auroc(y == number, found.scores[:, number], weights) for number in range(classes)]
    return {
        "balanced_accuracy": np.nanmean(recalls, 0),
        "accuracy": weights @ right / weights.sum(1),
        "auroc": np.nanmean(areas, 0) if np.isfinite(areas).any() else np.full(len(weights), np.nan),
    }


def _auroc(positive: np.ndarray, scores: np.ndarray, weights: Weights) -> Values:
    """Share of pairs, one positive and one not, in which the positive one scores higher; ties count half."""
    if not np.isfinite(scores).all():
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    ordered = weights[:, order]
    up = np.add.reduceat(ordered * positive[order], starts, axis=1)
    down = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = down.cumsum(1) - down
    return np.asarray((up * (below + down / 2)).sum(1) / (up.sum(1) * down.sum(1)))

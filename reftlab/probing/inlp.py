"""Iterative nullspace projection: remove directions until no linear classifier finds a concept.

Ravfogel et al., "Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection" (2020,
arXiv:2004.07667).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.graph.linear_probe import linear_parts
from reftlab.interventions.erase import ProjectOut
from reftlab.probing.checks import as_classes, as_groups, as_vectors, seed_number
from reftlab.probing.folds import grouped_folds
from reftlab.probing.labels import Labels
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Inlp", "inlp"]


@dataclass(frozen=True, eq=False)
class Inlp:
    """Which directions were removed, and what a linear classifier could find before and after each round.

    Attributes:
        directions: orthonormal rows `(k, width)`, in the order in which they were removed.
        mean: mean of the classes' means, `(width,)`, which vectors get along the directions.
        accuracies: balanced accuracy on held-out examples before the first round and after each,
            `(rounds + 1,)`.
        removed: how many directions are gone at each of these, `(rounds + 1,)`, from 0.
        chance: balanced accuracy without information, 1 / classes.
        threshold: an accuracy up to this counts as chance; see `inlp`.
        classes: the classes.
        n: how many vectors there were.
        stopped: `chance`, `rounds` (as many as were asked for) or `width` (nothing is left to remove).
    """

    directions: Float[np.ndarray, "k width"]
    mean: Float[np.ndarray, " width"]
    accuracies: tuple[float, ...]
    removed: tuple[int, ...]
    chance: float
    threshold: float
    classes: tuple[Any, ...]
    n: int
    stopped: Literal["chance", "rounds", "width"]

    @property
    def rounds(self) -> int:
        """How many rounds removed something."""
        return len(self.accuracies) - 1

    def intervention(self) -> ProjectOut:
        """The removal as an intervention: `ProjectOut(directions, mean)`.

        Raises:
            DataError: no direction was removed.
        """
        if not len(self.directions):
            raise DataError(
                f"no direction was removed: held-out balanced accuracy {self.accuracies[0]:.3f} counts as "
                f"chance (up to {self.threshold:.3f})"
            )
        return ProjectOut(self.directions.tolist(), self.mean.tolist())

    def to_frame(self) -> pd.DataFrame:
        """One line a round, from 0: directions removed by then, accuracy, chance and threshold."""
        import pandas as pd

        return pd.DataFrame(
            {
                "round": range(len(self.accuracies)),
                "removed": self.removed,
                "balanced_accuracy": self.accuracies,
                "chance": self.chance,
                "threshold": self.threshold,
            }
        )

    def plot(self) -> Figure:
        """Held-out balanced accuracy against the number of directions removed."""
        from reftlab.plotting.probe_curves import nullspace_figure

        return nullspace_figure(
            self.removed,
            self.accuracies,
            self.chance,
            self.threshold,
            f"Iterative nullspace projection, {self.n} vectors",
        )

    def __repr__(self) -> str:
        return (
            f"Inlp({len(self.directions)} directions in {self.rounds} rounds; held-out balanced accuracy "
            f"{self.accuracies[0]:.3f} → {self.accuracies[-1]:.3f}, chance {self.chance:.3g}; stopped at "
            f"{self.stopped})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format)
        return f"<div><p>{html.escape(repr(self))}</p>{table}</div>"


def inlp(
    X: Any,  # noqa: N803
    y: Any,
    estimator: Any = None,
    groups: Sequence[Any] | Any | None = None,
    *,
    rounds: int | None = None,
    seed: int = 0,
    folds: int = 5,
    level: float = 0.05,
    progress: bool = True,
) -> Inlp:
    """Remove what linear classifiers find of a concept, one classifier after the other.

    Each round fits a linear classifier on the vectors that are left and projects out what its weights
    span: its direction for two classes, the differences between its classes' weights for more. Whether
    something is left is asked of held-out examples: for each fold the whole sequence of classifiers and
    projections is fitted on the other folds, and the balanced accuracy is that of all folds' predictions
    together. The directions in the result are fitted on all vectors.

    It stops where the balanced accuracy is at most chance + z c √(Σ_k p (1 − p) / n_k) / K, with p = 1 / K,
    n_k the number of groups with class k, z the normal distribution's quantile at 1 − `level`, and
    c = √(1 + F / (F − 1)) for F folds, since classifiers that share most of their examples err together
    (Nadeau and Bengio, "Inference for the Generalization Error", 2003). Random labels exceed this in
    less than a share of `level` of all data sets. From finitely many examples no direction is found
    exactly, and a round more than the concept has directions is usual.

    Where one direction is enough, as for the difference of two classes' means, `rl.ProjectOut.fit` and
    `rl.Erase.fit` (LEACE) remove less.

    Args:
        X: vectors `(n, width)`.
        y: n classes.
        estimator: a linear scikit-learn classifier; a logistic regression with balanced classes on
            standardised vectors unless given. Cloned for each fit.
        groups: which examples belong together and are held out together; each on its own unless given.
        rounds: at most so many rounds; until chance unless given.
        seed: of the folds.
        folds: how many.
        level: how often random labels may count as found in one round.
        progress: show a bar over the rounds.

    Returns:
        The directions, the accuracies before and after each round, and why it stopped.

    Raises:
        DataError: vectors or classes that cannot be used, a class in fewer groups than folds, or an
            estimator that cannot be fitted.
        GraphError: the estimator is not linear.

    >>> vectors = np.random.default_rng(0).standard_normal((400, 4))
    >>> found = inlp(vectors, vectors[:, 2] > 0, progress=False)
    >>> found.directions.shape, bool(abs(found.directions[0, 2]) > 0.95)
    ((1, 4), True)
    """
    vectors = as_vectors(X).astype(np.float64)
    names, classes = as_classes(y, len(vectors))
    numbers = as_groups(groups, len(vectors))
    most = vectors.shape[1] if rounds is None else whole("rounds", rounds, 1)
    folds, labels = whole("folds", folds, 2), Labels("classification", classes, tuple(names))
    splits = grouped_folds(classes, numbers, labels, folds, seed_number(seed))
    chance, threshold = _threshold(classes, numbers, len(splits), level)
    model = _default() if estimator is None else estimator
    full = _Track(model, vectors, classes, np.arange(len(vectors)))
    held_out = [(_Track(model, vectors, classes, train), test) for train, test in splits]
    accuracies, removed = [_accuracy(held_out, classes)], [0]
    with tqdm(total=rounds, desc="INLP rounds", disable=not progress) as bar:
        while accuracies[-1] > threshold and len(accuracies) <= most and full.advance():
            for track, _ in held_out:
                track.advance()
            accuracies.append(_accuracy(held_out, classes))
            removed.append(len(full.basis))
            bar.update()
    asked = rounds is not None and len(accuracies) > rounds
    return Inlp(
        full.basis,
        np.stack([vectors[classes == k].mean(0) for k in range(len(names))]).mean(0),
        tuple(accuracies),
        tuple(removed),
        chance,
        threshold,
        tuple(names),
        len(vectors),
        "chance" if accuracies[-1] <= threshold else "rounds" if asked else "width",
    )


class _Track:
    """One sequence of classifiers and projections, fitted on some of the vectors.

    Attributes:
        basis: the directions removed so far, orthonormal rows.
    """

    def __init__(self, model: Any, vectors: Any, classes: Any, train: Any) -> None:
        self.model, self.vectors, self.classes, self.train = model, vectors, classes, train
        self.basis = np.zeros((0, vectors.shape[1]))
        self.spreads = vectors[train].std(0)
        self._fitted: Any = None
        self._weights: Any = None

    def predict(self, test: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """What the classifier of this round says of vectors that it was not fitted on."""
        left, gone = self._left()
        return np.asarray(
            self._classifier(left, gone).predict(_without(self.vectors[test], self.basis, gone))
        )

    def advance(self) -> int:
        """Remove what this round's classifier looks at; return how many directions that were."""
        self._classifier(*self._left())
        weights = self._weights
        # What all rows share decides between no classes.
        weights = weights if len(weights) == 1 else weights - weights.mean(0)
        largest = np.linalg.norm(weights)
        # Along what is removed already the vectors are constant, whatever weight they get there.
        weights = weights - weights @ self.basis.T @ self.basis
        _, lengths, ways = np.linalg.svd(weights, full_matrices=False)
        new = ways[(lengths > 1e-6 * largest) & (lengths > 0)][: self.basis.shape[1] - len(self.basis)]
        # Once more, since a small remainder is not exactly at right angles to what was taken from it.
        new = np.linalg.qr((new - new @ self.basis.T @ self.basis).T)[0].T
        self.basis = np.concatenate([self.basis, new])
        self._fitted = None
        return len(new)

    def _classifier(self, left: Any, gone: Any) -> Any:
        from sklearn.base import clone

        if self._fitted is None:
            try:
                fitted = clone(self.model).fit(left, self.classes[self.train])
            except ValueError as error:
                raise DataError(f"estimator={self.model!r} cannot be fitted: {error}") from error
            self._weights, self._fitted = linear_parts(fitted).weights, fitted
        return self._fitted

    def _left(self) -> tuple[Any, Any]:
        """The vectors fitted on, projected, and which of their features are gone altogether."""
        left = _without(self.vectors[self.train], self.basis, np.zeros(len(self.spreads), dtype=bool))
        # Rounding leaves a trace of such a feature, which a scaler would blow up to full size.
        gone = left.std(0) <= 1e-9 * self.spreads
        left[:, gone] = 0.0
        return left, gone


def _without(vectors: Any, basis: Any, gone: Any) -> Any:
    left = vectors - vectors @ basis.T @ basis
    left[:, gone] = 0.0
    return left


def _accuracy(held_out: list[tuple[_Track, Any]], classes: Int[np.ndarray, " n"]) -> float:
    """Balanced accuracy of the folds' predictions together."""
    right = np.zeros(len(classes), dtype=bool)
    for track, test in held_out:
        right[test] = track.predict(test) == classes[test]
    return float(np.mean([right[classes == k].mean() for k in np.unique(classes)]))


def _threshold(classes: Any, groups: Any, folds: int, level: float) -> tuple[float, float]:
    """Balanced accuracy by chance, and up to where it counts as chance."""
    from scipy.stats import norm  # type: ignore[import-untyped]

    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 0.5:
        raise DataError(f"level={level!r}: expected a share between 0 and 0.5, such as 0.05")
    count = int(classes.max()) + 1
    share = 1.0 / count
    # Examples of one group stand or fall together, so that groups, not examples, are counted.
    independent = np.array([len(np.unique(groups[classes == k])) for k in range(count)])
    error = float(np.sqrt((share * (1 - share) / independent).sum())) / count
    error *= float(np.sqrt(1 + folds / (folds - 1)))
    return share, share + float(norm.isf(level)) * error


def _default() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))

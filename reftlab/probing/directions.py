"""Directions that tell classes apart: difference of means, linear discriminant, logistic regression."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from reftlab.errors import DataError
from reftlab.graph.linear_probe import linear_parts
from reftlab.probing.checks import as_classes, as_vectors

__all__ = ["MeanDifference", "Method", "class_directions", "linear_parts"]

Method = Literal["mean_difference", "lda", "logistic"]


class MeanDifference(ClassifierMixin, BaseEstimator):
    """Nearest class mean: for two classes, the difference of their means as a probe.

    With the class means μ_k, their mean μ̄ and a spread s², the decision value of class k is

        (μ_k − μ̄) · (h − μ̄) / s² − ‖μ_k − μ̄‖² / 2s²,

    the log-odds, up to what all classes share, of equally frequent Gaussians of variance s² around the
    means; for two classes the one decision value is the difference of both. s² is the variance within
    classes along the directions μ_k − μ̄, weighted by their squared lengths, so that probabilities are
    right where the vectors vary much more, or less, along other directions. How many examples a class
    has does not matter.

    As a probe: Marks and Tegmark, "The Geometry of Truth" (2023, arXiv:2310.06824).

    Attributes:
        classes_: the classes, in order.
        means_: μ_k, `(classes, width)`.
        coef_: `(classes, width)`, or `(1, width)` along μ_1 − μ_0 for two classes.
        intercept_: `(classes,)` or `(1,)`.

    >>> probe = MeanDifference().fit([[0.0, 1.0], [0.0, -1.0], [4.0, 1.0], [4.0, -1.0]], [0, 0, 1, 1])
    >>> probe.predict([[1.9, 5.0], [2.1, 5.0]]).tolist()
    [0, 1]
    """

    def fit(self, X: Any, y: Any) -> MeanDifference:  # noqa: N803
        """Take the means of the classes.

        Args:
            X: vectors `(n, width)`.
            y: n classes, at least two different ones.

        Raises:
            ValueError: vectors or classes that cannot be used.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])  # noqa: N806
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y holds {len(self.classes_)} class, {self.classes_.tolist()}; at least 2 are needed"
            )
        vectors = X.astype(np.float64)
        self.means_ = np.stack([vectors[numbers == k].mean(0) for k in range(len(self.classes_))])
        centre = self.means_.mean(0)
        ways = self.means_ - centre
        scaled = ways / _spread(vectors - self.means_[numbers], ways)
        intercepts = -0.5 * (scaled * ways).sum(1) - scaled @ centre
        if len(self.classes_) == 2:
            scaled, intercepts = scaled[1:] - scaled[:1], intercepts[1:] - intercepts[:1]
        self.coef_, self.intercept_ = scaled, intercepts
        return self

    def decision_function(self, X: Any) -> Any:  # noqa: N803
        """Log-odds of the second class `(n,)`, or a value for each of more classes `(n, classes)`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])  # noqa: N806
        values = X @ self.coef_.T + self.intercept_
        return values[:, 0] if values.shape[1] == 1 else values

    def predict(self, X: Any) -> Any:  # noqa: N803
        """The class whose mean is nearest, `(n,)`."""
        values = self.decision_function(X)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """The sigmoid, or softmax, of the decision values, `(n, classes)`."""
        from scipy.special import softmax  # type: ignore[import-untyped]

        values = self.decision_function(X)
        if values.ndim == 1:
            values = np.stack([np.zeros_like(values), values], axis=1)
        return softmax(values, axis=1)


def _spread(residuals: Float[np.ndarray, "n width"], ways: Float[np.ndarray, "k width"]) -> float:
    """Variance within classes along the ways from the common mean to those of the classes."""
    lengths = float((ways**2).sum())
    free = max(len(residuals) - len(ways), 1)
    if lengths == 0:
        return 1.0
    along = float(((residuals @ ways.T) ** 2).sum()) / free / lengths
    # Where the examples of a class do not differ, as with one each, the odds are large but finite.
    return max(along, 1e-6 * lengths / len(ways))


def class_directions(
    X: Any,  # noqa: N803
    y: Any,
    estimator: Method | Any = "mean_difference",
) -> Float[np.ndarray, "k width"]:
    """Unit vectors along which classes differ.

    | estimator | direction, two classes | what it is |
    |---|---|---|
    | `mean_difference` | μ₁ − μ₀ | where the vectors of one class lie as against the other |
    | `lda` | Σ⁻¹ (μ₁ − μ₀) | what tells the classes apart best if both vary with the covariance Σ |
    | `logistic` | weights of a logistic regression on standardised vectors | the same, without that premise |

    They agree where vectors vary alike in all directions. For more classes there is one row a class,
    against the mean of all. Σ is shrunk as Ledoit and Wolf (2004) do.

    Args:
        X: vectors `(n, width)`.
        y: n classes.
        estimator: as in the table, or a linear scikit-learn classifier, which is cloned and fitted.

    Returns:
        `(classes, width)` rows of length 1 in the units of the vectors, or `(1, width)` for two classes,
        towards the second.

    Raises:
        DataError: vectors, classes or an estimator that cannot be used, or classes that do not differ.
        GraphError: the estimator is not linear.

    >>> class_directions([[0.0, 1.0], [0.0, -1.0], [4.0, 1.0], [4.0, -1.0]], [0, 0, 1, 1]).tolist()
    [[1.0, 0.0]]
    """
    probe = _probe(estimator)
    vectors = as_vectors(X).astype(np.float64)
    classes, numbers = as_classes(y, len(vectors))
    weights = linear_parts(probe.fit(vectors, numbers)).weights
    # What all rows share decides between no classes.
    weights = weights if len(weights) == 1 else weights - weights.mean(0)
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    if bool((lengths == 0).any()):
        same = classes[int(lengths.argmin())] if len(weights) > 1 else classes[0]
        raise DataError(f"X: the vectors of class {same!r} do not differ from the others linearly")
    found: Float[np.ndarray, "k width"] = weights / lengths
    return found


def _probe(estimator: Any) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not isinstance(estimator, str) and hasattr(estimator, "fit") and not isinstance(estimator, type):
        return clone(estimator)
    if estimator not in get_args(Method):
        raise DataError(
            f"estimator={estimator!r}: expected {', '.join(map(repr, get_args(Method)))}, or a linear "
            "scikit-learn classifier"
        )
    if estimator == "mean_difference":
        return MeanDifference()
    if estimator == "lda":
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))

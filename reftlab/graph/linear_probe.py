"""The linear function inside a fitted scikit-learn probe, and whether its probabilities follow from it."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from reftlab.errors import GraphError

__all__ = ["LinearParts", "linear_parts", "require_probabilities"]

_CHECKED = 8
"""On how many vectors the parts are compared with what the probe itself says."""


class LinearParts(NamedTuple):
    """`weights @ h + bias`, for vectors h as the probe takes them.

    Attributes:
        weights: `(k, width)` float64; k is 1 for two classes and for one number, else classes or numbers.
        bias: `(k,)` float64.
        classes: the probe's classes in the order of the rows, the second one for a single row; None for
            a regression.
    """

    weights: Float[np.ndarray, "k width"]
    bias: Float[np.ndarray, " k"]
    classes: list[Any] | None


def linear_parts(estimator: Any) -> LinearParts:
    """Weights, biases and classes of a fitted linear probe, in the units of the vectors.

    Args:
        estimator: a fitted scikit-learn classifier or regression with `coef_` and `intercept_`, alone,
            behind `StandardScaler` steps of a pipeline, or as the best one of a search. What is found is
            compared with the probe's own `decision_function` or `predict`, so that no other use of
            these two attributes goes through.

    Returns:
        Weights `(k, width)`, bias `(k,)`, and classes or None; scalers are multiplied in.

    Raises:
        GraphError: the probe is not fitted, or not a linear function of the vectors.

    >>> from sklearn.linear_model import Ridge
    >>> weights, bias, classes = linear_parts(Ridge(alpha=0.0).fit([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
    >>> weights.round(6).tolist(), bias.round(6).tolist(), classes
    ([[2.0]], [1.0], None)
    """
    head, scalers = _steps(estimator)
    weights, bias = _coefficients(head, estimator)
    # From the last scaler back to the vectors: w · (h − m) / s = (w / s) · h − (w / s) · m.
    for scaler in reversed(scalers):
        if scaler.scale_ is not None:
            weights = weights / scaler.scale_
        # A scaler that does not centre can know the mean all the same.
        if scaler.with_mean:
            bias = bias - weights @ scaler.mean_
    classes = None if not hasattr(head, "classes_") else np.asarray(head.classes_).tolist()
    if classes is not None and len(weights) != (len(classes) if len(classes) > 2 else 1):
        raise GraphError(
            f"probe {_shown(estimator)} has {len(weights)} rows of weights for the {len(classes)} classes "
            f"{classes}; expected one row a class, or one for two classes"
        )
    parts = LinearParts(weights, bias, classes)
    vectors = _vectors(parts)
    said = _said(estimator, "predict" if classes is None else "decision_function", vectors)
    if said is None or not _near(said, parts, vectors):
        raise GraphError(
            f"probe {_shown(estimator)}: its {'predictions' if classes is None else 'decision values'} are "
            "not coef_ · h + intercept_; expected a linear classifier or regression"
        )
    return parts


def require_probabilities(estimator: Any, parts: LinearParts) -> None:
    """Refuse a probe whose probabilities are not the sigmoid, or softmax, of its linear function.

    Args:
        estimator: the fitted probe.
        parts: its `linear_parts`.

    Raises:
        GraphError: it gives no probabilities, or others.
    """
    instead = (
        "compare rl.projection(read, linear_parts(probe).weights[0]) with a threshold, or fit a "
        "LogisticRegression"
    )
    if parts.classes is None:
        raise GraphError(f"probe {_shown(estimator)} predicts numbers, which have no probability; {instead}")
    vectors = _vectors(parts)
    said = _said(estimator, "predict_proba", vectors)
    if said is None:
        raise GraphError(f"probe {_shown(estimator)} gives no probabilities; {instead}")
    logits = vectors @ parts.weights.T + parts.bias
    logits = logits if len(parts.bias) > 1 else np.hstack([np.zeros_like(logits), logits])
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    if said.shape != expected.shape or not np.allclose(said, expected, rtol=0, atol=1e-4):
        link = "sigmoid" if len(parts.bias) == 1 else "softmax"
        raise GraphError(
            f"probe {_shown(estimator)}: its probabilities for the classes {parts.classes} are not the "
            f"{link} of its decision values{_but(said, logits)}; {instead}"
        )


def _but(said: Any, logits: Any) -> str:
    """What several classes' probabilities are in the place of a softmax, where that is known."""
    each = 1 / (1 + np.exp(-logits))
    each /= each.sum(1, keepdims=True)
    one_against_rest = logits.shape[1] > 2 and said.shape == each.shape and np.allclose(said, each, atol=1e-4)
    return ", but each class's sigmoid over the sum of all, one against the rest" * one_against_rest


def _steps(estimator: Any) -> tuple[Any, list[Any]]:
    """What decides, and the scalers before it."""
    if hasattr(estimator, "best_estimator_"):
        return _steps(estimator.best_estimator_)
    if not hasattr(estimator, "steps"):
        return estimator, []
    steps = [step for _, step in estimator.steps if step is not None and step != "passthrough"]
    if not steps:
        raise GraphError(f"probe {_shown(estimator)} has no step that decides")
    for step in steps[:-1]:
        if type(step).__name__ != "StandardScaler":
            raise GraphError(
                f"probe {_shown(estimator)}: expected only StandardScaler steps before the last, not "
                f"{_shown(step)}"
            )
        _require_fitted(step, estimator)
    head, inner = _steps(steps[-1])
    return head, [*steps[:-1], *inner]


def _coefficients(head: Any, estimator: Any) -> tuple[Any, Any]:
    """`coef_` as `(k, width)` and `intercept_` as `(k,)`, in float64."""
    _require_fitted(head, estimator)
    if hasattr(head, "calibrated_classifiers_"):
        raise GraphError(
            f"probe {_shown(estimator)} is the mean of {len(head.calibrated_classifiers_)} calibrated "
            "classifiers, which is not linear; pass a linear classifier that was fitted on its own"
        )
    if not hasattr(head, "coef_") or not hasattr(head, "intercept_"):
        raise GraphError(
            f"probe {_shown(estimator)} is not linear: {type(head).__name__} has no coef_ and intercept_"
        )
    weights = head.coef_.toarray() if hasattr(head.coef_, "toarray") else head.coef_
    weights = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    return weights, np.broadcast_to(np.asarray(head.intercept_, dtype=np.float64), (len(weights),)).copy()


def _require_fitted(step: Any, estimator: Any) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(step)
    except NotFittedError as error:
        raise GraphError(f"probe {_shown(estimator)} is not fitted; call fit first") from error
    except TypeError as error:
        raise GraphError(f"probe {_shown(estimator)}: expected a fitted scikit-learn estimator") from error


def _vectors(parts: LinearParts) -> Float[np.ndarray, "n width"]:
    """Vectors around the probe's boundary, where probabilities are neither 0 nor 1."""
    weights, bias, _ = parts
    steps = np.random.default_rng(0).standard_normal((_CHECKED, weights.shape[1]))
    length = float(np.median(np.linalg.norm(weights, axis=1)))
    centre = np.linalg.lstsq(weights, -bias, rcond=None)[0]
    return centre + steps * (2.0 / length if length > 0 else 1.0)


def _said(estimator: Any, method: str, vectors: Any) -> Any:
    """What the probe itself gives for vectors, float64 `(n, k)`; None where it has no such method."""
    if not hasattr(estimator, method):
        return None
    with warnings.catch_warnings():
        # A probe fitted on a data frame asks for the names of its features.
        warnings.simplefilter("ignore", UserWarning)
        return np.asarray(getattr(estimator, method)(vectors), dtype=np.float64).reshape(len(vectors), -1)


def _near(said: Any, parts: LinearParts, vectors: Any) -> bool:
    """Whether values are those of the parts, up to rounding of the sums that make them."""
    weights, bias, _ = parts
    room = np.abs(vectors) @ np.abs(weights).T + np.abs(bias) + 1e-12
    return said.shape == room.shape and bool(
        (np.abs(said - (vectors @ weights.T + bias)) < 1e-5 * room).all()
    )


def _shown(estimator: Any) -> str:
    """A probe on one line."""
    return " ".join(repr(estimator).split())

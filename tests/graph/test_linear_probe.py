"""Probes as numbers in a graph: their weights, and their own probabilities, by scikit-learn's own methods."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

import reftlab as rl
from reftlab.errors import GraphError
from reftlab.graph.linear_probe import linear_parts
from reftlab.probing.directions import MeanDifference

READ = rl.Read("blocks[0].output @ last")


def data(classes: int, n: int = 120, width: int = 5) -> tuple[Any, Any]:
    """Vectors whose features differ in mean and spread, with classes that overlap."""
    generator = np.random.default_rng(classes)
    names = np.array(["red", "green", "blue", "grey"])[np.arange(n) % classes]
    means = {name: generator.standard_normal(width) for name in names.tolist()}
    vectors = generator.standard_normal((n, width)) + np.stack([means[name] for name in names.tolist()])
    return vectors * np.linspace(0.2, 4, width) + np.linspace(-5, 5, width), names


def scaled(probe: Any) -> Any:
    return make_pipeline(StandardScaler(), probe)


PROBES = {
    "logistic": LogisticRegression(max_iter=500),
    "balanced": LogisticRegression(class_weight="balanced", C=0.01),
    "without intercept": LogisticRegression(fit_intercept=False),
    "found by folds": LogisticRegressionCV(
        Cs=2, cv=3, l1_ratios=(0,), use_legacy_attributes=False, scoring="neg_log_loss", max_iter=50000
    ),
    "lda": LinearDiscriminantAnalysis(),
    "shrunk lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "eigen lda": LinearDiscriminantAnalysis(solver="eigen"),
    "mean difference": MeanDifference(),
    "scaled": scaled(LogisticRegression()),
    "centred only": make_pipeline(StandardScaler(with_std=False), LogisticRegression()),
    "scaled twice": make_pipeline(
        StandardScaler(with_mean=False), "passthrough", StandardScaler(), MeanDifference()
    ),
    "pipeline in a pipeline": scaled(scaled(LogisticRegression())),
    "search": GridSearchCV(scaled(LogisticRegression()), {"logisticregression__C": [0.1, 1.0]}, cv=3),
    "searched inside": scaled(GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=3)),
}


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", PROBES)
def test_the_graph_gives_each_class_the_probability_that_the_probe_gives(name: str, classes: int) -> None:
    vectors, labels = data(classes)
    probe = PROBES[name].fit(vectors, labels)
    expected = probe.predict_proba(vectors)
    for column, label in enumerate(probe.classes_.tolist()):
        measure = rl.probability(READ, probe, label)
        found = measure.value({READ: torch.tensor(vectors)})
        np.testing.assert_allclose(found.numpy(), expected[:, column], atol=2e-5)
    weights, bias, found_classes = linear_parts(probe)
    values = vectors @ weights.T + bias
    np.testing.assert_allclose(values.squeeze(), probe.decision_function(vectors), atol=1e-9)
    assert found_classes == probe.classes_.tolist()


def test_two_classes_of_a_streamed_probe_have_their_probabilities_too() -> None:
    vectors, labels = data(2)
    probe = scaled(SGDClassifier(loss="log_loss", random_state=0)).fit(vectors, labels)
    found = rl.probability(READ, probe).value({READ: torch.tensor(vectors)})
    np.testing.assert_allclose(found.numpy(), probe.predict_proba(vectors)[:, 1], atol=2e-5)


def test_a_probe_fitted_on_bfloat16_vectors_as_float32_or_with_sparse_weights_is_the_same_function() -> None:
    vectors, labels = data(2)
    rounded = torch.tensor(vectors).bfloat16().float()
    probe = LogisticRegression().fit(rounded.numpy(), labels).sparsify()
    found = rl.probability(READ, probe).value({READ: rounded.bfloat16()})
    np.testing.assert_allclose(found.numpy(), probe.predict_proba(rounded.numpy())[:, 1], atol=1e-5)


def test_a_probe_fitted_on_a_data_frame_is_taken_without_a_warning() -> None:
    import pandas as pd

    vectors, labels = data(2)
    probe = scaled(LogisticRegression()).fit(pd.DataFrame(vectors, columns=list("abcde")), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.probability(READ, probe).weight.shape == (1, 5)


@pytest.mark.parametrize(
    "probe",
    [Ridge(), LinearRegression(), SGDRegressor(random_state=0), Ridge(fit_intercept=False)],
    ids=["ridge", "least squares", "sgd", "no intercept"],
)
@pytest.mark.parametrize("targets", [1, 3])
def test_a_regression_has_weights_in_the_units_of_the_vectors(probe: Any, targets: int) -> None:
    vectors, _ = data(2)
    heights = vectors @ np.random.default_rng(0).standard_normal((5, targets))
    if targets > 1 and isinstance(probe, SGDRegressor):
        with pytest.raises(GraphError, match="is not fitted"):
            linear_parts(scaled(probe))
        return
    fitted = scaled(probe).fit(vectors, heights if targets > 1 else heights[:, 0])
    weights, bias, classes = linear_parts(fitted)
    assert (weights.shape, bias.shape, classes) == ((targets, 5), (targets,), None)
    values = vectors @ weights.T + bias
    np.testing.assert_allclose(values, fitted.predict(vectors).reshape(-1, targets), atol=1e-8)
    direction = torch.tensor(weights[0])
    found = rl.projection(READ, direction).value({READ: torch.tensor(vectors)})
    unit = weights[0] / np.linalg.norm(weights[0])
    np.testing.assert_allclose(found.numpy(), vectors @ unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probe", [RidgeClassifier(), LinearSVC(), SGDClassifier(random_state=0)])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_without_probabilities_has_a_direction_and_says_to_use_it(
    probe: Any, classes: int
) -> None:
    vectors, labels = data(classes)
    fitted = scaled(probe).fit(vectors, labels)
    weights, bias, _ = linear_parts(fitted)
    values = (vectors @ weights.T + bias).squeeze()
    np.testing.assert_allclose(values, fitted.decision_function(vectors), atol=1e-8)
    with pytest.raises(
        GraphError, match=r"probability: probe .* gives no probabilities; compare rl.projection"
    ):
        rl.probability(READ, fitted)


class Cubed(ClassifierMixin, BaseEstimator):
    """Has the two attributes of a linear classifier, and decides otherwise."""

    def fit(self, vectors: Any, labels: Any) -> Cubed:
        self.classes_, self.coef_, self.intercept_ = np.unique(labels), np.ones((1, 5)), np.zeros(1)
        return self

    def decision_function(self, vectors: Any) -> Any:
        return vectors.sum(1) ** 3


def refused() -> list[tuple[Any, int, str]]:
    """Probe, number of its classes, what the error says."""
    huber = SGDClassifier(loss="modified_huber", random_state=0)
    calibrated = CalibratedClassifierCV(LogisticRegression(), cv=3)
    search = GridSearchCV(LogisticRegression(), {"C": [1.0]}, cv=3, refit=False)
    return [
        (
            scaled(SGDClassifier(loss="log_loss", random_state=0)),
            3,
            "are not the softmax of its decision values, but each class's sigmoid over the sum of all",
        ),
        (huber, 2, "are not the sigmoid of its decision values; compare rl.projection"),
        (calibrated, 2, "is the mean of 3 calibrated classifiers"),
        (RandomForestClassifier(5), 2, "is not linear: RandomForestClassifier has no coef_"),
        (make_pipeline(PCA(2), LogisticRegression()), 2, r"expected only StandardScaler steps .* not PCA"),
        (SVC(kernel="linear"), 4, "has 6 rows of weights for the 4 classes"),
        (Cubed(), 2, "its decision values are not coef_ · h"),
        (search, 2, "has no coef_ and intercept_"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_what_is_not_a_linear_function_is_refused_with_the_reason(case: int) -> None:
    probe, classes, message = refused()[case]
    vectors, labels = data(classes)
    with pytest.raises(GraphError, match=f"^probability: .*{message}"):
        rl.probability(READ, probe.fit(vectors, labels), labels[0])


def test_regressions_have_no_probability_and_curved_ones_no_linear_parts() -> None:
    vectors, _ = data(2)
    heights = np.abs(vectors[:, 0])
    with pytest.raises(GraphError, match="predicts numbers, which have no probability"):
        rl.probability(READ, Ridge().fit(vectors, heights))
    with pytest.raises(GraphError, match="its predictions are not coef_"):
        linear_parts(PoissonRegressor().fit(vectors, heights))


@pytest.mark.parametrize("probe", [LogisticRegression(), scaled(LinearSVC()), MeanDifference()])
def test_a_probe_that_is_not_fitted_is_refused(probe: Any) -> None:
    with pytest.raises(GraphError, match="is not fitted; call fit first"):
        linear_parts(probe)


@pytest.mark.parametrize("value", [3, "probe", None, object()])
def test_what_is_no_estimator_is_refused(value: Any) -> None:
    with pytest.raises(GraphError, match="expected a fitted scikit-learn estimator"):
        rl.probability(READ, value)


def test_a_label_must_be_one_of_the_classes_and_be_named_among_more_than_two() -> None:
    probe = MeanDifference().fit(*data(3))
    with pytest.raises(GraphError, match=r"say which, as in label='blue'"):
        rl.probability(READ, probe)
    with pytest.raises(GraphError, match=r"label='pink' is none of the probe's classes"):
        rl.probability(READ, probe, "pink")

"""Directions between classes, against the formulas and against what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from reftlab.errors import DataError, GraphError
from reftlab.probing.directions import MeanDifference, class_directions

WIDTH = 6
METHODS = ("mean_difference", "lda", "logistic")


@parametrize_with_checks([MeanDifference()])
def test_the_mean_difference_is_an_estimator_as_scikit_learn_wants_them(estimator: Any, check: Any) -> None:
    check(estimator)


def two_classes(covariance: Any, difference: Any, n: int = 6000, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    noise = generator.multivariate_normal(np.zeros(len(difference)), covariance, n)
    return noise + labels[:, None] * difference + 3.0, labels


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_equal_noise_every_method_finds_the_planted_direction(method: Any, seed: int) -> None:
    planted = np.random.default_rng(seed).standard_normal(WIDTH)
    vectors, labels = two_classes(np.eye(WIDTH), planted, seed=seed)
    found = class_directions(vectors, labels, method)
    assert found.shape == (1, WIDTH)
    assert float(found[0] @ unit(planted)) > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_unequal_noise_lda_and_the_means_find_what_their_formulas_say(seed: int) -> None:
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0]
    covariance = axes * np.geomspace(0.1, 4.0, WIDTH) @ axes.T
    difference = axes @ generator.choice([-1.0, 1.0], WIDTH) / np.sqrt(WIDTH)
    vectors, labels = two_classes(covariance, difference, 20000, seed)
    best = unit(np.linalg.solve(covariance, difference))
    assert float(best @ difference) < 0.9
    found = {method: class_directions(vectors, labels, method)[0] for method in METHODS}
    assert float(found["mean_difference"] @ difference) > 0.98
    assert float(found["lda"] @ best) > 0.98
    assert float(found["logistic"] @ best) > 0.95
    # To the last digits: the same formulas from the sample itself.
    means = np.stack([vectors[labels == k].mean(0) for k in (0, 1)])
    np.testing.assert_allclose(found["mean_difference"], unit(means[1] - means[0]), atol=1e-10)
    plain = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(vectors, labels)
    np.testing.assert_allclose(found["lda"], unit(plain.coef_[0]), atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_more_classes_have_a_row_each_against_the_mean_of_all(method: Any) -> None:
    generator = np.random.default_rng(0)
    means = 2 * np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0][:3] + 10
    labels = np.array(["c", "a", "b"])[np.arange(6000) % 3]
    vectors = generator.standard_normal((6000, WIDTH)) + means[np.searchsorted(["a", "b", "c"], labels)]
    found = class_directions(vectors, labels, method)
    expected = means - means.mean(0)
    for row, planted in zip(found, expected, strict=True):
        assert np.linalg.norm(row) == pytest.approx(1.0)
        assert float(row @ unit(planted)) > 0.97


def test_classes_of_random_labels_differ_along_no_direction_twice() -> None:
    """Directions of two halves of random data are as far apart as random directions are."""
    cosines = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        vectors, labels = generator.standard_normal((400, 40)), generator.integers(0, 2, 400)
        halves = [class_directions(vectors[part], labels[part])[0] for part in (slice(200), slice(200, 400))]
        cosines.append(abs(float(halves[0] @ halves[1])))
    # The cosine of random directions has about the standard deviation 1/√width.
    assert sum(cosine > norm.isf(0.025) / np.sqrt(40) for cosine in cosines) <= 3


def test_the_mean_difference_decides_as_the_nearest_mean_does() -> None:
    generator = np.random.default_rng(0)
    for classes in (2, 4):
        labels = generator.integers(0, classes, 300)
        vectors = (
            generator.standard_normal((300, WIDTH)) + generator.standard_normal((classes, WIDTH))[labels]
        )
        found, plain = MeanDifference().fit(vectors, labels), NearestCentroid().fit(vectors, labels)
        assert (found.predict(vectors) == plain.predict(vectors)).all()
        np.testing.assert_allclose(found.means_, plain.centroids_)
        assert (found.predict_proba(vectors).argmax(1) == found.predict(vectors)).all()


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_its_probabilities_are_the_share_of_each_class_there_if_classes_are_balanced(share: float) -> None:
    """Gaussians of equal covariance, three times as wide across the difference as along it: the odds are known."""
    generator = np.random.default_rng(0)
    labels = (generator.random(40000) < share).astype(int)
    spread = np.array([0.5, 1.5, 1.5])
    vectors = generator.standard_normal((40000, 3)) * spread
    vectors[:, 0] += labels
    found = MeanDifference().fit(vectors, labels)
    odds = (vectors[:, 0] - 0.5) / 0.25
    expected = 1 / (1 + np.exp(-odds))
    # Wide noise turns the estimated difference a little.
    near = np.abs(found.predict_proba(vectors)[:, 1] - expected)
    assert near.mean() < (0.02 if share == 0.5 else 0.08)
    balanced = LogisticRegression(class_weight="balanced").fit(vectors[:, :1], labels)
    scale = float(found.coef_[0, 0] / balanced.coef_[0, 0])
    assert 0.8 < scale < 1.2


def test_examples_that_do_not_differ_within_a_class_give_finite_odds() -> None:
    found = MeanDifference().fit([[0.0, 0.0], [3.0, 4.0]], ["a", "b"])
    assert np.isfinite(found.coef_).all()
    assert found.predict([[1.0, 1.0], [2.0, 3.0]]).tolist() == ["a", "b"]
    same = MeanDifference().fit([[1.0], [1.0], [1.0], [1.0]], [0, 0, 1, 1])
    assert same.predict_proba([[5.0]]).tolist() == [[0.5, 0.5]]


def test_it_works_where_any_estimator_does() -> None:
    vectors, labels = two_classes(np.eye(WIDTH), np.ones(WIDTH), 300)
    probe = make_pipeline(StandardScaler(), MeanDifference())
    assert cross_val_score(probe, vectors, labels, scoring="roc_auc", cv=3).mean() > 0.9


def test_tensors_of_half_precision_and_names_of_classes_are_taken() -> None:
    vectors, labels = two_classes(np.eye(WIDTH), np.ones(WIDTH), 500)
    named = np.where(labels, "yes", "no").tolist()
    half = torch.tensor(vectors).bfloat16()
    found = class_directions(half, named)
    expected = class_directions(half.float().numpy(), labels)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_s_own_classifier_gives_its_weights_in_the_units_of_the_vectors() -> None:
    vectors, labels = two_classes(np.diag([1.0, 4.0, 0.1, 1.0, 1.0, 1.0]), np.ones(WIDTH), 400)
    own = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    found = class_directions(vectors, labels, own)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)).fit(vectors, labels)
    np.testing.assert_allclose(found[0], unit(fitted[1].coef_[0] / fitted[0].scale_), atol=1e-9)
    assert not hasattr(own[1], "coef_")
    with pytest.raises(GraphError, match="is not linear: GaussianNB has no coef_"):
        class_directions(vectors, labels, GaussianNB())


@pytest.mark.usefixtures("users_call")
def test_what_has_no_direction_is_refused_with_the_reason() -> None:
    vectors, labels = two_classes(np.eye(WIDTH), np.ones(WIDTH), 60)
    method: Any = "svm"
    with pytest.raises(DataError, match="estimator='svm': expected 'mean_difference', 'lda', 'logistic'"):
        class_directions(vectors, labels, method)
    with pytest.raises(DataError, match="do not differ from the others linearly"):
        class_directions(np.ones((60, 2)), labels)
    with pytest.raises(DataError, match=r"y holds fractions such as .*0\.5"):
        class_directions(vectors, labels + 0.5)
    with pytest.raises(DataError, match="y holds only the class 0"):
        class_directions(vectors, labels * 0)

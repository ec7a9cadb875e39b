"""Scores, folds and intervals against scikit-learn called plainly, and against data that punish leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.multiclass import OutputCodeClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reftlab as rl
from reftlab.probing import probe
from reftlab.probing.estimators import ALPHAS, C_GRID, Predictions
from reftlab.probing.folds import grouped_splits
from reftlab.probing.labels import parse_labels
from reftlab.probing.scoring import bootstrap_intervals, weighted_scores
from tests.probing.planted_vectors import QUICK, along, random_activations


def _data(seed: int = 0, n: int = 60, width: int = 6) -> tuple[np.ndarray, rl.Activations]:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    found = random_activations(generator, n, width, 1, planted={0: along(np.eye(width)[0], 2 * y)})
    return y, found


def _vectors(found: rl.Activations) -> np.ndarray:
    return found["blocks[0].output @ last"].double().numpy()


def _folds(y: Any, found: rl.Activations, groups: Any = None, seed: int = 0) -> Any:
    labels = parse_labels(list(y), "auto", found.rows)
    return grouped_splits(labels.values, np.arange(found.rows) if groups is None else groups, labels, 5, seed)


@pytest.mark.parametrize("labels", ["two", "three"])
def test_scores_are_those_of_cross_val_predict_on_the_same_splits(labels: str) -> None:
    y, found = _data()
    vectors = _vectors(found)
    if labels == "three":
        y = vectors[:, :3].argmax(1)
    splits = _folds(y, found)
    own = make_pipeline(StandardScaler(), LogisticRegression(C=0.3))
    folds = [(split.train, split.test) for split in splits.folds]
    predicted = cross_val_predict(own, vectors, y, cv=folds)
    chances = cross_val_predict(own, vectors, y, cv=folds, method="predict_proba")
    result = probe(found, labels=y.tolist(), estimator=own, **QUICK)
    scores = {name: float(values[0, 0]) for name, values in result.metrics.items()}
    assert scores["accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, predicted))
    area = (
        roc_auc_score(y, chances[:, 1]) if labels == "two" else roc_auc_score(y, chances, multi_class="ovr")
    )
    assert scores["auroc"] == pytest.approx(area)


def test_logistic_probes_choose_their_strength_by_plain_nested_cross_validation() -> None:
    y, found = _data(1)
    vectors, splits = _vectors(found), _folds(y, found)
    predicted = np.empty_like(y)
    for split in splits.folds:
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)),
            {"logisticregression__C": C_GRID}, cv=list(split.inner), scoring="neg_log_loss",
        )  # fmt: skip
        # Balanced classes, so that the balanced log-loss is nearly the plain one.
        predicted[split.test] = search.fit(vectors[split.train], y[split.train]).predict(vectors[split.test])
        assert set(np.concatenate([test for _, test in split.inner])) == set(range(len(split.train)))
    result = probe(found, labels=y.tolist(), **QUICK)
    assert result.score[0, 0] == pytest.approx(balanced_accuracy_score(y, predicted), abs=0.02)


def test_ridge_probes_of_numbers_are_plain_nested_cross_validation() -> None:
    generator = np.random.default_rng(2)
    y = generator.normal(size=50)
    found = random_activations(generator, 50, 6, 1, planted={0: along(np.ones(6), y)})
    vectors, labels = _vectors(found), parse_labels(y, "auto", 50)
    splits = grouped_splits(labels.values, np.arange(50), labels, 5, 0)
    predicted = np.empty(50)
    for split in splits.folds:
        search = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": ALPHAS}, cv=list(split.inner),
            scoring="neg_mean_squared_error",
        )  # fmt: skip
        predicted[split.test] = search.fit(vectors[split.train], y[split.train]).predict(vectors[split.test])
    result = probe(found, labels=y, **QUICK)
    assert (result.kind, result.estimator) == ("regression", "ridge")
    assert result.score[0, 0] == pytest.approx(r2_score(y, predicted), abs=1e-9)


def test_several_labels_are_probed_one_by_one() -> None:
    generator = np.random.default_rng(3)
    found = random_activations(generator, 60, 6, 1)
    vectors = _vectors(found)
    y = np.stack([vectors[:, 0] > 0, vectors[:, 1] > 0.5, generator.random(60) > 0.5], 1).astype(int)
    result = probe(found, labels=y, estimator=LogisticRegression(), **QUICK)
    labels = parse_labels(y, "auto", 60)
    folds = [(one.train, one.test) for one in grouped_splits(y, np.arange(60), labels, 5, 0).folds]
    predicted = cross_val_predict(MultiOutputClassifier(LogisticRegression()), vectors, y, cv=folds)
    expected = np.mean([balanced_accuracy_score(y[:, n], predicted[:, n]) for n in range(3)])
    assert result.score[0, 0] == pytest.approx(expected)
    assert result.chance["accuracy"][0] == pytest.approx(np.maximum(y.mean(0), 1 - y.mean(0)).mean())


@pytest.mark.parametrize(
    ("name", "plain"),
    [("lda", LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5]))],
)
def test_estimators_by_name_are_what_they_are_called(name: str, plain: Any) -> None:
    y, found = _data(4)
    own, by_name = (probe(found, labels=y.tolist(), estimator=one, **QUICK) for one in (plain, name))
    for metric in own.metrics:
        assert by_name.metrics[metric] == pytest.approx(own.metrics[metric])


def test_mean_difference_is_the_nearest_mean() -> None:
    y, found = _data(5)
    vectors, right = _vectors(found), 0.0
    predicted = np.empty_like(y)
    for split in _folds(y, found).folds:
        means = [vectors[split.train][y[split.train] == k].mean(0) for k in (0, 1)]
        predicted[split.test] = np.stack([((vectors[split.test] - m) ** 2).sum(1) for m in means], 1).argmin(
            1
        )
    right = balanced_accuracy_score(y, predicted)
    assert probe(found, labels=y.tolist(), estimator="mean_difference", **QUICK).score[0, 0] == pytest.approx(
        right
    )


def test_groups_are_never_split_and_classes_stay_in_every_training_part() -> None:
    generator = np.random.default_rng(6)
    groups = generator.integers(0, 17, 90)
    for y in (groups % 3, generator.integers(0, 3, 90)):
        labels = parse_labels(y.tolist(), "auto", 90)
        found = grouped_splits(labels.values, groups, labels, 4, 1)
        assert sorted(np.concatenate([one.test for one in found.folds])) == list(range(90))
        for one in found.folds:
            assert not set(groups[one.train]) & set(groups[one.test])
            assert set(y[one.train]) == {0, 1, 2}
            for train, test in one.inner:
                assert not set(groups[one.train][train]) & set(groups[one.train][test])


def test_doubled_rows_leak_unless_their_groups_are_given() -> None:
    generator = np.random.default_rng(7)
    y = generator.integers(0, 2, 40)
    vectors = generator.normal(size=(40, 30))
    planted = {0: np.repeat(vectors, 2, 0) * 100}
    found = random_activations(generator, 80, 30, 1, planted=planted)
    doubled = np.repeat(y, 2).tolist()
    near = KNeighborsClassifier(1)
    assert probe(found, labels=doubled, estimator=near, **QUICK).score[0, 0] > 0.8
    grouped = probe(found, labels=doubled, estimator=near, groups=np.repeat(np.arange(40), 2), **QUICK)
    assert grouped.score[0, 0] < 0.75


def test_what_a_pipeline_chooses_is_chosen_in_the_training_part_alone() -> None:
    generator = np.random.default_rng(8)
    y = generator.integers(0, 2, 40)
    found = random_activations(generator, 40, 1500, 1)
    vectors = _vectors(found)
    chosen = SelectKBest(f_classif, k=10).fit(vectors, y).transform(vectors)
    folds = [(one.train, one.test) for one in _folds(y, found).folds]
    leaking = balanced_accuracy_score(y, cross_val_predict(LogisticRegression(), chosen, y, cv=folds))
    own = make_pipeline(SelectKBest(f_classif, k=10), LogisticRegression())
    assert leaking > 0.85
    assert probe(found, labels=y.tolist(), estimator=own, **QUICK).score[0, 0] < 0.7


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_under_weights_are_scikit_learns_with_sample_weights(classes: int) -> None:
    generator = np.random.default_rng(9)
    y = generator.integers(0, classes, 50)
    # Rounded, so that there are ties.
    raw = np.round(generator.normal(size=(50, classes)) + np.eye(classes)[y], 1)
    likely = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    weights = generator.integers(0, 4, (6, 50)).astype(float)
    found = Predictions(raw.argmax(1), likely[:, 1:] if classes == 2 else likely)
    scores = weighted_scores(y, found, "classification", classes, weights)
    for number, weight in enumerate(weights):
        assert scores["accuracy"][number] == pytest.approx(
            accuracy_score(y, found.predicted, sample_weight=weight)
        )
        balanced = balanced_accuracy_score(y, found.predicted, sample_weight=weight)
        assert scores["balanced_accuracy"][number] == pytest.approx(balanced)
        areas = [roc_auc_score(y == k, likely[:, k], sample_weight=weight) for k in range(classes)]
        areas = areas[1:] if classes == 2 else areas
        assert scores["auroc"][number] == pytest.approx(np.mean(areas))
    numbers = y + generator.normal(size=50) + 1000
    guess = Predictions(numbers + 0.3 * generator.normal(size=50), numbers[:, None])
    found_r2 = weighted_scores(numbers, guess, "regression", 0, weights)["r2"]
    expected = [r2_score(numbers, guess.predicted, sample_weight=weight) for weight in weights]
    assert found_r2 == pytest.approx(expected)


def test_intervals_hold_the_true_score_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 2)
        y = np.repeat(generator.integers(0, 2, 40), 2)
        # Right in 3 of 4 groups, both of a group alike, so that vectors are worth half of what they count.
        right = np.repeat(generator.random(40) < 0.75, 2)
        found = Predictions(np.where(right, y, 1 - y), np.where(right, y, 1 - y)[:, None].astype(float))
        low, high = bootstrap_intervals(y, found, "classification", 2, groups, 300, 0.9, seed)["accuracy"]
        held += low <= 0.75 <= high
    # Without the groups it would be about 0.75.
    assert scipy.stats.binomtest(held, 200, 0.9).pvalue > 0.001


def test_imbalance_of_95_to_5_neither_hides_a_concept_nor_makes_one() -> None:
    generator = np.random.default_rng(10)
    y = np.arange(200) % 20 == 0
    found = random_activations(generator, 200, 6, 2, planted={1: along(np.eye(6)[2], 5 * y)})
    result = probe(found, labels=y, progress=False, permutations=99, bootstrap=0, control=None)
    assert result.chance["accuracy"][0] == pytest.approx(0.95)
    assert result.chance["balanced_accuracy"][0] == 0.5
    nothing, planted = result.score[:, 0]
    assert planted > 0.9
    assert nothing < 0.7
    assert result.significant()[:, 0].tolist() == [False, True]


def test_an_estimator_without_scores_has_no_auroc() -> None:
    y, found = _data(11)
    result = probe(
        found,
        labels=y.tolist(),
        estimator=OutputCodeClassifier(LogisticRegression(), random_state=0),
        **QUICK,
    )
    assert np.isnan(result.metrics["auroc"][0, 0])
    assert result.score[0, 0] > 0.6


def test_a_users_estimator_is_never_fitted_itself() -> None:
    y, found = _data(12)
    forest = RandomForestClassifier(5, random_state=0)
    result = probe(found, labels=y.tolist(), estimator=forest, **QUICK)
    assert not hasattr(forest, "estimators_")
    assert result.score[0, 0] > 0.6
    assert result.estimator == "RandomForestClassifier(n_estimators=5, random_state=0)"


def test_the_folds_of_examples_of_their_own_are_stratified() -> None:
    y, found = _data(13)
    plain = StratifiedKFold(5, shuffle=True, random_state=0).split(y, y)
    for one, (_, test) in zip(_folds(y, found).folds, plain, strict=True):
        assert one.test.tolist() == test.tolist()

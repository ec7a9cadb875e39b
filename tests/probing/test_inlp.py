"""Iterative nullspace projection: what it must remove, when it must stop, and its steps by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reftlab as rl
from reftlab.errors import DataError, GraphError
from reftlab.probing.inlp import inlp

WIDTH = 10


def planted(m: int, n: int = 1000, seed: int = 0) -> tuple[Any, Any, Any]:
    """Vectors, labels, and `(m, width)` directions that must all go before the labels cannot be found.

    A classifier weighs the directions by signal over noise. These differ, so that what is left after
    its one direction is removed still differs by class, until all m are gone.
    """
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0].T
    noise, signal = np.ones(WIDTH), np.zeros(WIDTH)
    noise[:m], signal[:m] = [1.0, 0.3, 0.1][:m], [1.2, 0.6, 0.35][:m]
    labels = np.arange(n) % 2
    inside = generator.standard_normal((n, WIDTH)) * noise + np.where(labels, 1, -1)[:, None] * signal
    return inside @ basis + 1.0, labels, basis[:m]


def held_out(vectors: Any, labels: Any) -> float:
    return float(
        balanced_accuracy_score(labels, cross_val_predict(LogisticRegression(), vectors, labels, cv=5))
    )


@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_concept_in_m_directions_is_removed_in_about_m_rounds(m: int) -> None:
    for seed in range(3):
        vectors, labels, directions = planted(m, seed=seed)
        found = inlp(vectors, labels, progress=False)
        assert found.stopped == "chance"
        assert m <= found.rounds <= m + 1
        np.testing.assert_allclose(
            found.directions @ found.directions.T, np.eye(len(found.directions)), atol=1e-9
        )
        assert np.degrees(subspace_angles(found.directions.T, directions.T).max()) < 8
        # The rounds before the last planted direction is gone leave enough to find.
        assert all(accuracy > 0.75 for accuracy in found.accuracies[:m])
        left = vectors - vectors @ found.directions.T @ found.directions
        assert held_out(vectors, labels) > 0.85
        assert held_out(left, labels) < 0.55


def test_random_labels_stop_it_at_once_over_20_seeds() -> None:
    alarms = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        vectors, labels = generator.standard_normal((160, WIDTH)), generator.permutation(np.arange(160) % 2)
        found = inlp(vectors, labels, progress=False, rounds=1)
        alarms += found.rounds
    assert alarms <= 2


def test_random_labels_of_groups_of_near_copies_stop_it_too() -> None:
    alarms = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        vectors = np.repeat(generator.standard_normal((40, WIDTH)), 5, axis=0)
        labels, groups = np.repeat(generator.permutation(np.arange(40) % 2), 5), np.repeat(np.arange(40), 5)
        alarms += inlp(vectors, labels, groups=groups, rounds=1, progress=False).rounds
    assert alarms <= 2
    assert inlp(vectors, labels, rounds=1, progress=False).accuracies[0] > 0.6


def test_the_first_accuracy_and_direction_are_those_of_plain_scikit_learn() -> None:
    vectors, labels, _ = planted(2)
    groups = np.arange(1000) // 2
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.5))
    found = inlp(vectors, labels, probe, groups, rounds=1, seed=7, progress=False)
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=7)
    predicted = cross_val_predict(probe, vectors, labels, groups=groups, cv=splits)
    assert found.accuracies[0] == pytest.approx(balanced_accuracy_score(labels, predicted))
    weights = probe.fit(vectors, labels)[-1].coef_[0] / probe[0].scale_
    cosine = abs(found.directions[0] @ weights) / np.linalg.norm(weights)
    assert cosine == pytest.approx(1.0)


def test_its_rounds_are_those_of_the_paper() -> None:
    """P is the projection on the intersection of the nullspaces of all classifiers, from their row spaces' sum."""
    vectors, labels, _ = planted(3)
    found = inlp(vectors, labels, LogisticRegression(), rounds=2, progress=False)
    rows: list[Any] = []
    projection = np.eye(WIDTH)
    for _ in range(2):
        weights = LogisticRegression().fit(vectors @ projection, labels).coef_
        rows.append(weights.T @ np.linalg.pinv(weights).T)
        sum_of_rows = np.sum(rows, axis=0)
        values, ways = np.linalg.eigh(sum_of_rows)
        kept = ways[:, np.abs(values) < 1e-6]
        projection = kept @ kept.T
    expected = np.eye(WIDTH) - projection
    np.testing.assert_allclose(found.directions.T @ found.directions, expected, atol=1e-4)
    assert found.stopped == "rounds"
    assert found.removed == (0, 1, 2)


def test_more_classes_lose_the_differences_between_their_weights() -> None:
    generator = np.random.default_rng(0)
    labels = np.array(["a", "b", "c", "d"])[np.arange(1200) % 4]
    means = 3 * np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0][:4]
    vectors = generator.standard_normal((1200, WIDTH)) + means[np.arange(1200) % 4]
    found = inlp(vectors, labels, progress=False)
    assert found.removed[:2] == (0, 3)
    assert found.classes == ("a", "b", "c", "d")
    assert found.chance == 0.25
    differences = means[1:] - means[0]
    assert np.degrees(subspace_angles(found.directions.T, differences.T).max()) < 8
    assert found.accuracies[-1] <= found.threshold < 0.3


def test_the_held_out_accuracy_knows_nothing_of_what_it_is_asked_about() -> None:
    """With more features than vectors each fit is perfect on its own data, and says nothing of others."""
    generator = np.random.default_rng(1)
    vectors, labels = generator.standard_normal((60, 100)), np.arange(60) % 2
    assert inlp(vectors, labels, rounds=1, progress=False).rounds == 0
    assert LogisticRegression().fit(vectors, labels).score(vectors, labels) == 1.0


def test_a_concept_that_is_a_feature_of_its_own_leaves_no_trace_for_a_scaler_to_blow_up() -> None:
    generator = np.random.default_rng(0)
    vectors, labels = 1e-3 * generator.standard_normal((400, 4)) + 1.0, np.arange(400) % 2
    vectors[:, 2] = 5.0 * labels
    # Exactly this feature, so that the projection leaves rounding alone in it.
    probe = make_pipeline(
        StandardScaler(), SGDClassifier(loss="log_loss", penalty="l1", alpha=0.1, random_state=0)
    )
    found = inlp(vectors, labels, estimator=probe, progress=False)
    assert found.accuracies[0] == 1.0
    assert found.rounds == 1
    np.testing.assert_allclose(np.abs(found.directions), [[0, 0, 1, 0]], atol=1e-12)


def test_vectors_with_nothing_left_are_at_chance() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((400, 2)) * [1.0, 0.2]
    labels = (vectors[:, 0] + vectors[:, 1] > 0).astype(int)
    found = inlp(vectors, labels, progress=False)
    assert found.removed == (0, 1, 2)
    assert found.accuracies[1] > 0.6
    assert found.accuracies[2] == 0.5


def test_the_intervention_takes_the_concept_out_of_vectors_and_keeps_the_rest() -> None:
    vectors, labels, _ = planted(1)
    found = inlp(vectors, labels, progress=False)
    edit = found.intervention().build(width=WIDTH)
    assert isinstance(edit, rl.ProjectOut)
    new = edit(torch.tensor(vectors, dtype=torch.float32)).double().numpy()
    assert held_out(new, labels) < 0.55
    means = np.stack([vectors[labels == k].mean(0) for k in (0, 1)]).mean(0)
    inside = found.directions
    np.testing.assert_allclose(new @ inside.T, np.tile(means @ inside.T, (1000, 1)), atol=1e-5)
    outside = np.eye(WIDTH) - inside.T @ inside
    np.testing.assert_allclose(new @ outside, vectors @ outside, atol=1e-5)


def test_the_result_has_a_frame_a_figure_and_its_words() -> None:
    vectors, labels, _ = planted(2)
    found = inlp(torch.tensor(vectors).bfloat16(), torch.tensor(labels), progress=True)
    frame = found.to_frame()
    assert frame["balanced_accuracy"].tolist() == list(found.accuracies)
    assert frame["removed"].tolist() == list(found.removed)
    line = found.plot().axes[0].lines[-1]
    assert line.get_xdata().tolist() == list(found.removed)
    assert line.get_ydata().tolist() == list(found.accuracies)
    assert "stopped at chance" in repr(found)
    assert "<table" in found._repr_html_()


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rounds": 0}, DataError, "rounds=0: expected a whole number of 1 or more"),
        ({"folds": 1}, DataError, "folds=1: expected a whole number of 2 or more"),
        ({"level": 0.7}, DataError, "level=0.7: expected a share between 0 and 0.5"),
        (
            {"y": np.arange(40) == 3},
            DataError,
            "class True is in 1 group and folds=5: each fold needs one of its own to test on",
        ),
        (
            {"groups": np.arange(40) // 10},
            DataError,
            "folds=5: there are 4 groups, and a group is never split; give folds=4",
        ),
        ({"y": np.eye(2)[np.arange(40) % 2]}, DataError, r"y has the shape \(40, 2\)"),
        ({"estimator": SGDClassifier(alpha=-1.0)}, DataError, "cannot be fitted: .*alpha"),
        (
            {"estimator": make_pipeline(StandardScaler(), "passthrough")},
            GraphError,
            "is not linear: StandardScaler has no coef_",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    change: dict[str, Any], error: Any, message: str
) -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 3)) + 9 * (np.arange(40) % 2)[:, None]
    arguments: dict[str, Any] = {"X": vectors, "y": np.arange(40) % 2, "progress": False, **change}
    with pytest.raises(error, match=message):
        inlp(**arguments)


def test_without_a_direction_there_is_no_intervention() -> None:
    generator = np.random.default_rng(0)
    found = inlp(generator.standard_normal((60, 3)), np.arange(60) % 2, progress=False)
    assert found.directions.shape == (0, 3)
    with pytest.raises(DataError, match="no direction was removed: held-out balanced accuracy"):
        found.intervention()

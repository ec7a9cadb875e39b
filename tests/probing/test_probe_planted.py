"""What was written into random vectors is found where it is, and nothing is found where nothing is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from reftlab.probing import probe
from reftlab.probing.estimators import probe_of
from reftlab.probing.significance import (
    Shuffles,
    adjusted_p_values,
    label_columns,
    linear_statistics,
    refitted_statistics,
    rotated,
)
from tests.probing.planted_vectors import along, random_activations

TESTED: dict[str, Any] = {"control": None, "permutations": 99, "bootstrap": 0, "progress": False}


def _at_once(vectors: np.ndarray) -> Any:
    """Vectors in one part."""
    return lambda: iter([(slice(0, len(vectors)), vectors)])


def _labels(seed: int, n: int) -> Any:
    """Even classes, uneven ones, three, and numbers in turn."""
    generator = np.random.default_rng(100 + seed)
    return [
        generator.integers(0, 2, n),
        (generator.random(n) < 0.3).astype(int),
        generator.integers(0, 3, n),
        generator.normal(size=n),
    ][seed % 4]


def test_random_labels_and_vectors_give_no_more_false_maps_than_the_level_allows() -> None:
    false = 0
    for seed in range(20):
        y = _labels(seed, 40)
        found = random_activations(np.random.default_rng(seed), 40, 6, 4)
        estimator = Ridge(10.0) if y.dtype.kind == "f" else "mean_difference"
        result = probe(found, labels=y, estimator=estimator, null="linear", seed=seed, **TESTED)
        false += bool(result.significant(0.05).any())
    assert false <= 3


def test_a_planted_concept_is_found_at_its_site_and_nowhere_else() -> None:
    hits, others = 0, 0
    for seed in range(20):
        y = np.random.default_rng(100 + seed).integers(0, 2, 60)
        direction = np.random.default_rng(200 + seed).normal(size=6)
        direction /= np.linalg.norm(direction)
        planted = {2: along(direction, 2.5 * y)}
        found = random_activations(np.random.default_rng(seed), 60, 6, 4, planted=planted)
        result = probe(found, labels=y, estimator="mean_difference", seed=seed, **TESTED)
        significant = result.significant(0.05)[:, 0]
        hits += bool(significant[2]) and result.best == ("blocks[2].output", "last")
        others += int(significant.sum()) - int(significant[2])
    assert hits == 20
    assert others <= 2


def test_shuffling_labels_of_predictions_that_stay_is_no_test_and_refitting_is() -> None:
    fixed, refitted, maps = 0, 0, 60
    for seed in range(maps):
        generator = np.random.default_rng(seed)
        y = generator.integers(0, 2, 40)
        columns, shuffles = label_columns(y, "classification", 2), Shuffles.of(y, np.arange(40), 99, seed)
        order = np.stack([shuffles.rows(number) for number in range(100)])
        stays, again = [], []
        for _ in range(6):
            vectors = rotated(generator.normal(size=(40, 20)).astype(np.float32))
            again.append(linear_statistics(_at_once(vectors), vectors.shape[1], columns, shuffles))
            predicted = np.empty(40)
            for fold in range(5):
                test = shuffles.folds == fold
                predicted[test] = vectors[test] @ (vectors[~test].T @ columns[~test, 0])
            stays.append((columns[:, 0][order] @ (predicted - predicted.mean()))[None])
        fixed += bool(adjusted_p_values(stays).min() <= 0.05)
        refitted += bool(adjusted_p_values(again).min() <= 0.05)
    assert refitted <= 8
    assert fixed > 1.5 * maps * 0.05
    assert fixed > refitted


def test_the_statistic_is_the_correlation_of_plain_ridge_predictions_for_every_shuffle() -> None:
    generator = np.random.default_rng(0)
    for n, width in ((40, 6), (24, 50)):
        y = generator.integers(0, 3, n)
        raw = generator.normal(size=(n, width)).astype(np.float32) * 3 + 1
        scaled = (raw - raw.mean(0)) / raw.std(0)
        shuffles = Shuffles.of(y, np.arange(n), 3, 0)
        columns, turned = label_columns(y, "classification", 3), rotated(raw)
        found = linear_statistics(_at_once(turned), turned.shape[1], columns, shuffles)
        scale = (scaled**2).sum() / min(n, width)
        for level, strength in enumerate((0.01, 1.0)):
            for number in range(4):
                own, predicted = columns[shuffles.rows(number)], np.empty_like(columns)
                for fold in range(5):
                    test = shuffles.folds == fold
                    gram = scaled[~test].T @ scaled[~test] + strength * scale * np.eye(width)
                    predicted[test] = scaled[test] @ np.linalg.solve(gram, scaled[~test].T @ own[~test])
                expected = np.mean([np.corrcoef(own[:, k], predicted[:, k])[0, 1] for k in range(3)])
                assert found[level, number] == pytest.approx(expected, abs=2e-3)


def test_step_down_p_values_are_those_of_the_algorithm_by_hand() -> None:
    generator = np.random.default_rng(1)
    statistics = [generator.normal(size=(1, 50)) for _ in range(4)]
    statistics[1][0, 0] = 9.0
    heights = np.stack([(one[0] - one[0].mean()) / one[0].std() for one in statistics])
    order, before = np.argsort(-heights[:, 0]), 0.0
    found = adjusted_p_values(statistics)
    for place, cell in enumerate(order):
        largest = heights[order[place:]].max(0)
        before = max(before, float((largest >= heights[cell, 0]).mean()))
        assert found[cell] == pytest.approx(before)


@pytest.mark.parametrize("mixed", [False, True])
def test_shuffles_keep_groups_that_have_one_label_whole_and_shuffle_others_inside(mixed: bool) -> None:
    groups = np.repeat(np.arange(8), [1, 2, 2, 3, 1, 3, 2, 2])
    y = groups % 2 if not mixed else np.arange(16) % 3
    shuffles = Shuffles.of(y, groups, 40, 0)
    assert shuffles.rows(0).tolist() == list(range(16))
    assert any((shuffles.rows(1) != shuffles.rows(number)).any() for number in range(2, 5))
    for number in range(1, 41):
        shuffled = y[shuffles.rows(number)]
        if not mixed:
            labels = [set(shuffled[groups == group]) for group in range(8)]
            assert all(len(one) == 1 for one in labels)
            assert sorted(one.pop() for one in labels) == [0] * 4 + [1] * 4
            continue
        own = [sorted(y[groups == group]) for group in range(8)]
        swapped = [sorted(shuffled[groups == group]) for group in range(8)]
        assert sorted(map(tuple, own)) == sorted(map(tuple, swapped))
        assert sorted(shuffles.rows(number)) == list(range(16))


def test_groups_with_one_label_are_what_is_counted_not_their_vectors() -> None:
    # Ten texts of twelve tokens with a mark of the text in each vector: plenty of vectors, ten labels.
    false = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        marks = np.repeat(generator.normal(size=(10, 6)) * 3, 12, 0)
        found = random_activations(generator, 10, 6, 1, tokens=12, planted={0: marks})
        y = generator.permutation([0, 1] * 5)
        result = probe(found, labels=y, estimator="mean_difference", folds=2, seed=seed, **TESTED)
        false += bool(result.significant().any())
    assert false <= 3


def test_a_users_own_kind_of_probe_is_refitted_where_no_line_sees_the_concept() -> None:
    generator = np.random.default_rng(3)
    corner = generator.integers(0, 2, (80, 2))
    y = corner[:, 0] ^ corner[:, 1]
    spread = {1: np.hstack([4.0 * corner, np.zeros((80, 1))])}
    found = random_activations(generator, 80, 3, 2, planted=spread)
    near = KNeighborsClassifier(5)
    options: dict[str, Any] = {"control": None, "bootstrap": 0, "progress": False, "permutations": 39}
    own = probe(found, labels=y, estimator=near, **options)
    assert (own.p_values_of, own.significant()[:, 0].tolist()) == ("refit", [False, True])
    line = probe(found, labels=y, estimator=near, null="linear", **options)
    assert not line.significant().any()


def test_refitted_and_linear_tests_of_a_linear_concept_agree() -> None:
    generator = np.random.default_rng(4)
    y = generator.integers(0, 2, 50)
    vectors = generator.normal(size=(50, 5)) + along(np.eye(5)[0], 2 * y)
    shuffles = Shuffles.of(y, np.arange(50), 39, 0)
    refitted = refitted_statistics(probe_of("mean_difference", "classification"), vectors, y, 2, shuffles)
    turned = rotated(vectors.astype(np.float32))
    linear = linear_statistics(_at_once(turned), 5, label_columns(y, "classification", 2), shuffles)
    assert np.corrcoef(refitted[0], linear[1])[0, 1] > 0.9
    assert refitted[0, 0] > refitted[0, 1:].max()


def test_a_probe_that_learns_token_types_by_heart_has_no_selectivity_and_a_concept_has() -> None:
    generator = np.random.default_rng(5)
    kinds = 24
    ids = generator.integers(0, kinds, 120 * 4)
    # Site 0: which token it is, a column each. Site 1: a concept of the text, and nothing of the token.
    of_type = generator.integers(0, 2, kinds)
    tokens = np.eye(kinds)[ids] * 20
    concept = generator.integers(0, 2, 120)
    written = along(np.eye(kinds)[0], 8 * np.repeat(concept, 4))
    found = random_activations(generator, 120, kinds, 2, tokens=4, planted={0: tokens, 1: written}, ids=ids)
    by_type = [of_type[ids[4 * text : 4 * text + 4]].tolist() for text in range(120)]
    options: dict[str, Any] = {"permutations": 0, "bootstrap": 0, "progress": False}
    memory = probe(found, labels=by_type, estimator=LogisticRegression(C=10), **options)
    assert memory.control_types == ("token ids",)
    assert memory.score[0, 0] > 0.95
    assert memory.selectivity is not None
    assert abs(memory.selectivity[0, 0]) < 0.06
    assert memory.score[1, 0] < 0.6
    real = probe(found, labels=concept, estimator="mean_difference", **options)
    assert real.control_types == ("token ids",)
    assert real.selectivity is not None
    assert real.score[1, 0] > 0.95
    assert real.selectivity[1, 0] > 0.35


def test_control_types_may_be_given_and_groups_are_what_single_tokens_have() -> None:
    generator = np.random.default_rng(6)
    found = random_activations(generator, 60, 5, 1, planted={0: along(np.eye(5)[0], 3 * (np.arange(60) % 2))})
    y = np.arange(60) % 2
    options: dict[str, Any] = {
        "permutations": 0,
        "bootstrap": 0,
        "progress": False,
        "estimator": "mean_difference",
    }
    alone = probe(found, labels=y, **options)
    assert alone.control_types == ("groups",)
    assert alone.control is not None
    assert abs(alone.control["balanced_accuracy"][0, 0] - 0.5) < 0.2
    given = probe(found, labels=y, control=[f"word {n % 12}" for n in range(60)], **options)
    assert given.control_types == ("given",)
    left_out = probe(found, labels=y, control=None, **options)
    assert (left_out.control, left_out.selectivity) == (None, None)
    assert "selectivity" not in left_out.to_frame()


def test_the_code_of_a_planted_concept_is_short_and_of_noise_is_not() -> None:
    generator = np.random.default_rng(7)
    y = np.arange(80) % 2
    found = random_activations(generator, 80, 4, 2, planted={1: along(np.eye(4)[1], 6 * y)})
    result = probe(
        found, labels=y, estimator="mean_difference", description=True, permutations=0, bootstrap=0, control=None,
        progress=False,
    )  # fmt: skip
    assert result.description is not None
    noise, concept = result.description["compression"][:, 0]
    assert noise < 1.2
    assert concept > 2

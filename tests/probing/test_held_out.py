"""Predictions of held-out vectors: those of scikit-learn on the same splits, in the order of the vectors."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reftlab as rl
from reftlab.probing import probe
from reftlab.probing.folds import grouped_splits
from reftlab.probing.labels import parse_labels
from tests.probing.planted_vectors import QUICK, along, random_activations

FIRST = "blocks[0].output @ last"


def _splits(found: rl.Activations, labels: Any, groups: Any = None) -> Any:
    parsed = parse_labels(labels, "auto", found.rows)
    own = np.arange(found.rows) if groups is None else groups
    splits = grouped_splits(parsed.values, own, parsed, 5, 0).folds
    return [(split.train, split.test) for split in splits]


def _folds(splits: Any, n: int) -> list[int]:
    numbers = np.zeros(n, dtype=int)
    for fold, (_, test) in enumerate(splits):
        numbers[test] = fold
    return numbers.tolist()


@pytest.mark.parametrize("names", [("no", "yes"), ("a", "b", "c")])
def test_they_are_those_of_cross_val_predict_in_the_order_of_the_examples(names: tuple[str, ...]) -> None:
    labels = [names[number % len(names)] for number in range(60)]
    classes = np.eye(6)[[names.index(one) for one in labels]]
    found = random_activations(np.random.default_rng(0), 60, 6, 2, planted={0: 1.5 * classes})
    own = make_pipeline(StandardScaler(), LogisticRegression(C=0.3))
    result = probe(found, labels=labels, estimator=own, **QUICK)
    vectors, splits = found[FIRST].double().numpy(), _splits(found, labels)
    frame = result.predictions(FIRST)
    assert frame["example"].tolist() == list(range(60))
    assert frame["fold"].tolist() == _folds(splits, 60)
    assert frame["label"].tolist() == labels
    assert frame["predicted"].tolist() == cross_val_predict(own, vectors, labels, cv=splits).tolist()
    method = "decision_function" if len(names) == 2 else "predict_proba"
    scores = cross_val_predict(own, vectors, labels, cv=splits, method=method)
    columns = ["score"] if len(names) == 2 else [f"score {name}" for name in names]
    assert np.allclose(frame[columns].to_numpy(), scores.reshape(60, -1), atol=1e-5)
    assert 0.5 < balanced_accuracy_score(frame["label"], frame["predicted"]) < 1
    expected = balanced_accuracy_score(frame["label"], frame["predicted"])
    assert result.score[0, 0] == pytest.approx(expected)
    pd.testing.assert_frame_equal(result.predictions("blocks[0].output", "last"), frame)
    assert result.predictions(("blocks[1].output", "last"))["label"].tolist() == labels
    pd.testing.assert_frame_equal(result.predictions(rl.Read(FIRST)), frame)
    with pytest.raises(KeyError, match="was not probed"):
        result.predictions("blocks[0].output", "first")


def test_the_tokens_of_an_example_come_one_after_the_other() -> None:
    labels = ["a" if number % 2 else "b" for number in range(40)]
    planted = {0: along(np.eye(5)[0], 2.0 * np.repeat(np.arange(40) % 2, 3))}
    found = random_activations(np.random.default_rng(1), 40, 5, 1, tokens=3, planted=planted)
    result = probe(found, labels=labels, estimator="lda", **QUICK)
    frame = result.predictions("blocks[0].output @ last(3)")
    index = found.flat("blocks[0].output @ last(3)").index
    assert frame["example"].tolist() == np.repeat(np.arange(40), 3).tolist() == index[:, 0].tolist()
    assert frame["token"].tolist() == [0, 1, 2] * 40
    assert frame["label"].tolist() == [label for label in labels for _ in range(3)]
    assert (frame.groupby("example")["fold"].nunique() == 1).all()
    assert result.score[0, 0] == pytest.approx(balanced_accuracy_score(frame["label"], frame["predicted"]))


def test_several_labels_and_numbers_have_columns_of_their_own() -> None:
    generator = np.random.default_rng(2)
    table = generator.integers(0, 2, (60, 2))
    found = random_activations(generator, 60, 5, 1, planted={0: 1.5 * table @ np.eye(5)[:2]})
    several = probe(found, labels=table, estimator="mean_difference", **QUICK)
    frame = several.predictions(FIRST)
    assert [name for name in frame if str(name)[-1].isdigit()] == [
        "label 0", "predicted 0", "label 1", "predicted 1", "score 0", "score 1"
    ]  # fmt: skip
    assert np.array_equal(frame[["label 0", "label 1"]], table)
    areas = [roc_auc_score(frame[f"label {n}"], frame[f"score {n}"]) for n in (0, 1)]
    assert several.metrics["auroc"][0, 0] == pytest.approx(np.mean(areas))

    amounts = found[FIRST].double().numpy()[:, 0] + generator.normal(size=60)
    result = probe(found, labels=amounts, estimator=Ridge(), **QUICK)
    said = result.predictions(FIRST)
    assert list(said) == ["example", "token", "fold", "label", "predicted"]
    assert np.allclose(said["label"], amounts)
    vectors = found[FIRST].double().numpy()
    expected = cross_val_predict(Ridge(), vectors, amounts, cv=_splits(found, amounts))
    assert np.allclose(said["predicted"], expected, atol=1e-5)
    assert result.score[0, 0] == pytest.approx(r2_score(said["label"], said["predicted"]), abs=1e-5)


def test_cells_that_are_fitted_chunk_by_chunk_have_them_too_and_all_of_them_are_small() -> None:
    labels = np.arange(200) % 2
    found = random_activations(
        np.random.default_rng(3), 200, 8, 1, planted={0: along(np.eye(8)[0], 2 * labels)}
    )
    result = probe(found, labels=labels, memory=20_000, **QUICK)
    assert result.streamed.all()
    frame = result.predictions(FIRST)
    assert result.score[0, 0] == pytest.approx(balanced_accuracy_score(frame["label"], frame["predicted"]))
    assert result.metrics["auroc"][0, 0] == pytest.approx(
        roc_auc_score(frame["label"], frame["score"]), abs=1e-6
    )
    held = result.held_out[0, 0]
    assert (held.scores.dtype, held.predicted.dtype) == (np.float32, np.int32)
    again = pickle.loads(pickle.dumps(result)).predictions(FIRST)
    pd.testing.assert_frame_equal(again, frame)


def test_classes_that_are_pairs_are_named_as_they_were_given() -> None:
    labels = [("noun", number % 2) for number in range(40)]
    found = random_activations(np.random.default_rng(4), 40, 4, 1)
    frame = probe(found, labels=labels, estimator="mean_difference", **QUICK).predictions(FIRST)
    assert frame["label"].tolist() == labels
    assert set(frame["predicted"]) <= set(labels)

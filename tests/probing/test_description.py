"""Description length, against the code written out by hand, and against data that say nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reftlab.errors import DataError
from reftlab.plotting.probe_curves import code_figure
from reftlab.probing.control import control_labels
from reftlab.probing.description import description_length

PROBE = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


def planted(classes: int, n: int = 400, width: int = 6, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(n) % classes)
    return generator.standard_normal((n, width)) + 3 * np.eye(classes, width)[labels], labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_code_is_what_it_is_by_hand(classes: int) -> None:
    vectors, labels = planted(classes)
    found = description_length(vectors, labels, PROBE, fractions=(0.1, 0.3, 1.0), seed=5)
    order = np.argsort(np.random.default_rng(5).permutation(400), kind="stable")
    expected = [40 * np.log2(classes)]
    for start, end in ((40, 120), (120, 400)):
        probe = PROBE.fit(vectors[order[:start]], labels[order[:start]])
        total = 0.0
        for n in order[start:end]:
            chance = probe.predict_proba(vectors[n : n + 1])[0, labels[n]]
            weight = classes / (start + classes)
            total -= np.log2((1 - weight) * chance + weight / classes)
        expected.append(total)
    np.testing.assert_allclose([block.bits for block in found.blocks], expected, rtol=1e-9)
    assert [block.until for block in found.blocks] == [40, 120, 400]
    assert found.bits == pytest.approx(sum(expected))
    assert found.uniform_bits == pytest.approx(400 * np.log2(classes))
    assert found.compression == pytest.approx(found.uniform_bits / found.bits)


def test_the_code_by_frequencies_is_that_of_counts_so_far() -> None:
    labels = (np.random.default_rng(0).random(300) < 0.1).astype(int)
    vectors = np.random.default_rng(1).standard_normal((300, 3))
    found = description_length(vectors, labels, PROBE, fractions=(0.1, 0.5, 1.0), seed=2)
    order = np.argsort(np.random.default_rng(2).permutation(300), kind="stable")
    y, total = labels[order], 30.0
    for start, end in ((30, 150), (150, 300)):
        ones = y[:start].sum()
        share = (np.array([start - ones, ones]) + 1) / (start + 2)
        total -= np.log2(share[y[start:end]]).sum()
    assert found.frequency_bits == pytest.approx(total)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_planted_concept_compresses_far_and_random_labels_do_not_over_20_seeds(classes: int) -> None:
    real, random = [], []
    for seed in range(20):
        vectors, labels = planted(classes, 240, seed=seed)
        real.append(description_length(vectors, labels, PROBE, seed=seed).compression)
        control = control_labels(np.arange(240), labels, seed)
        random.append(description_length(vectors, control, PROBE, seed=seed))
    assert min(real) > 1.6
    # Labels drawn one by one are not quite balanced, so that the code by frequencies is the fair one.
    assert sum(found.compression > 1.05 for found in random) <= 1
    assert sum(found.gain > 1.02 for found in random) <= 1


def test_rare_classes_compress_without_any_vectors_and_the_gain_shows_it() -> None:
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(600) % 20 == 0)
    found = description_length(generator.standard_normal((600, 4)), labels, PROBE)
    assert found.compression > 2
    assert found.gain < 1.02
    signal = description_length(generator.standard_normal((600, 4)) + 4 * labels[:, None], labels, PROBE)
    assert signal.gain > 1.5


def test_a_class_that_did_not_come_yet_costs_its_share_of_the_uniform_code() -> None:
    vectors = np.zeros((200, 1))
    order = np.argsort(np.random.default_rng(0).permutation(200), kind="stable")
    labels = np.zeros(200, dtype=int)
    labels[order[100:]] = 1
    found = description_length(vectors, labels, PROBE, fractions=(0.25, 0.5, 1.0), seed=0)
    # 50 zeros were seen, then 100: each label costs by (count + 1) / (n + 2), the rule of succession.
    assert found.blocks[1].bits == pytest.approx(-50 * np.log2(51 / 52))
    assert found.blocks[2].bits == pytest.approx(-100 * np.log2(1 / 102))


def test_a_probe_that_is_sure_and_wrong_pays_a_finite_price() -> None:
    vectors, labels = planted(2, 100)
    found = description_length(vectors, np.random.default_rng(0).permutation(labels), KNeighborsClassifier(1))
    assert np.isfinite(found.bits)
    assert found.compression < 0.7


def test_several_labels_add_their_codes() -> None:
    vectors, labels = planted(3)
    several = np.eye(3, dtype=int)[labels]
    together = description_length(vectors, several, PROBE, seed=1)
    alone = [description_length(vectors, several[:, k], PROBE, seed=1) for k in range(3)]
    assert together.bits == pytest.approx(sum(one.bits for one in alone))
    assert together.uniform_bits == pytest.approx(1200)
    assert together.frequency_bits == pytest.approx(sum(one.frequency_bits for one in alone))
    assert (together.labels, together.n) == (3, 400)


def test_blocks_end_between_groups_in_an_order_of_their_own() -> None:
    vectors, labels = planted(2)
    groups = np.repeat([f"text {n}" for n in range(40)], 10)
    found = description_length(vectors, labels, PROBE, groups, seed=0)
    assert all(block.until % 10 == 0 for block in found.blocks)
    assert found.blocks[0].until == 10
    other = description_length(vectors, labels, PROBE, groups, seed=1)
    assert other.bits != found.bits
    assert description_length(vectors, labels, PROBE, groups, seed=0) == found


@pytest.mark.parametrize(("classes", "first"), [(2, 13), (8, 25)])
def test_the_first_fractions_drop_out_where_they_hold_too_few(classes: int, first: int) -> None:
    vectors, labels = planted(classes, 400, width=8)
    found = description_length(vectors, labels, PROBE)
    # 3.125 and 6.25 in a hundred of 400; 2 classes need 8 examples, 8 classes 16.
    assert found.blocks[0].until in (first, first - 1)


def test_a_search_gets_the_groups_of_what_it_is_fitted_on() -> None:
    vectors, labels = planted(2, 300)
    groups = np.arange(300) // 3
    search = GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=GroupKFold(2))
    found = description_length(vectors, labels, search, groups, fractions=(0.2, 1.0))
    assert found.compression > 1.5


def test_strings_bools_and_tensors_are_taken() -> None:
    vectors, labels = planted(2, 200)
    expected = description_length(vectors.astype(np.float32), labels, PROBE)
    assert description_length(vectors.astype(np.float32), labels.astype(bool), PROBE) == expected
    named = np.array(["a", "b"])[labels].tolist()
    assert description_length(torch.tensor(vectors).float(), named, PROBE) == expected
    half = description_length(torch.tensor(vectors).bfloat16(), torch.tensor(labels), GaussianNB())
    assert half.compression > 1.5


def test_the_frame_adds_up_and_the_figure_shows_it() -> None:
    vectors, labels = planted(2)
    found = description_length(vectors, labels, PROBE, progress=True)
    frame = found.to_frame()
    assert frame["bits"].sum() == pytest.approx(found.bits)
    assert frame["uniform_bits"].sum() == pytest.approx(found.uniform_bits)
    assert frame["from"].tolist() == [0, *frame["until"].tolist()[:-1]]
    np.testing.assert_allclose(
        frame["bits_per_example"] * (frame["until"] - frame["from"]), frame["bits"], rtol=1e-12
    )
    axes = found.plot().axes[0]
    stairs = [patch.get_data() for patch in axes.patches]
    np.testing.assert_allclose(stairs[-1].values, frame["bits_per_example"])
    np.testing.assert_allclose(stairs[-1].edges[1:], frame["until"])
    assert repr(found).startswith("DescriptionLength(")
    assert "bits for 400 examples" in repr(found)
    assert "<table" in found._repr_html_()
    assert code_figure([10, 20], [10, 5], [10, 10], 20, "a $ title").axes


def test_the_coder_is_a_logistic_regression_of_fixed_strength_unless_given() -> None:
    vectors = np.random.default_rng(3).standard_normal((300, 4))
    labels = (vectors[:, 0] > 0.5).astype(int)
    own = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    assert description_length(vectors, labels).bits == description_length(vectors, labels, own).bits
    unscaled = description_length(vectors * [100.0, 1.0, 1.0, 1.0], labels).bits
    assert unscaled == pytest.approx(description_length(vectors, labels).bits)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.linspace(0, 1, 40)}, "y holds fractions: a description length needs classes"),
        ({"y": np.zeros(40)}, "y holds only the class 0.0"),
        ({"y": np.arange(39) % 2}, r"y has the shape \(39,\); 40 vectors need one class each"),
        ({"y": np.full((40, 2), 2)}, r"several labels an example are zeros and ones \(40, k\)"),
        ({"estimator": RidgeClassifier()}, r"RidgeClassifier\(\) has no predict_proba"),
        ({"estimator": Ridge()}, r"Ridge\(\) has no predict_proba"),
        ({"estimator": "logistic"}, "estimator='logistic': expected a scikit-learn classifier"),
        (
            {"estimator": KNeighborsClassifier(20)},
            "cannot learn from the first 10 examples: Expected n_neigh",
        ),
        ({"fractions": (0.5, 0.1, 1.0)}, "expected shares that rise from above 0 to 1"),
        ({"fractions": (0.1, 0.5)}, "expected shares that rise from above 0 to 1"),
        ({"groups": [0] * 40}, "40 examples in 1 groups make no two blocks"),
        ({"groups": [0] * 3}, "groups has 3 entries; 40 vectors need one each"),
        ({"X": np.zeros(40)}, r"X has the shape \(40,\)"),
        ({"X": np.full((40, 2), np.nan)}, "X: 40 of 40 vectors hold NaN"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_has_no_code_is_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 2))
    arguments = {"estimator": PROBE, "X": vectors, "y": np.arange(40) % 2, "groups": None, **change}
    with pytest.raises(DataError, match=message):
        description_length(arguments.pop("X"), arguments.pop("y"), **arguments)

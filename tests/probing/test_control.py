"""Control labels: one random label a type, and what a probe makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from reftlab.errors import DataError
from reftlab.probing.control import control_labels

TYPES = st.one_of(st.integers(-5, 5), st.text(max_size=3), st.tuples(st.integers(0, 2), st.booleans()))


@given(
    st.lists(st.tuples(TYPES, st.sampled_from("ABC")), min_size=1, max_size=30),
    st.integers(0, 9),
    st.randoms(),
)
def test_each_type_has_one_label_whatever_the_order(
    pairs: list[tuple[Any, str]], seed: int, random: Any
) -> None:
    types, labels = [name for name, _ in pairs], [label for _, label in pairs]
    found = control_labels(types, labels, seed)
    given_to: dict[Any, str] = {}
    assert all(given_to.setdefault(name, label) == label for name, label in zip(types, found, strict=True))
    assert set(found) <= set(labels)
    random.shuffle(pairs)
    again = control_labels([name for name, _ in pairs], [label for _, label in pairs], seed)
    assert all(given_to[name] == label for (name, _), label in zip(pairs, again, strict=True))


def test_labels_come_as_often_as_they_do_in_the_real_task() -> None:
    labels = ["A"] * 700 + ["B"] * 200 + ["C"] * 100
    drawn = Counter(control_labels(list(range(1000)), labels, seed=3))
    assert chisquare([drawn[label] for label in "ABC"], [700, 200, 100]).pvalue > 0.01
    found = control_labels(list(range(1000)), labels, seed=4)
    # Two draws from these shares agree in 0.7² + 0.2² + 0.1² = 54 of a hundred.
    assert 490 < sum(a == b for a, b in zip(found, labels, strict=True)) < 590


def test_another_seed_is_another_task_and_a_label_stays_beside_other_types() -> None:
    types, labels = np.arange(200) % 40, np.arange(200) % 2
    first = control_labels(types, labels, seed=0)
    assert not (first == control_labels(types, labels, seed=1)).all()
    # The half with the even types alone has the same shares of labels once these are made alike.
    half = types % 2 == 0
    balanced = np.arange(100) % 2
    assert (control_labels(types[half], balanced, seed=0) == first[half]).all()


def test_equal_numbers_of_other_kinds_are_one_type() -> None:
    labels = list(range(8))
    types = [1, True, 1.0, np.int64(1), np.float32(1), "1", (1, 2), (True, np.int32(2))]
    found = control_labels(types, labels, seed=0)
    assert len(set(found[:5])) == 1
    assert found[6] == found[7]


@pytest.mark.parametrize("shape", [(60,), (60, 3)], ids=["numbers", "rows"])
def test_a_regression_draws_a_target_and_several_labels_a_whole_row(shape: tuple[int, ...]) -> None:
    labels = np.random.default_rng(0).standard_normal(shape)
    types = ["even", "odd"] * 30
    found = control_labels(types, labels, seed=2)
    assert isinstance(found, np.ndarray)
    assert found.shape == shape
    assert (found[::2] == found[0]).all()
    assert (found[1::2] == found[1]).all()
    rows = {tuple(np.atleast_1d(row)) for row in labels}
    assert {tuple(np.atleast_1d(row)) for row in found} <= rows
    order = np.random.default_rng(1).permutation(60)
    moved = control_labels([types[n] for n in order], labels[order], seed=2)
    assert (moved == found[order]).all()


def test_tensors_come_back_as_tensors() -> None:
    types, labels = torch.tensor([5, 9, 5]), torch.tensor([0.5, 1.5, 2.5])
    found = control_labels(types, labels, seed=0)
    assert isinstance(found, torch.Tensor)
    assert found[0] == found[2]
    assert control_labels(["the", "cat", "the"], ["A", "B", "A"], 1) == ["A", "B", "A"]


def test_a_probe_learns_the_control_by_heart_where_types_repeat_and_only_there() -> None:
    generator = np.random.default_rng(0)
    types = generator.integers(0, 30, 600)
    embedding = generator.standard_normal((30, 40))
    vectors = embedding[types] + 0.1 * generator.standard_normal((600, 40))
    repeated = control_labels(types, np.arange(600) % 2, seed=0)
    unique = control_labels(np.arange(600), np.arange(600) % 2, seed=0)
    probe = LogisticRegression(max_iter=500)
    assert cross_val_score(probe, vectors, repeated, cv=3).mean() > 0.95
    assert cross_val_score(probe, vectors, unique, cv=3).mean() < 0.57


class Nameless:
    pass


@pytest.mark.parametrize(
    ("types", "labels", "message"),
    [
        ([1, 2], [0], "types has 2 entries and labels 1"),
        ([], [], "types has 0 entries"),
        ([Nameless()], [0], "types: <.*Nameless.*has no text of its own"),
        ([1], [Nameless()], "labels: <.*Nameless.*has no text of its own"),
    ],
)
def test_what_has_no_control_is_refused(types: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        control_labels(types, labels)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(DataError, match="expected a whole number of 0 or more"):
        control_labels([1], [0], seed)

"""Labels of every form, and what cannot be one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reftlab.collecting import SiteVectors
from reftlab.errors import DataError
from reftlab.probing.labels import parse_labels

CLASSES = st.lists(
    st.one_of(st.integers(), st.text(), st.tuples(st.integers(0, 3), st.text(max_size=2))), min_size=2
).filter(lambda found: len(set(found)) > 1)


@given(CLASSES)
def test_classes_of_any_hashable_kind_come_back_from_their_numbers(labels: list[Any]) -> None:
    found = parse_labels(labels, "auto", len(labels))
    assert found.kind == "classification"
    assert [found.classes[number] for number in found.values] == labels
    assert len(found.classes) == len(set(labels))
    assert found.classes == parse_labels(labels[::-1], "auto", len(labels)).classes


FLOATS = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=3)


@given(FLOATS.filter(lambda found: len(set(found)) > 2 and any(one % 1 for one in found)))
def test_fractions_are_numbers(labels: list[float]) -> None:
    found = parse_labels(labels, "auto", len(labels))
    assert found.kind == "regression"
    assert found.values.tolist() == labels


@pytest.mark.parametrize(
    "labels",
    [
        ["b", "a", "b"],
        np.array(["b", "a", "b"]),
        pd.Series(["b", "a", "b"]),
        pd.Categorical(["b", "a", "b"], categories=["b", "a"]),
        ("b", "a", "b"),
        pa.array(["b", "a", "b"]),
        pa.chunked_array([["b"], ["a", "b"]]),
    ],
)
def test_texts_may_stand_in_any_container(labels: Any) -> None:
    found = parse_labels(labels, "auto", 3)
    assert (found.classes, found.values.tolist()) == (("a", "b"), [1, 0, 1])


def test_yes_and_no_and_whole_numbers_are_classes() -> None:
    assert parse_labels(torch.tensor([True, False]), "auto", 2).classes == (False, True)
    assert parse_labels(np.array([3, 1, 3]), "auto", 3).classes == (1, 3)
    assert parse_labels([3, 1, 2], "regression", 3).values.tolist() == [3.0, 1.0, 2.0]
    assert parse_labels([0.0, 1.0], "classification", 2).classes == (0.0, 1.0)


@pytest.mark.parametrize("form", [np.array, torch.tensor, pd.DataFrame])
def test_two_axes_are_several_labels(form: Any) -> None:
    rows = [[0, 1], [1, 1], [1, 0]]
    found = parse_labels(form(rows), "auto", 3)
    assert (found.kind, found.classes, found.values.tolist()) == ("multilabel", (0, 1), rows)
    assert parse_labels(rows, "multilabel", 3).values.tolist() == rows


def _vectors(index: list[list[int]]) -> SiteVectors:
    return SiteVectors(torch.zeros(len(index), 2), torch.tensor(index))


def test_labels_of_tokens_are_those_of_the_chosen_tokens() -> None:
    found = parse_labels([["a", "b", "c"], ["c", "a"]], "auto", 2)
    every = _vectors([[0, 0, 7], [0, 1, 7], [0, 2, 7], [1, 0, 7], [1, 1, 7]])
    assert found.of_vectors(every, "x").tolist() == [0, 1, 2, 2, 0]
    last = _vectors([[0, 2, 7], [1, 1, 7]])
    assert found.of_vectors(last, "x").tolist() == [2, 0]
    # As many labels as chosen tokens: they are those of the chosen ones, wherever these stand.
    chosen = _vectors([[0, 4, 7], [0, 5, 7], [0, 9, 7], [1, 3, 7], [1, 8, 7]])
    assert found.of_vectors(chosen, "x").tolist() == [0, 1, 2, 2, 0]


def test_labels_of_an_example_are_those_of_all_its_tokens() -> None:
    found = parse_labels(["a", "b"], "auto", 2)
    assert found.of_vectors(_vectors([[0, 0, 7], [0, 1, 7], [1, 5, 7]]), "x").tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (None, "auto", "labels=None: expected one label for each example"),
        ("abc", "auto", "labels='abc': expected one label for each example"),
        (["a", "b"], "auto", "labels has 2 entries and data 3 examples"),
        (["a", "a", "a"], "auto", "labels are all 'a'; there is nothing to tell apart"),
        (["a", None, "b"], "auto", "labels: entry 1 is None"),
        ([0.5, float("nan"), 1.0], "auto", "labels: entry 1 is nan"),
        ([0.5, float("inf"), 1.0], "auto", "labels hold NaN or infinity"),
        ([0.0, 1.0, 1.0], "auto", "say kind='classification' or kind='regression'"),
        (torch.tensor([0.0, 2.0, 1.0]), "auto", "labels are 0.0, 1.0, 2.0 alone, which may be classes"),
        (pd.Series([1, None, 0], dtype="Int64"), "auto", "labels: entry 1 is nan"),
        (pd.Series(["a", None, "b"], dtype="string"), "auto", "labels: entry 1 is <NA>"),
        ({0: "a", 1: "b", 2: "a"}, "auto", "labels: a dict has no order of examples"),
        ({"a", "b", "c"}, "auto", "labels: a set has no order of examples"),
        ([0.5, "a", 1.0], "auto", "'a' is no number"),
        ([True, 1, 0], "auto", "labels mix True or False with numbers"),
        (["a", "b", "a"], "regression", "'a' is no number, and kind='regression'"),
        (["a", "b", "a"], "classes", "kind='classes': expected one of 'auto', 'classification'"),
        (np.array([[0, 2], [1, 1], [0, 0]]), "auto", "labels with two axes are several yes-or-no labels"),
        (np.array([[0, 1], [1, 1], [0, 1]]), "auto", "labels: column 1 is 1 for all examples"),
        (np.array([[0, 1], [1, 0]]), "auto", "labels has 2 rows and data 3 examples"),
        (
            np.array([[0, 1], [1, 0], [0, 0]]),
            "classification",
            "labels has the shape (3, 2), and kind='classification'",
        ),
        (
            np.array([0, 1, 1]),
            "multilabel",
            "labels has the shape (3,); kind='multilabel' takes (example, label)",
        ),
        ([[0, 1], [1], [0, 0]], "multilabel", "kind='multilabel' takes rows of equal length"),
        ([["a"], "b", ["a"]], "auto", "labels: example 1 has 'b', and others a list of labels"),
        ([["a"], [["b"]], ["a"]], "auto", "labels: entry 1 is ['b'], which is no label"),
    ],
)
@pytest.mark.usefixtures("users_call")
def test_what_is_no_label_is_named(labels: Any, kind: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_labels(labels, kind, 3)
    assert message in str(caught.value)


def test_labels_of_tokens_that_fit_nothing_say_what_would() -> None:
    found = parse_labels([["a", "b"], ["a"]], "auto", 2)
    with pytest.raises(
        DataError, match="example 1 has 1 labels, and x chooses 1 of its tokens, up to number 4"
    ):
        found.of_vectors(_vectors([[0, 0, 7], [1, 4, 7]]), "x")


def test_more_labels_than_tokens_belong_to_nobody() -> None:
    found = parse_labels([["a", "b", "c"], ["c", "a"]], "auto", 2)
    every = _vectors([[0, 0, 7], [0, 1, 7], [1, 0, 7], [1, 1, 7]])
    with pytest.raises(DataError, match="example 0 has 3 labels, and its prompt 2 tokens"):
        found.of_vectors(every, "x", to_end=True)
    # Of tokens in the middle nobody knows how many come after them.
    assert found.of_vectors(every, "x").tolist() == [0, 1, 2, 0]

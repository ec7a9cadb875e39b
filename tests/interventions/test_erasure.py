"""Erasure and projection: what a linear classifier can still read afterwards, and by how much vectors move."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from reftlab import InterventionError
from reftlab import interventions as iv

WIDTH = 8


def labelled(classes: int = 2, n: int = 600) -> tuple[Tensor, Tensor]:
    """Correlated vectors whose means differ by class."""
    labels = torch.arange(n) % classes
    mix = torch.randn(WIDTH, WIDTH)
    return torch.randn(n, WIDTH) @ mix + torch.randn(classes, WIDTH)[labels] * 2 + 1.0, labels


def accuracy(vectors: Tensor, labels: Tensor) -> float:
    model = LogisticRegression(max_iter=2000).fit(vectors.numpy(), labels.numpy())
    return float(model.score(vectors.numpy(), labels.numpy()))


def leace(x: Any, z: Any) -> Any:
    """x − W⁺ P W (x − μ) by the formula of the paper, in float64, without shrinkage."""
    x, z = np.asarray(x, float), np.asarray(z, float)
    centred = x - x.mean(0)
    sigma, cross = np.cov(x.T), centred.T @ (z - z.mean(0)) / (len(x) - 1)
    values, vectors = np.linalg.eigh(sigma)
    whiten, colour = (vectors * values**p @ vectors.T for p in (-0.5, 0.5))
    u, s, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
    u = u[:, s > 1e-8]
    return x - centred @ (colour @ u @ u.T @ whiten).T


@pytest.mark.parametrize("classes", [2, 4])
def test_leace_is_the_closed_form_and_leaves_nothing_to_a_linear_classifier(classes: int) -> None:
    vectors, labels = labelled(classes)
    assert accuracy(vectors, labels) > 1.5 / classes
    edit = iv.Erase.fit(vectors, labels, shrinkage=False, constrain_cov_trace=False).build(WIDTH)
    new = edit(vectors)
    onehot = np.eye(classes)[labels.numpy()]
    np.testing.assert_allclose(new.numpy(), leace(vectors.numpy(), onehot), rtol=1e-3, atol=1e-3)
    # Every class comes up equally often, so a constant answer is right this often.
    assert accuracy(new, labels) <= 1 / classes + 0.02
    assert edit.right.shape == (classes - 1, WIDTH)


def test_numbers_are_erased_as_classes_are() -> None:
    vectors = torch.randn(500, WIDTH)
    heights = vectors @ torch.randn(WIDTH, 2) + 0.1 * torch.randn(500, 2)
    edit = iv.Erase.fit(vectors, heights).build(WIDTH)
    new = edit(vectors)
    before, after = (np.corrcoef(v.T.numpy(), heights.T.numpy())[:WIDTH, WIDTH:] for v in (vectors, new))
    assert np.abs(before).max() > 0.3
    assert np.abs(after).max() < 0.02


def test_a_fitted_eraser_needs_the_package_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = labelled()
    fitted = iv.Erase.fit(vectors, labels)
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    again = iv.Erase(**fitted.config).build(WIDTH)
    assert torch.equal(again(vectors), fitted.build(WIDTH)(vectors))
    with pytest.raises(InterventionError, match="pip install concept-erasure"):
        iv.Erase.fit(vectors, labels)


def test_a_projection_takes_the_span_of_its_directions_away() -> None:
    h, mean = torch.randn(5, WIDTH), torch.randn(WIDTH)
    directions = torch.randn(3, WIDTH) * torch.tensor([[0.01], [1.0], [100.0]])
    d = directions.double().numpy()
    span = np.linalg.pinv(d) @ d
    for centre, made in (
        (torch.zeros(WIDTH), iv.ProjectOut(directions)),
        (mean, iv.ProjectOut(directions, mean)),
    ):
        expected = h.double().numpy() - (h - centre).double().numpy() @ span
        np.testing.assert_allclose(made.build(WIDTH)(h).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_directions_of_a_projection_are_made_orthonormal_in_their_order() -> None:
    edit = iv.ProjectOut([[2.0, 0.0, 0.0], [5.0, 3.0, 0.0]]).build(3)
    assert edit.basis.round(decimals=5).tolist() == [[1, 0, 0], [0, 1, 0]]
    for first in ([1.0, 2.0, 2.0], [-1.0, 2.0, 2.0]):
        torch.testing.assert_close(iv.ProjectOut(first).basis[0], torch.tensor(first) / 3)
    second = torch.tensor([[False, True]])
    torch.testing.assert_close(
        edit.edited(torch.ones(1, 3), subspace=second), torch.tensor([[1.0, 0.0, 1.0]])
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_mean_projection_makes_the_classes_means_the_same(classes: int) -> None:
    vectors, labels = labelled(classes)
    edit = iv.ProjectOut.fit(vectors, labels).build(WIDTH)
    assert edit.directions == classes - 1
    new = edit(vectors)
    means = torch.stack([new[labels == number].mean(0) for number in range(classes)])
    torch.testing.assert_close(means, means.mean(0).expand_as(means), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.mean(0), vectors.mean(0), rtol=1e-4, atol=1e-4)
    difference = vectors[labels == 1].mean(0) - vectors[labels == 0].mean(0)
    assert (edit.basis[0] @ difference).item() == pytest.approx(difference.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    "made", [iv.ProjectOut([3.0, 1.0, 0.0]), iv.ProjectOut([[1.0, 1, 0], [0, 1, 2]], [1.0, 2, 3]),
             iv.Erase([[1.0], [2.0], [0.0]], [[0.5, 0.0, 1.0]]), iv.Erase([[1.0], [2], [0]], [[0.5, 0, 1]], [1, 2, 3])],
)  # fmt: skip
def test_the_affine_form_of_an_erasure_says_what_forward_does(made: Any) -> None:
    edit, h = made.build(3), torch.randn(4, 3)
    affine = edit.affine()
    torch.testing.assert_close(h + h @ affine.read.T @ affine.write.T + affine.constant, edit(h))


def test_a_mean_projection_meets_in_the_middle_however_many_vectors_a_class_has() -> None:
    few, many = torch.randn(5, WIDTH) - 3.0, torch.randn(400, WIDTH) + 3.0
    edit = iv.ProjectOut.fit(torch.cat([few, many]), [0] * 5 + [1] * 400).build(WIDTH)
    half = (many.mean(0) - few.mean(0)) / 2
    torch.testing.assert_close((edit(few) - few).mean(0), half, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((edit(many) - many).mean(0), -half, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda: iv.Erase.fit(torch.randn(4, 3), [0, 1]),
            r"labels have the shape \(2,\); 4 vectors need \(4,\)",
        ),
        (lambda: iv.Erase.fit(torch.randn(4, 3), [0.5, 1, 2, 3]), "labels are fractions"),
        (lambda: iv.Erase.fit(torch.randn(4, 3), [1, 1, 1, 1]), "labels hold 1 class"),
        (lambda: iv.Erase.fit(torch.randn(4, 3), "cats"), "labels='cats'"),
        (lambda: iv.Erase.fit("cats", [0, 1]), "vectors='cats'"),
        (lambda: iv.Erase.fit(torch.ones(4, 3), [0, 1, 0, 1]), "nothing to erase"),
        (lambda: iv.Erase([[1.0]], [[1.0, 0.0]]), r"left has the shape \(1, 1\)"),
        (lambda: iv.Erase([[1.0], [0.0]], [[1.0, 0.0]], [1.0]), "mean has 1 numbers"),
        (
            lambda: iv.Erase([[1.0], [0.0]], [[1.0, 0.0]]).build(3),
            "right has 2 numbers, the vectors here have 3",
        ),
        (lambda: iv.ProjectOut([0.0, 0.0]), "length 0"),
        (lambda: iv.ProjectOut([[1.0, 1.0], [2.0, 2.0]]), "not linearly independent"),
        (lambda: iv.ProjectOut([[1.0], [2.0]]), "not linearly independent"),
        (lambda: iv.ProjectOut([1.0, 0.0]).build(3), "vectors has 2 numbers, the vectors here have 3"),
        (lambda: iv.ProjectOut.fit(torch.randn(4, 3), torch.randn(4, 2)), "labels: expected classes"),
        (lambda: iv.ProjectOut(torch.full((2, 2), float("inf"))), "finite"),
    ],
)
def test_what_cannot_be_erased_is_said(make: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        make()


@pytest.mark.parametrize("make", [iv.ProjectOut, lambda v, mean: iv.Erase(v.T, v, mean)])
def test_a_mean_may_be_one_number_for_all_features(make: Any) -> None:
    directions, h = torch.eye(2, 5), torch.randn(3, 5)
    one, many = (make(directions, mean=mean).build(5) for mean in (1.5, [1.5] * 5))
    assert torch.equal(one(h), many(h))
    affine = one.affine()
    torch.testing.assert_close(h + (h @ affine.read.T) @ affine.write.T + affine.constant, many(h))

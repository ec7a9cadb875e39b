"""Effective rank: by hand, of planted gains, and of what was really written."""

import numpy as np
import pytest
import torch

import reftlab as rl
from reftlab.explaining.geometry.directions import find_directions
from reftlab.explaining.geometry.rank import effective_rank, rank_of
from reftlab.explaining.geometry.vectors import EditVectors
from reftlab.interventions import Affine
from tests.explaining.conftest import WIDTH, orthonormal, set_directions


def ranks(built, base, strength=1.0):
    with torch.no_grad():
        delta = strength * (built(base) - base)
    rows = torch.arange(len(base))
    vectors = EditVectors("e", base, delta, None, rows, torch.zeros_like(rows))
    return rank_of(find_directions(built, strength, vectors), vectors)


def by_hand(values):
    shares = np.asarray(values, dtype=float)
    shares = shares / shares.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_values_count_as_many_as_they_are(count):
    values = torch.cat([torch.full((count,), 2.5), torch.zeros(2)])
    assert effective_rank(values) == pytest.approx(count, abs=1e-9)


def test_unequal_values_give_the_exponential_of_their_entropy():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    assert effective_rank(values) == pytest.approx(by_hand(values), abs=1e-9)
    assert effective_rank(10 * values) == pytest.approx(effective_rank(values), abs=1e-9)
    assert effective_rank(torch.zeros(4)) == 0.0


def test_an_edit_of_planted_gains_has_their_effective_rank_whatever_its_numerical_one():
    built = rl.LoReFT(rank=4).build(WIDTH)
    gains = torch.tensor([5.0, 0.1, 0.1, 0.1])
    set_directions(built, orthonormal(4, 1), gains, orthonormal(4, 2), torch.zeros(4))
    found = ranks(built, torch.randn(60, WIDTH))
    assert found.numerical == 4
    assert found.linear == pytest.approx(by_hand(gains), abs=1e-3)
    assert 1.0 <= found.written < 1.6


def test_what_is_written_is_ranked_by_its_own_singular_values():
    built = rl.NoReFT(rank=3).build(WIDTH)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter))
    base = torch.randn(25, WIDTH)
    with torch.no_grad():
        delta = (built(base) - base).double().numpy()
    found = ranks(built, base)
    assert found.written == pytest.approx(by_hand(np.linalg.svd(delta)[1][:3]), rel=1e-3)
    centred = np.linalg.svd(delta - delta.mean(0))[1][:3]
    assert found.varying == pytest.approx(by_hand(centred), rel=1e-3)
    assert found.vectors == 25


def test_a_constant_edit_writes_one_dimension_that_does_not_vary():
    found = ranks(rl.Add(3 * orthonormal(1, 3)[0]).build(WIDTH), 50 * torch.randn(30, WIDTH))
    assert found.written == pytest.approx(1.0, abs=1e-6)
    assert found.varying == 0.0
    assert found.numerical == 0
    assert found.linear == 0.0


def test_directions_past_those_that_are_kept_count_too():
    class Wide(rl.Intervention):
        def setup(self, width):
            self.write, self.read = orthonormal(20, 5, width), orthonormal(20, 6, width)

        def forward(self, base, source=None):
            return base + base @ self.read.T @ self.write

        def affine(self):
            return Affine(self.write.T, self.read, torch.zeros(self.width))

    built = Wide().build(48)
    found = ranks(built, torch.randn(40, 48))
    assert found.numerical == 20
    assert found.linear == pytest.approx(20.0, abs=1e-3)


def test_the_rank_shows_itself():
    found = ranks(rl.LoReFT(rank=2).build(WIDTH), torch.randn(9, WIDTH))
    assert list(found.to_frame()["vectors"]) == [9]
    assert "effective rank" in repr(found)
    [axes] = found.plot().axes
    assert "singular value" in axes.get_xlabel()
    assert found._repr_html_().startswith("<p>")

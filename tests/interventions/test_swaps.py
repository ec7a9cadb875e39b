"""Swaps in rotated spaces, behind masks and along principal axes, against formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reftlab import InterventionError
from reftlab import interventions as iv
from tests.interventions.catalog import close, rotation
from tests.oracle import orthonormal

WIDTH = 6


def pair(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, WIDTH), torch.randn(n, WIDTH)


def by_rotation(base: Tensor, source: Tensor, basis: Tensor, mask: Any) -> Any:
    """Rotate both, mix the numbers, rotate back; float64."""
    h, s, q = base.double().numpy(), source.double().numpy(), basis.detach().double().numpy()
    mixed = (1 - mask) * (h @ q) + mask * (s @ q)
    return h - h @ q @ q.T + mixed @ q.T


def test_a_full_rotated_swap_is_the_source_and_a_partial_one_swaps_the_rotated_numbers() -> None:
    edit, (base, source) = iv.RotatedSwap().build(WIDTH), pair()
    close(edit(base, source), source)
    chosen = torch.tensor([True, False, True, False, False, True])
    basis = orthonormal(edit.basis.weight)
    expected = by_rotation(base, source, basis, chosen.double().numpy())
    close(edit.edited(base, source, subspace=chosen.expand(5, -1)), expected)


def test_a_low_rank_rotated_swap_swaps_inside_its_subspace_and_nowhere_else() -> None:
    edit, (base, source) = iv.RotatedSwap(2).build(WIDTH), pair()
    basis = orthonormal(edit.basis.weight)
    new = edit(base, source).detach()
    close(new, by_rotation(base, source, basis, 1.0))
    close(new @ basis.float(), source @ basis.float())
    assert sum(p.numel() for p in edit.parameters()) == 2 * WIDTH


def test_a_low_rank_swap_is_a_full_one_confined_to_as_many_directions() -> None:
    full, low, (base, source) = iv.RotatedSwap().build(WIDTH), iv.RotatedSwap(2).build(WIDTH), pair()
    with torch.no_grad():
        low.basis.weight.copy_(full.basis()[:, :2])
    chosen = torch.arange(WIDTH).expand(5, -1) < 2
    close(full.edited(base, source, subspace=chosen), low(base, source).detach())


def test_das_finds_the_direction_that_a_source_writes() -> None:
    hidden = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:, :1]
    edit = iv.RotatedSwap(1).build(WIDTH)
    optimiser = torch.optim.Adam(edit.parameters(), lr=0.05)
    for _ in range(200):
        base, source = pair(64)
        wanted = base + (source - base) @ hidden @ hidden.T
        optimiser.zero_grad()
        (edit(base, source) - wanted).square().mean().backward()
        optimiser.step()
    assert abs((edit.basis().T @ hidden).item()) > 0.999


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def boundary(share: float, temperature: float) -> Any:
    places = np.arange(WIDTH) + 0.5
    return sigmoid((share * WIDTH - places) / temperature)


@pytest.mark.parametrize("temperature", [5.0, 0.7, 0.05])
@pytest.mark.parametrize("raw", [-1.0, 0.0, 1.2])
def test_a_boundless_swap_mixes_up_to_its_boundary(temperature: float, raw: float) -> None:
    edit, (base, source) = iv.BoundlessSwap(temperature_start=temperature).build(WIDTH), pair()
    with torch.no_grad():
        edit.boundary.fill_(raw)
    mask = boundary(sigmoid(raw), temperature)
    close(edit.mask(), mask)
    close(edit(base, source), by_rotation(base, source, orthonormal(edit.basis.weight), mask))
    assert edit.learned_width == pytest.approx(sigmoid(raw) * WIDTH, rel=1e-6)
    chosen = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    expected = by_rotation(base, source, orthonormal(edit.basis.weight), mask * chosen.double().numpy())
    close(edit.edited(base, source, subspace=chosen.expand(5, -1)), expected)


def test_a_cold_boundary_swaps_whole_directions() -> None:
    edit = iv.BoundlessSwap().build(WIDTH)
    edit.schedule(1.0)
    assert edit.mask()[:3].min() > 0.99
    assert edit.mask()[3:].max() < 0.01


@pytest.mark.parametrize("planted", [2, 5])
def test_boundless_das_finds_the_planted_width(planted: int) -> None:
    hidden = torch.linalg.qr(torch.randn(8, 8)).Q[:, :planted]
    edit = iv.BoundlessSwap(temperature_start=2.0, sparsity=0.02).build(8)
    optimiser = torch.optim.Adam(edit.parameters(), lr=0.02)
    steps = 1000
    for step in range(steps):
        edit.schedule(step / steps)
        base, source = torch.randn(64, 8), torch.randn(64, 8)
        wanted = base + (source - base) @ hidden @ hidden.T
        optimiser.zero_grad()
        ((edit(base, source) - wanted).square().mean() + edit.penalty()).backward()
        optimiser.step()
    edit.schedule(1.0)
    assert round(edit.learned_width) == planted
    found = edit.basis().detach()[:, :planted]
    assert torch.linalg.svdvals(found.T @ hidden).min() > 0.99


@pytest.mark.parametrize("kind", [iv.BoundlessSwap, iv.MaskedSwap], ids=lambda kind: kind.__name__)
def test_a_temperature_falls_in_a_straight_line_and_is_saved(kind: Any) -> None:
    description = kind(temperature_start=8.0, temperature_end=2.0)
    edit = description.build(WIDTH)
    for progress, temperature in ((0.0, 8.0), (0.25, 6.5), (0.5, 5.0), (1.0, 2.0)):
        edit.schedule(progress)
        assert edit.temperature.item() == pytest.approx(temperature)
    again = description.build(WIDTH)
    again.load_state_dict(edit.state_dict())
    assert again.temperature.item() == 2.0
    with pytest.raises(InterventionError, match=r"progress=1\.5"):
        edit.schedule(1.5)


def test_a_masked_swap_mixes_features_or_rotated_numbers() -> None:
    base, source = pair()
    logits = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    mask = sigmoid(logits.double().numpy() / 0.5)
    for rotated in (False, True):
        edit = iv.MaskedSwap(rotated, temperature_start=0.5).build(WIDTH)
        with torch.no_grad():
            edit.logits.copy_(logits)
        basis = orthonormal(edit.basis.weight) if rotated else torch.eye(WIDTH)
        close(edit(base, source), by_rotation(base, source, basis, mask))


def test_penalties_are_the_sparsity_times_the_share_that_is_swapped() -> None:
    boundless, masked = iv.BoundlessSwap(sparsity=0.3).build(WIDTH), iv.MaskedSwap(sparsity=0.5).build(WIDTH)
    with torch.no_grad():
        boundless.boundary.fill_(1.0)
        masked.logits.copy_(torch.tensor([1.0, 0, 0, 0, 0, -2.0]))
    assert boundless.penalty().item() == pytest.approx(0.3 * sigmoid(1.0), rel=1e-6)
    expected = 0.5 * (sigmoid(1.0) + 4 * 0.5 + sigmoid(-2.0)) / 6
    assert masked.penalty().item() == pytest.approx(expected, rel=1e-6)
    (boundless.penalty() + masked.penalty()).backward()
    assert boundless.boundary.grad.item() == pytest.approx(0.3 * sigmoid(1.0) * sigmoid(-1.0), rel=1e-5)
    assert masked.logits.grad[0].item() == pytest.approx(0.5 * sigmoid(1.0) * sigmoid(-1.0) / 6, rel=1e-5)
    assert iv.MaskedSwap().build(WIDTH).penalty() is None
    assert iv.BoundlessSwap(sparsity=0).build(WIDTH).penalty() is None


def test_a_mask_learns_which_features_matter() -> None:
    edit = iv.MaskedSwap(sparsity=0.05).build(WIDTH)
    optimiser = torch.optim.Adam(edit.parameters(), lr=0.05)
    wanted_mask = torch.tensor([1.0, 0, 0, 1, 0, 0])
    for step in range(200):
        edit.schedule(step / 200)
        base, source = pair(32)
        optimiser.zero_grad()
        loss = (edit(base, source) - base - wanted_mask * (source - base)).square().mean()
        (loss + edit.penalty()).backward()
        optimiser.step()
    edit.schedule(1.0)
    close(edit.mask(), wanted_mask)


def test_a_pca_swap_is_the_rotation_written_out() -> None:
    base, source = pair()
    mean, scale = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    rows = rotation(WIDTH)
    edit = iv.PCASwap(rows, mean, scale).build(WIDTH)
    chosen = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    c, m, d = (t.double().numpy() for t in (rows, mean, scale))
    # pyvene's three steps, with all components: standardise and rotate, swap, rotate back.
    h, s = ((t.double().numpy() - m) / d @ c.T for t in (base, source))
    expected = np.where(chosen.numpy(), s, h) @ c * d + m
    close(edit.edited(base, source, subspace=chosen.expand(5, -1)), expected)
    close(edit(base, source), source)
    close(edit.coordinates(base), h)


def test_a_pca_swap_with_few_components_keeps_the_rest_of_the_base() -> None:
    base, source = pair()
    rows = rotation(2)
    new = iv.PCASwap(rows).build(WIDTH)(base, source)
    close(new, by_rotation(base, source, rows.T, 1.0))


@pytest.mark.parametrize("standardise", [False, True])
def test_components_are_the_directions_of_most_variance(standardise: bool) -> None:
    data = (torch.randn(400, WIDTH) * torch.tensor([5.0, 0.1, 3.0, 1.0, 0.2, 0.5])) @ rotation(WIDTH) + 3.0
    edit = iv.PCASwap.fit(data, 3, standardise=standardise)
    x = data.double().numpy()
    centred = (x - x.mean(0)) / (x.std(0) if standardise else 1.0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    expected = vectors[:, ::-1][:, :3]
    overlaps = np.abs(np.sum(edit.components.double().numpy().T * expected, axis=0))
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-5)
    close(edit.mean, x.mean(0))
    assert (edit.scale is not None) == standardise
    spread = edit.build(WIDTH).coordinates(data).double().var(0, correction=0)
    np.testing.assert_allclose(spread.numpy(), values[::-1][:3], rtol=1e-4)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: iv.RotatedSwap(0), "rank=0"),
        (lambda: iv.RotatedSwap(7).build(6), "rank=7 is more than the 6 features"),
        (lambda: iv.BoundlessSwap(temperature_end=0.0), r"temperature_end=0\.0"),
        (lambda: iv.BoundlessSwap(sparsity=-1), "sparsity=-1"),
        (lambda: iv.MaskedSwap("yes"), "rotated='yes'"),
        (lambda: iv.MaskedSwap(temperature_start=float("nan")), "temperature_start=nan"),
        (lambda: iv.PCASwap([[1.0, 1.0]]), "orthonormal rows"),
        (lambda: iv.PCASwap("up"), "components='up'"),
        (lambda: iv.PCASwap([[1.0, 0.0]], mean=[1.0]), "mean has 1 numbers"),
        (lambda: iv.PCASwap([[1.0, 0.0]], scale=[1.0, 0.0]), "scale has 0; expected numbers above 0"),
        (lambda: iv.PCASwap([[1.0, 0.0]]).build(3), "components has 2 numbers, the vectors here have 3"),
        (lambda: iv.PCASwap.fit(torch.randn(4, 3), 9), "components=9: 4 vectors of 3 numbers"),
        (lambda: iv.PCASwap.fit(torch.randn(1, 3)), "at least two vectors"),
        (lambda: iv.RotatedSwap().check_source(False), "RotatedSwap needs source="),
    ],
)
def test_what_cannot_be_swapped_is_said(make: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        make()

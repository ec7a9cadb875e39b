"""Each formula on numbers small enough to work out on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.interventions import intervention_types

H = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]])


def built(intervention: Any, **parameters: Any) -> Any:
    """The intervention for vectors of three numbers, with parameters set by hand."""
    made = intervention.build(3)
    with torch.no_grad():
        for name, values in parameters.items():
            made.get_parameter(name.replace("__", ".")).copy_(torch.tensor(values))
    return made


def approx(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)


# R has the rows e1 and e2; W reads the third number into the first amount and twice the first
# number into the second; b is (1, −1).
BASIS = {"basis__weight": [[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]}
LINEAR = {"linear__weight": [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]], "linear__bias": [1.0, -1.0]}


def test_loreft_replaces_the_vector_inside_its_subspace() -> None:
    # W h + b is (4, 1) and (5, −1); those numbers take the places of h1 and h2.
    approx(built(rl.LoReFT(2), **BASIS, **LINEAR)(H), [[4.0, 1.0, 3.0], [5.0, -1.0, 4.0]])


def test_loreft_at_half_scale_goes_half_the_way() -> None:
    approx(built(rl.LoReFT(2, scale=0.5), **BASIS, **LINEAR)(H), [[2.5, 1.5, 3.0], [2.5, -1.0, 4.0]])


def test_direft_adds_the_amounts_along_orthonormal_directions() -> None:
    approx(built(rl.DiReFT(2), **BASIS, **LINEAR)(H), [[5.0, 3.0, 3.0], [5.0, -2.0, 4.0]])


def test_noreft_uses_its_projection_as_it_is() -> None:
    # W2 = (0, 2, 0): h + W2ᵀ(W1 h + b − W2 h) with W1 h + b = h1 + h3 + 1.
    made = built(
        rl.NoReFT(1),
        projection__weight=[[0.0, 2.0, 0.0]],
        linear__weight=[[1.0, 0.0, 1.0]],
        linear__bias=[1.0],
    )
    approx(made(H), [[1.0, 2.0 + 2 * (5 - 4), 3.0], [0.0, -1.0 + 2 * (5 + 2), 4.0]])


def test_nodireft_is_the_papers_direft() -> None:
    made = built(
        rl.NodiReFT(1),
        projection__weight=[[0.0, 2.0, 1.0]],
        linear__weight=[[1.0, 0.0, 1.0]],
        linear__bias=[1.0],
    )
    approx(made(H), [[1.0, 12.0, 8.0], [0.0, 9.0, 9.0]])


def test_consreft_sets_constants_inside_its_subspace() -> None:
    approx(built(rl.ConsReFT(2), **BASIS, target=[7.0, -7.0])(H), [[7.0, -7.0, 3.0], [7.0, -7.0, 4.0]])


def test_lobireft_adds_constants_along_its_directions() -> None:
    approx(built(rl.LobiReFT(2), **BASIS, target=[7.0, -7.0])(H), [[8.0, -5.0, 3.0], [7.0, -8.0, 4.0]])


@pytest.mark.parametrize(
    ("activation", "of_minus_one", "of_four"),
    [
        (None, -1.0, 4.0),
        ("relu", 0.0, 4.0),
        ("tanh", math.tanh(-1), math.tanh(4)),
        ("sigmoid", 1 / (1 + math.e), 1 / (1 + math.exp(-4))),
        ("silu", -1 / (1 + math.e), 4 / (1 + math.exp(-4))),
        ("softplus", math.log(1 + math.exp(-1)), math.log(1 + math.exp(4))),
        ("gelu", -0.5 * (1 + math.erf(-1 / math.sqrt(2))), 2 * (1 + math.erf(4 / math.sqrt(2)))),
    ],
)
def test_an_activation_acts_on_what_is_written(activation: Any, of_minus_one: float, of_four: float) -> None:
    made = built(
        rl.NodiReFT(1, activation=activation, bias=False),
        projection__weight=[[1.0, 0.0, 0.0]], linear__weight=[[0.0, 1.0, 0.0]],
    )  # fmt: skip
    h = torch.tensor([[0.0, -1.0, 0.0], [0.0, 4.0, 0.0]])
    approx(made(h), [[of_minus_one, -1.0, 0.0], [of_four, 4.0, 0.0]])


def test_edits_without_parameters_do_what_they_are_called() -> None:
    other = torch.tensor([[10.0, 0.0, -1.0], [2.0, 2.0, 2.0]])
    vector = [1.0, 0.0, -1.0]
    approx(rl.Swap().build(3)(H, other), other.tolist())
    approx(rl.Zero().build(3)(H), [[0.0] * 3] * 2)
    approx(rl.Scale(-2).build(3)(H), [[-2.0, -4.0, -6.0], [0.0, 2.0, -8.0]])
    approx(rl.Add(vector).build(3)(H), [[2.0, 2.0, 2.0], [1.0, -1.0, 3.0]])
    approx(rl.Add(0.5).build(3)(H), [[1.5, 2.5, 3.5], [0.5, -0.5, 4.5]])
    approx(rl.Add().build(3)(H, other), [[11.0, 2.0, 2.0], [2.0, 1.0, 6.0]])
    approx(rl.Subtract(vector).build(3)(H), [[0.0, 2.0, 4.0], [-1.0, -1.0, 5.0]])
    approx(rl.Subtract().build(3)(H, other), [[-9.0, 2.0, 4.0], [-2.0, -3.0, 2.0]])
    approx(rl.Mean(vector).build(3)(H), [vector, vector])
    approx(rl.Mean().build(3)(H, other), other.tolist())
    approx(rl.Clamp(0, 2.5).build(3)(H), [[1.0, 2.0, 2.5], [0.0, 0.0, 2.5]])
    approx(rl.Clamp(low=1).build(3)(H), [[1.0, 2.0, 3.0], [1.0, 1.0, 4.0]])
    approx(rl.Clamp(high=1).build(3)(H), [[1.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
    approx(rl.Function(torch.square).build(3)(H), [[1.0, 4.0, 9.0], [0.0, 1.0, 16.0]])
    approx(rl.Function(torch.minimum).build(3)(H, other), [[1.0, 0.0, -1.0], [0.0, -1.0, 2.0]])


def test_noise_belongs_to_a_token_number_and_a_seed() -> None:
    base = torch.zeros(4, 2000)
    positions = torch.tensor([3, 0, 3, 7])
    noise = rl.Noise(std=0.5, seed=1).build(2000)(base, positions=positions)
    assert torch.equal(noise[0], noise[2])
    assert noise[0].sub(noise[1]).abs().mean() > 0.1
    assert abs(float(noise.std()) - 0.5) < 0.03
    assert abs(float(noise.mean())) < 0.03
    again = rl.Noise(std=0.5, seed=1).build(2000)(base[:1], positions=torch.tensor([3]))
    assert torch.equal(again[0], noise[0])
    other = rl.Noise(std=0.5, seed=2).build(2000)(base, positions=positions)
    assert other.sub(noise).abs().mean() > 0.1


def test_noise_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    rl.Noise(std=1.0).build(3)(H)
    assert torch.equal(torch.rand(3), expected)


LOW_RANK = (rl.LoReFT, rl.NoReFT, rl.DiReFT, rl.NodiReFT, rl.ConsReFT, rl.LobiReFT)
WITH_AFFINE: list[Any] = [
    *(cls(rank=2, scale=1.5) for cls in LOW_RANK), rl.LoReFT(2, bias=False), rl.NodiReFT(2, bias=False),
    rl.Zero(), rl.Scale(0.3), rl.Add([1.0, 2.0, -3.0]), rl.Add(2.0), rl.Subtract([1.0, 2.0, -3.0]),
    rl.Mean([1.0, 2.0, -3.0]), rl.Mean(0.5),
]  # fmt: skip


@pytest.mark.parametrize("intervention", WITH_AFFINE, ids=lambda made: made.describe())
def test_the_affine_form_says_what_forward_does(intervention: Any) -> None:
    made = intervention.build(3)
    affine = made.affine()
    by_affine = H + (H @ affine.read.T) @ affine.write.T + affine.constant
    torch.testing.assert_close(by_affine, made(H).detach(), rtol=1e-5, atol=1e-5)
    assert not any(t.requires_grad for t in (affine.write, affine.read, affine.constant))


@pytest.mark.parametrize(
    "intervention",
    [rl.LoReFT(2, activation="relu"), rl.Swap(), rl.Add(), rl.Mean(), rl.Clamp(0, 1), rl.Noise(1.0),
     rl.Function(torch.sin)],
    ids=lambda made: made.describe(),
)  # fmt: skip
def test_what_is_not_affine_has_no_affine_form(intervention: Any) -> None:
    assert intervention.build(3).affine() is None


@pytest.mark.parametrize(
    "name", [n for n, t in intervention_types().items() if t.__module__.startswith("reftlab.")]
)
def test_every_intervention_states_its_formula(name: str) -> None:
    made = intervention_types()[name]
    instance = made.__new__(made)
    nn.Module.__init__(instance)
    assert instance.formula
    assert len(instance.formula.splitlines()) == 1


def test_formulas_are_those_of_the_docstrings() -> None:
    assert rl.LoReFT(1).formula == "h + s Rᵀ(f(W h + b) − R h)"
    assert rl.NodiReFT(1).formula == "h + s W2ᵀ f(W1 h + b)"
    assert rl.Zero().formula == "0"


def test_every_intervention_of_the_issue_is_there() -> None:
    wanted = "LoReFT NoReFT DiReFT ConsReFT LobiReFT NodiReFT Swap Add Subtract Scale Zero Mean Noise Clamp Function"
    assert set(wanted.split()) <= set(intervention_types())
    assert all(hasattr(rl, name) for name in wanted.split())
    later = (
        "RotatedSwap BoundlessSwap MaskedSwap PCASwap SparseAutoencoder SAEEdit Erase ProjectOut Steer ReFTr1 "
        "Adapter Gated"
    )
    assert set(later.split()) <= set(intervention_types())

"""Orthonormal bases: they stay orthonormal, and are computed once a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab import InterventionError, OrthonormalBasis
from tests.models import batch_of
from tests.oracle import orthonormal

ORTHONORMAL = (rl.LoReFT, rl.DiReFT, rl.ConsReFT, rl.LobiReFT)


def deviation(basis: torch.Tensor) -> float:
    return float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())


@pytest.mark.parametrize("kind", ORTHONORMAL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_a_basis_stays_orthonormal_through_training(kind: Any, optimiser: Any) -> None:
    edit = kind(rank=4).build(16)
    optimizer = optimiser(edit.parameters(), lr=0.1)
    base, target = torch.randn(32, 16), torch.randn(32, 16)
    before = edit.basis().detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        (edit(base) - target).square().mean().backward()
        optimizer.step()
    assert deviation(edit.basis().detach()) < 1e-5
    assert (edit.basis().detach() - before).abs().max() > 1e-2


def test_a_basis_is_gram_schmidt_of_its_weight() -> None:
    basis = OrthonormalBasis(9, 4)
    with torch.no_grad():
        basis.weight.normal_()
    torch.testing.assert_close(basis().detach(), orthonormal(basis.weight), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_weight_are_those_of_a_plain_qr() -> None:
    basis = OrthonormalBasis(6, 3)
    goal = torch.randn(6, 3)
    (basis() * goal).sum().backward()
    weight = basis.weight.detach().clone().requires_grad_()
    q, r = torch.linalg.qr(weight)
    ((q * r.diagonal().sign()) * goal).sum().backward()
    torch.testing.assert_close(basis.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    assert weight.grad.abs().max() > 1e-2


def test_a_basis_is_computed_once_a_step_however_often_it_is_asked_for() -> None:
    basis = OrthonormalBasis(8, 2)
    optimizer = torch.optim.SGD(basis.parameters(), lr=0.1)
    for step in range(1, 6):
        loss = sum((basis() * number).sum() for number in range(4))
        assert basis.computed == step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_bound_model_computes_each_basis_once_a_training_step(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[0,2].output", positions="f1+l1", intervention=rl.LoReFT(2))
    )
    reft = graph.bind(llama)
    optimizer = torch.optim.SGD(reft.interventions.parameters(), lr=0.1)
    batch = batch_of((5, 3))
    for step in range(1, 4):
        optimizer.zero_grad()
        reft(**batch, labels=batch["input_ids"].masked_fill(torch.arange(5) < 2, -100)).loss.backward()
        optimizer.step()
        assert [built.basis.computed for built in reft.interventions.values()] == [step, step]


def test_a_generation_computes_each_basis_once(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[1].output", phase="both", intervention=rl.LoReFT(2))
    )
    reft = graph.bind(llama)
    reft.generate(**batch_of((5, 3), "left"), max_new_tokens=5, do_sample=False)
    assert reft.interventions["edit"].basis.computed == 1


def test_a_changed_weight_gives_another_basis() -> None:
    basis = OrthonormalBasis(8, 2)
    with torch.no_grad():
        first = basis().clone()
        basis.weight.normal_()
        assert (basis() - first).abs().max() > 1e-2
        basis.load_state_dict({"weight": first})
        torch.testing.assert_close(basis(), first)


def test_a_basis_computed_without_gradients_is_not_used_where_they_are_wanted() -> None:
    basis = OrthonormalBasis(8, 2)
    with torch.no_grad():
        assert not basis().requires_grad
    basis()[0, 0].backward()
    assert basis.weight.grad is not None


def test_a_basis_computed_in_inference_mode_does_not_reach_autograd() -> None:
    basis = OrthonormalBasis(8, 2).requires_grad_(False)
    with torch.inference_mode():
        basis()
    base = torch.randn(3, 8, requires_grad=True)
    (base @ basis()).sum().backward()
    assert base.grad is not None


def test_two_forward_passes_can_be_followed_by_two_backward_passes() -> None:
    edit = rl.LoReFT(2).build(8)
    base = torch.randn(3, 8)
    losses = []
    for _ in range(2):
        edit.prepare()
        losses.append(edit(base).square().sum())
    losses[0].backward()
    once = edit.basis.weight.grad.clone()
    losses[1].backward()
    torch.testing.assert_close(edit.basis.weight.grad, 2 * once)


def test_a_copy_has_a_basis_of_its_own() -> None:
    basis = OrthonormalBasis(8, 2)
    basis()
    other = copy.deepcopy(basis)
    with torch.no_grad():
        other.weight.normal_()
    assert (other() - basis()).abs().max() > 1e-2


def test_a_basis_is_float32_whatever_its_weight_is() -> None:
    basis = OrthonormalBasis(8, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = basis().detach()
    assert value.dtype == torch.float32
    assert deviation(value) < 1e-5


@pytest.mark.parametrize("rank", [0, -1, 9, True])
def test_a_rank_outside_the_space_is_refused(rank: Any) -> None:
    with pytest.raises(InterventionError, match="needs a rank from 1 to 8"):
        OrthonormalBasis(8, rank)

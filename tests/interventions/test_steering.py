"""Steering vectors, ReFT-r1, adapters and gates, on formulas worked out by hand or in float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reftlab import InterventionError
from reftlab import interventions as iv
from reftlab.interventions.passing import PassMean
from tests.interventions.catalog import close

WIDTH = 6


def test_steering_adds_a_multiple_of_the_vector_or_of_the_vectors_own_length() -> None:
    h, v = torch.tensor([[3.0, 4.0], [0.0, -1.0]]), [0.0, 2.0]
    close(iv.Steer(v, 1.5).build(2)(h), [[3.0, 7.0], [0.0, 2.0]])
    close(iv.Steer(v, -1.0, norm_matched=True).build(2)(h), [[3.0, -1.0], [0.0, -2.0]])


def test_a_norm_matched_edit_does_not_depend_on_the_scale_of_vectors() -> None:
    h, v = torch.randn(4, WIDTH), torch.randn(WIDTH)
    edit = iv.Steer(v, 0.3, norm_matched=True).build(WIDTH)
    close(edit(h * 50), edit(h) * 50)
    close(iv.Steer(v * 7, 0.3, norm_matched=True).build(WIDTH)(h), edit(h))


def test_a_steering_vector_is_the_difference_of_two_means() -> None:
    positive, negative = torch.randn(9, WIDTH), torch.randn(4, WIDTH)
    edit = iv.Steer.fit(positive, negative, 2.0)
    close(edit.vector, positive.double().mean(0) - negative.double().mean(0))
    assert edit.amount == 2.0


def test_affine_forms_of_steering_and_adapters_say_what_forward_does() -> None:
    h = torch.randn(4, WIDTH)
    straight = iv.Adapter(3, activation=None).build(WIDTH)
    torch.nn.init.normal_(straight.up.weight)
    torch.nn.init.normal_(straight.up.bias)
    steered, fixed = iv.Steer(torch.randn(WIDTH), 2.0).build(WIDTH), iv.ReFTr1(amount=2.0).build(WIDTH)
    for edit in (straight, steered, fixed):
        affine = edit.affine()
        by_affine = h + h @ affine.read.T @ affine.write.T + affine.constant
        torch.testing.assert_close(by_affine, edit(h).detach(), rtol=1e-5, atol=1e-5)
        assert not affine.write.requires_grad
    curved = (iv.Steer([1.0], norm_matched=True), iv.ReFTr1(), iv.Adapter(1), iv.Gated(iv.Zero()))
    assert all(edit.build(1).affine() is None for edit in curved)


def reft_r1(h: Any, w: Any, rows: list[int], k: int) -> tuple[Any, float]:
    """New vectors, and the mean detection outside the top k, row by row."""
    scores = np.maximum(h @ w, 0)
    new, outside = h.copy(), 0.0
    for row in set(rows):
        own = [i for i, r in enumerate(rows) if r == row]
        ranked = sorted(scores[own], reverse=True)
        new[own] += np.mean(ranked[:k]) * w
        outside += sum(ranked[k:])
    return new, outside / len(rows)


@pytest.mark.parametrize("k", [1, 2, 3, 20])
@pytest.mark.parametrize("rows", [[0, 0, 0, 0, 1, 1, 2], [2, 0, 1, 0, 2, 0, 2]])
def test_reft_r1_moves_a_rows_tokens_by_its_highest_detections(k: int, rows: list[int]) -> None:
    edit, h = iv.ReFTr1(k, sparsity=0.5).build(WIDTH), torch.randn(7, WIDTH)
    w = edit.basis.weight.detach().double().numpy()[:, 0]
    w /= np.linalg.norm(w)
    # The sign of a basis of one direction is that of its weight.
    close(edit.direction, w)
    close(edit.detect(h), np.maximum(h.double().numpy() @ w, 0))
    expected, outside = reft_r1(h.double().numpy(), w, rows, k)
    close(edit.edited(h, rows=torch.tensor(rows)), expected)
    assert edit.penalty().item() == pytest.approx(0.5 * outside, rel=1e-4, abs=1e-7)
    edit.schedule(0.25)
    assert edit.penalty().item() == pytest.approx(0.125 * outside, rel=1e-4, abs=1e-7)


def test_the_highest_detections_are_found_in_many_interleaved_rows() -> None:
    edit, h = iv.ReFTr1(3).build(WIDTH), torch.randn(3000, WIDTH)
    rows = torch.randint(0, 40, (3000,))
    expected, _ = reft_r1(h.double().numpy(), edit.direction.detach().double().numpy(), rows.tolist(), 3)
    close(edit.edited(h, rows=rows), expected)


def test_reft_r1_without_rows_takes_each_vector_by_itself() -> None:
    edit, h = iv.ReFTr1(2).build(WIDTH), torch.randn(5, WIDTH)
    torch.testing.assert_close(edit(h), h + edit.detect(h)[:, None] * edit.direction)
    assert edit.penalty() is None


def test_a_row_of_reft_r1_does_not_depend_on_the_others() -> None:
    edit, h = iv.ReFTr1(2).build(WIDTH), torch.randn(6, WIDTH)
    together = edit.edited(h, rows=torch.tensor([0, 0, 0, 4, 4, 4]))
    alone = edit.edited(h[3:], rows=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(together[3:], alone)


def test_reft_r1_steers_by_a_fixed_amount() -> None:
    edit, h = iv.ReFTr1(amount=4.0).build(WIDTH), torch.randn(3, WIDTH)
    close((edit(h) - h).norm(dim=1), [4.0] * 3)


def test_gradients_of_the_reft_r1_penalty_are_those_of_finite_differences() -> None:
    edit, h, rows = (
        iv.ReFTr1(1, sparsity=1.0).build(WIDTH),
        torch.randn(6, WIDTH),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )

    def measure() -> Tensor:
        edit.prepare()
        edit.edited(h, rows=rows)
        edit.finish()
        return edit.penalty()

    measure().backward()
    direction, step = torch.randn_like(edit.basis.weight), 1e-2
    with torch.no_grad():
        slope = 0.0
        for sign in (1, -1):
            edit.basis.weight += sign * step * direction
            slope += sign * measure().item() / (2 * step)
            edit.basis.weight -= sign * step * direction
    assert (edit.basis.weight.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-3)


def test_an_adapter_is_a_bottleneck_network_that_begins_as_nothing() -> None:
    edit, h = iv.Adapter(2).build(WIDTH), torch.randn(4, WIDTH)
    assert torch.equal(edit(h), h)
    assert sum(p.numel() for p in edit.parameters()) == 2 * 2 * WIDTH + 2 + WIDTH
    for parameter in edit.parameters():
        torch.nn.init.normal_(parameter)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in edit.parameters())
    x = h.double().numpy()
    close(edit(h), x + np.maximum(x @ w1.T + b1, 0) @ w2.T + b2)


def test_a_gate_opens_by_a_sigmoid_and_is_penalised_by_its_mean() -> None:
    gate = iv.SoftGate(2, sparsity=0.4)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([1.0, -2.0]))
        gate.bias.fill_(0.5)
    opened = [1 / (1 + math.exp(-x)) for x in (1.5, -1.5)]
    close(gate(torch.eye(2)), opened)
    assert gate.penalty().item() == pytest.approx(0.4 * sum(opened) / 2, rel=1e-6)
    gate.penalty().backward()
    assert gate.bias.grad.item() == pytest.approx(0.2 * sum(p * (1 - p) for p in opened), rel=1e-5)
    assert gate(torch.eye(2).bfloat16()).dtype == torch.float32
    shut = iv.SoftGate(2)
    shut(torch.eye(2))
    assert shut.penalty() is None
    assert iv.SoftGate(2, 1.0).penalty() is None


def test_a_penalty_is_of_all_calls_of_the_last_pass() -> None:
    mean = PassMean()
    mean.start_pass()
    for numbers in ([1.0, 2.0], [], [6.0]):
        mean.note(torch.tensor(numbers))
    mean.end_pass()
    assert mean.value().item() == 3.0
    mean.note(torch.tensor([5.0]))
    assert mean.value().item() == 5.0
    mean.start_pass()
    assert mean.value() is None


def test_preparing_an_edit_begins_a_new_penalty() -> None:
    edit = iv.Gated(iv.Zero(), sparsity=1.0).build(2)
    with torch.no_grad():
        edit.gate.weight.copy_(torch.tensor([100.0, 0.0]))
    open_one, shut_one = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    edit.prepare()
    edit(open_one)
    edit(shut_one)
    edit.finish()
    assert edit.penalty().item() == pytest.approx(0.5)
    edit.prepare()
    edit(shut_one)
    edit.finish()
    assert edit.penalty().item() == pytest.approx(0.0, abs=1e-6)


def test_an_edit_that_has_run_can_be_copied_and_pickled() -> None:
    edit, h = iv.Gated(iv.ReFTr1(1, sparsity=1.0), sparsity=1.0).build(WIDTH), torch.randn(4, WIDTH)
    edit.edited(h, rows=torch.zeros(4, dtype=torch.long))
    for twin in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        torch.testing.assert_close(twin(h), edit(h))


def test_a_gated_edit_goes_as_far_as_its_gate_opens() -> None:
    edit, h = iv.Gated(iv.LoReFT(2), sparsity=0.3).build(WIDTH), torch.randn(5, WIDTH)
    with torch.no_grad():
        edit.gate.weight.normal_()
        edit.gate.bias.normal_()
    opened = torch.sigmoid(h.double() @ edit.gate.weight.double() + edit.gate.bias.double()).detach()
    inner = edit.inner(h).double().detach()
    close(edit(h), h.double() + opened[:, None] * (inner - h.double()))
    assert edit.penalty().item() == pytest.approx(0.3 * opened.mean().item(), rel=1e-5)


def test_a_gated_edit_takes_and_hands_on_what_the_inner_one_does() -> None:
    swap = iv.Gated(iv.MaskedSwap(sparsity=0.2), sparsity=0.1).build(WIDTH)
    swap.prepare()
    swap(torch.randn(3, WIDTH), torch.randn(3, WIDTH))
    assert swap.penalty().item() == pytest.approx(0.1 * 0.5 + 0.2 * 0.5)
    swap.schedule(1.0)
    assert swap.inner.temperature.item() == pytest.approx(0.01)
    with pytest.raises(InterventionError, match="MaskedSwap needs source="):
        swap.check_source(False)
    noise = iv.Gated(iv.Noise(1.0)).build(WIDTH)
    assert noise.counts_positions
    positions, h = torch.tensor([4, 0, 4]), torch.zeros(3, WIDTH)
    moved = noise.edited(h, positions=positions)
    close(moved, 0.5 * iv.Noise(1.0).build(WIDTH)(h, positions=positions).double())
    assert iv.Gated(iv.Mean()).averages_source
    with pytest.raises(InterventionError, match="LoReFT takes no source"):
        iv.Gated(iv.LoReFT(1)).check_source(True)


def test_a_gate_learns_which_vectors_its_edit_is_for() -> None:
    edit = iv.Gated(iv.Add([0.0, 3.0]), sparsity=0.01).build(2)
    optimiser = torch.optim.Adam(edit.parameters(), lr=0.1)
    for _ in range(300):
        h = torch.randn(64, 2)
        wanted = h + torch.tensor([0.0, 3.0]) * (h[:, :1] > 0)
        optimiser.zero_grad()
        ((edit(h) - wanted).square().mean() + edit.penalty()).backward()
        optimiser.step()
    assert edit.gate(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).round().tolist() == [1.0, 0.0]


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: iv.Steer([0.0, 0.0]), "not all of them 0"),
        (lambda: iv.Steer(2.0), r"vector=2\.0"),
        (lambda: iv.Steer(None), "vector=None"),
        (lambda: iv.Steer([1.0], "far"), "amount='far'"),
        (lambda: iv.Steer([1.0], norm_matched=1), "norm_matched=1"),
        (lambda: iv.Steer([1.0]).build(2), "vector has 1 numbers, the vectors here have 2"),
        (
            lambda: iv.Steer.fit(torch.ones(2, 3), torch.ones(2, 4)),
            "positive vectors have 3 numbers, negative ones 4",
        ),
        (lambda: iv.Steer.fit(torch.ones(2, 3), torch.ones(5, 3)), "not all of them 0"),
        (lambda: iv.ReFTr1(0), "k=0"),
        (lambda: iv.ReFTr1(sparsity=-1), "sparsity=-1"),
        (lambda: iv.ReFTr1(amount="all"), "amount='all'"),
        (lambda: iv.ReFTr1().build(3).schedule(2), "progress=2"),
        (lambda: iv.Adapter(0), "bottleneck=0"),
        (lambda: iv.Adapter(2, "rellu"), r"activation='rellu'.*Did you mean 'relu'"),
        (lambda: iv.Gated(3), "inner=3: expected an intervention"),
        (lambda: iv.Gated(iv.Zero(), sparsity=None), "sparsity=None"),
        (lambda: iv.SoftGate(0), "width=0"),
        (lambda: iv.SoftGate(2, sparsity=-0.1), r"sparsity=-0\.1"),
    ],
)
def test_an_argument_of_steering_that_cannot_be_used_is_named(make: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        make()

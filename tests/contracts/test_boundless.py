"""Boundless alignment search finds how many directions a planted variable has, and which."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from tests.contracts.causal import align, interchange_accuracy
from tests.contracts.planted import Bits, Planted, decide, loss

# The shapes of tensors are checked at each call elsewhere; here it would be most of the training's time.
pytestmark = pytest.mark.usefixtures("users_call")

WIDTH, STEPS, LEARNING_RATE = 16, 300, 5e-2


def bound(net: Planted, intervention: rl.Intervention) -> rl.BoundModel:
    edit = rl.Edit("word", at="mix.output", intervention=intervention, source=rl.Read(run="source"))
    return rl.InterventionGraph(rl.Source("source"), edit).bind(net, example=torch.zeros(3, WIDTH))


@pytest.mark.parametrize("size", [4, 11])
def test_boundless_search_finds_the_planted_width(size: int) -> None:
    net, data = Planted(WIDTH, size), Bits(WIDTH, size)
    reft = bound(net, rl.BoundlessSwap(temperature_start=1.0, temperature_end=0.1, sparsity=0.1))
    swap: Any = reft.interventions["word"]
    held_out = data.draw(1000)
    assert abs(swap.learned_width - size) > 1
    assert interchange_accuracy(reft, held_out, decide) < 0.5
    align(reft, data.draw, loss, STEPS, LEARNING_RATE)
    assert abs(swap.learned_width - size) <= 1
    assert interchange_accuracy(reft, held_out, decide) >= 0.99
    # The cosines of the principal angles between the directions that are swapped and those planted.
    found = swap.basis().detach()[:, swap.mask().detach() > 0.5]
    assert torch.linalg.svdvals(found.T @ net.directions).min() > 0.99


def test_a_search_without_the_penalty_does_not_narrow_to_what_is_needed() -> None:
    """Where the answer asks for the whole vector, and nothing for few directions, all are swapped."""
    net, data = Planted(WIDTH, 4), Bits(WIDTH, 4)

    def whole() -> Any:
        examples = data.draw()
        labels = net(examples.sources["source"]) > 0
        return type(examples)(examples.base, examples.sources, labels)

    reft = bound(net, rl.BoundlessSwap(temperature_start=1.0, temperature_end=0.1, sparsity=0.0))
    swap: Any = reft.interventions["word"]
    align(reft, whole, loss, STEPS, LEARNING_RATE)
    assert swap.learned_width > WIDTH - 1
    assert interchange_accuracy(reft, whole(), decide) >= 0.99

"""Distributed alignment search finds variables of a known algorithm in networks that follow it.

Hierarchical equality: given four objects, is the first pair's being equal the same as the second's?
The algorithm has two variables in the middle, one for each pair. Geiger et al. (2023, arXiv:2303.02536),
section 4.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import reftlab as rl
from tests.contracts.causal import Examples, align, causal_model, interchange, interchange_accuracy, solve
from tests.contracts.planted import Bits, Planted
from tests.contracts.planted import decide as decide_bits
from tests.contracts.planted import loss as bits_loss

# The shapes of tensors are checked at each call elsewhere; here it would be most of the training's time.
pytestmark = pytest.mark.usefixtures("users_call")

OBJECTS, SHAPE, HIDDEN = 16, 4, 64
BATCH, STEPS, LEARNING_RATE = 64, 300, 3e-2
APART, MERGED = "[1].output", "[3].output"
"""Behind the first hidden layer the pairs are told apart; behind the second only the answer is left."""

EQUALITY = causal_model(
    left=lambda a, b: a == b,
    right=lambda c, d: c == d,
    answer=lambda left, right: (left == right).long(),
)


@functools.cache
def shapes() -> Tensor:
    """What the network sees of each object, `(object, number)`."""
    return torch.randn(OBJECTS, SHAPE, generator=torch.Generator().manual_seed(1))


def draw(count: int) -> Tensor:
    """Objects by number, `(count, 4)`; each pair is equal about half of the time."""
    objects = torch.randint(OBJECTS, (count, 4))
    for first in (0, 2):
        same = torch.rand(count) < 0.5
        objects[same, first + 1] = objects[same, first]
    return objects


def variables(objects: Tensor) -> dict[str, Tensor]:
    return dict(zip("abcd", objects.unbind(1), strict=True))


def seen(objects: Tensor) -> Tensor:
    return shapes()[objects].flatten(1)


def decide(answers: Tensor) -> Tensor:
    return answers.argmax(1)


@functools.cache
@torch.random.fork_rng(devices=[])
def equality_network() -> nn.Sequential:
    """A network of three hidden layers, trained on the task and on nothing else."""
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Linear(4 * SHAPE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2),
    )  # fmt: skip
    # Without decay it remembers pairs beside telling whether they are equal.
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1.0)
    steps = 1000
    for step in range(steps):
        objects = draw(512)
        loss = functional.cross_entropy(network(seen(objects)), solve(EQUALITY, variables(objects))["answer"])
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.requires_grad_(False)


def counterfactuals(count: int = BATCH, which: int | None = None) -> Examples:
    """Base inputs with the first pair's variable from one source, the second's from another, or both.

    Where a variable is not swapped its source is the base itself, so that the swap changes nothing.
    """
    base, left, right = draw(count), draw(count), draw(count)
    chosen = torch.randint(3, (count,)) if which is None else torch.full((count,), which)
    left = torch.where((chosen == 1)[:, None], base, left)
    right = torch.where((chosen == 0)[:, None], base, right)
    sources = {"left": variables(left), "right": variables(right)}
    labels = interchange(EQUALITY, variables(base), sources)["answer"]
    return Examples(seen(base), {"first": seen(left), "second": seen(right)}, labels)


def one_rotation(site: str, directions: int = 4) -> rl.BoundModel:
    """Two swaps in one low-rank rotation, of some directions for each pair's variable."""
    halves = {"left": ("first", range(directions)), "right": ("second", range(directions, 2 * directions))}
    edits = [
        rl.Edit(
            name, at=site, intervention=rl.RotatedSwap(rank=2 * directions), source=rl.Read(run=run),
            subspace=own, share="rotation",
        )
        for name, (run, own) in halves.items()
    ]  # fmt: skip
    graph = rl.InterventionGraph(rl.Source("first"), rl.Source("second"), *edits)
    return graph.bind(equality_network(), example=seen(draw(3)))


def test_the_causal_model_computes_interchanges() -> None:
    """(1, 1, 2, 3) has a left pair that is equal; with the right of (5, 6, 7, 7) both are."""
    base, source = (variables(torch.tensor([numbers])) for numbers in ([1, 1, 2, 3], [5, 6, 7, 7]))
    assert solve(EQUALITY, base)["answer"].tolist() == [0]
    assert interchange(EQUALITY, base, {"right": source})["answer"].tolist() == [1]
    assert interchange(EQUALITY, base, {"left": source})["answer"].tolist() == [1]
    assert interchange(EQUALITY, base, {"left": source, "right": source})["answer"].tolist() == [0]


def test_the_network_solves_the_task_on_every_input() -> None:
    every = torch.cartesian_prod(*[torch.arange(OBJECTS)] * 4)
    assert torch.equal(decide(equality_network()(seen(every))), solve(EQUALITY, variables(every))["answer"])


def test_alignment_search_finds_both_variables_of_hierarchical_equality() -> None:
    reft, held_out = one_rotation(APART), counterfactuals(1000)
    assert interchange_accuracy(reft, held_out, decide) < 0.8
    align(reft, counterfactuals, functional.cross_entropy, STEPS, LEARNING_RATE)
    for which in (0, 1, 2):
        assert interchange_accuracy(reft, counterfactuals(1000, which), decide) >= 0.99


def test_alignment_search_finds_nothing_where_the_variables_are_gone() -> None:
    """The same search with the same data behind the layer that has merged the two."""
    reft = one_rotation(MERGED)
    align(reft, counterfactuals, functional.cross_entropy, STEPS // 2, LEARNING_RATE)
    assert interchange_accuracy(reft, counterfactuals(1000), decide) < 0.9


def test_rows_of_one_batch_interchange_their_own_variables() -> None:
    """One full rotation, whose directions belong to two variables; every row swaps the one that it names."""
    half = HIDDEN // 2
    edit = rl.Edit(
        "pairs", at=APART, intervention=rl.RotatedSwap(), source=rl.Read(run="source"),
        tasks={"left": range(half), "right": range(half, HIDDEN)},
    )  # fmt: skip
    reft = rl.InterventionGraph(rl.Source("source"), edit).bind(equality_network(), example=seen(draw(3)))

    def examples(count: int = BATCH) -> Examples:
        base, source = draw(count), draw(count)
        left = torch.rand(count) < 0.5
        # A variable that keeps the base's value is not changed by being fixed to it.
        sources = {
            "left": variables(torch.where(left[:, None], source, base)),
            "right": variables(torch.where(left[:, None], base, source)),
        }
        labels = interchange(EQUALITY, variables(base), sources)["answer"]
        tasks = ["left" if own else "right" for own in left]
        return Examples(seen(base), {"source": seen(source)}, labels, {"tasks": tasks})

    held_out = examples(1000)
    assert interchange_accuracy(reft, held_out, decide) < 0.8
    align(reft, examples, functional.cross_entropy, STEPS, LEARNING_RATE)
    assert interchange_accuracy(reft, held_out, decide) >= 0.99
    # The tasks are what the directions are for: each row under the other task's fails.
    other = {"left": "right", "right": "left"}
    crossed = Examples(
        held_out.base,
        held_out.sources,
        held_out.labels,
        {"tasks": [other[t] for t in held_out.options["tasks"]]},
    )
    assert interchange_accuracy(reft, crossed, decide) < 0.8


@pytest.mark.parametrize("size", [3, 8])
def test_alignment_search_finds_the_planted_directions(size: int) -> None:
    width = 12
    net, data = Planted(width, size), Bits(width, size)
    edit = rl.Edit(
        "word", at="mix.output", intervention=rl.RotatedSwap(rank=size), source=rl.Read(run="source")
    )
    reft = rl.InterventionGraph(rl.Source("source"), edit).bind(net, example=torch.zeros(3, width))
    swap: Any = reft.interventions["word"]
    held_out = data.draw(1000)

    def cosines() -> Tensor:
        return torch.linalg.svdvals(swap.basis().detach().T @ net.directions)

    assert cosines().min() < 0.9
    assert interchange_accuracy(reft, held_out, decide_bits) < 0.5
    align(reft, data.draw, bits_loss, STEPS // 2, learning_rate=5e-2)
    assert cosines().min() > 0.999
    assert interchange_accuracy(reft, held_out, decide_bits) >= 0.99

"""Edits that share one intervention train it together; rows that choose directions train those alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import reftlab as rl
from tests.models import WIDTH, batch_of, build_model
from tests.oracle import assert_close, hooked, raw_blocks

LENGTHS, RANK, STEPS, RATE = (7, 7, 7), 2, 4, 0.02
FIRST, LAST = 0, 2
in_each_model = pytest.mark.parametrize("family", ["llama", "gpt2"])


def frozen(family: str) -> Any:
    return build_model(family).requires_grad_(False)


def numbers() -> dict[str, Tensor]:
    """Where training begins, by the names of NodiReFT's parameters: `h + W2ᵀ(W1 h + b)`."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"linear.weight": (RANK, WIDTH), "linear.bias": (RANK,), "projection.weight": (RANK, WIDTH)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loss_of(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, -1], torch.tensor([5, 6, 7]))


def by_hand(
    block: nn.Module, weights: dict[str, Tensor], keep: Tensor | None = None
) -> AbstractContextManager[None]:
    """The formula at every token behind a block, with plain tensors; `keep` `(row, 1, direction)`."""

    def change(h: Tensor) -> Tensor:
        amounts = h @ weights["linear.weight"].T + weights["linear.bias"]
        return h + (amounts if keep is None else amounts * keep) @ weights["projection.weight"]

    return hooked(block, change)


def descend(weights: list[Tensor], losses: Any) -> None:
    optimiser = torch.optim.SGD(weights, RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        losses().backward()
        optimiser.step()


@in_each_model
def test_linked_edits_at_several_layers_train_to_the_weights_of_one_used_twice(
    family: str, tmp_path: Any
) -> None:
    model, batch = frozen(family), batch_of(LENGTHS)
    graphs = (
        rl.InterventionGraph(
            rl.Edit("both", at=f"blocks[{FIRST},{LAST}].output", intervention=rl.NodiReFT(RANK), share="one")
        ),
        rl.InterventionGraph(
            rl.Edit("a", at=f"blocks[{FIRST}].output", intervention=rl.NodiReFT(RANK), share="one"),
            rl.Edit("b", at=f"blocks[{LAST}].output", intervention=rl.NodiReFT(RANK), share="one"),
        ),
    )
    expected = {name: value.clone().requires_grad_() for name, value in numbers().items()}
    with ExitStack() as stack:
        for block in (FIRST, LAST):
            stack.enter_context(by_hand(raw_blocks(model)[block], expected))
        descend(list(expected.values()), lambda: loss_of(model(**batch).logits))
    assert (expected["linear.weight"] - numbers()["linear.weight"]).abs().max() > 1e-3
    for graph in graphs:
        reft = graph.bind(model)
        reft.interventions["one"].load_state_dict(numbers())
        assert sum(p.numel() for p in reft.interventions.parameters()) == RANK * (2 * WIDTH + 1)
        descend(list(reft.interventions.parameters()), lambda reft=reft: loss_of(reft(**batch).logits))
        for name, value in expected.items():
            assert_close(reft.interventions["one"].state_dict()[name], value.detach())
        reft.save(tmp_path / graph.edits[0].name)
        again = rl.load(tmp_path / graph.edits[0].name, model)
        assert list(again.interventions) == ["one"]
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, reft(**batch).logits)


@in_each_model
def test_edits_that_are_not_linked_train_apart(family: str) -> None:
    """From the same beginning: the weights of two layers differ, as each layer's gradient does."""
    model, batch = frozen(family), batch_of(LENGTHS)
    reft = rl.InterventionGraph(
        rl.Edit("both", at=f"blocks[{FIRST},{LAST}].output", intervention=rl.NodiReFT(RANK))
    ).bind(model)
    for part in reft.interventions.values():
        part.load_state_dict(numbers())
    descend(list(reft.interventions.parameters()), lambda: loss_of(reft(**batch).logits))
    first, last = (part.state_dict()["linear.weight"] for part in reft.interventions.values())
    assert (first - last).abs().max() > 1e-3


@in_each_model
def test_rows_train_the_directions_that_they_chose_and_no_others(family: str) -> None:
    """Row 0 acts in direction 0, row 1 in neither, row 2 in both; the oracle has a mask in its formula."""
    model, batch, choices = frozen(family), batch_of(LENGTHS), [[0], [], [0, 1]]
    keep = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[1.0, 1.0]]])
    expected = {name: value.clone().requires_grad_() for name, value in numbers().items()}
    with by_hand(raw_blocks(model)[FIRST], expected, keep):
        logits = model(**batch).logits
    loss_of(logits).backward()
    reft = rl.InterventionGraph(
        rl.Edit("edit", at=f"blocks[{FIRST}].output", intervention=rl.NodiReFT(RANK))
    ).bind(model)
    built = reft.interventions["edit"]
    built.load_state_dict(numbers())
    got = reft(**batch, subspace=choices).logits
    loss_of(got).backward()
    assert_close(got.detach(), logits.detach())
    with torch.no_grad():
        assert torch.equal(got[1], model(**batch).logits[1])
    for name, parameter in built.named_parameters():
        assert_close(parameter.grad, expected[name].grad)
    built.zero_grad()
    loss_of(reft(**batch, subspace=[0]).logits).backward()
    for parameter in built.parameters():
        assert not parameter.grad[1].any()
        assert parameter.grad[0].abs().max() > 0

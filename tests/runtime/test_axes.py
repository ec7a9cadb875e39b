"""Sites whose axes are not (row, token, feature), and vectors of joined tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.runtime.axes import axes_of
from tests.models import WIDTH, batch_of
from tests.oracle import assert_close, columns_by_hand, hooked, orthonormal, randomise, raw_blocks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.line = nn.Conv1d(5, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.line(torch.relu(self.conv(image)).flatten(2)).mean(-1)


@torch.no_grad()
def test_feature_maps_are_tokens_in_raster_order() -> None:
    net, image = Net(), torch.randn(2, 3, 4, 6)
    vector = torch.arange(5.0)
    reft = rl.InterventionGraph(
        rl.Edit("pixel", at="conv.output", positions=[7, 23], intervention=rl.Add(vector))
    ).bind(net, example=image)
    maps = net.conv(image)
    maps[:, :, 1, 1] += vector
    maps[:, :, 3, 5] += vector
    assert_close(reft(image), net.line(torch.relu(maps).flatten(2)).mean(-1))
    read = reft.read("line.output @ [7]", image=image)["line.output @ [7]"]
    assert_close(read[:, 0], net.line(torch.relu(maps).flatten(2))[:, :, 7])


class Cells(nn.Module):
    """A recurrent cell called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, steps: Tensor) -> Tensor:
        state = steps.new_zeros(steps.shape[0], 6)
        for step in steps.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@torch.no_grad()
def test_the_calls_of_a_cell_are_time_steps() -> None:
    net, steps, other = Cells(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    states = []
    state = torch.zeros(2, 6)
    for step in other.unbind(1):
        state = net.cell(step, state)
        states.append(state)
    reft = rl.InterventionGraph().bind(net, example=steps)
    assert_close(reft.read("cell.output", steps=other)["cell.output @ all"], torch.stack(states, 1))
    swap = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "state", at="cell.output", positions=[2], intervention=rl.Swap(), source=rl.Read(run="other")
        ),
    ).bind(net, example=steps)
    state = states[2]
    for step in steps.unbind(1)[3:]:
        state = net.cell(step, state)
    assert_close(swap(steps, sources={"other": {"steps": other}}), net.head(state))
    every = rl.InterventionGraph(rl.Edit("all", at="cell.output", intervention=rl.Scale(0.5))).bind(
        net, example=steps
    )
    state = torch.zeros(2, 6)
    for step in steps.unbind(1):
        state = net.cell(step, state) * 0.5
    assert_close(every(steps), net.head(state))
    with pytest.raises(rl.PositionError, match="no meaning among generated"):
        rl.InterventionGraph(rl.Edit("x", at="cell.output", positions="[-1]", intervention=rl.Zero())).bind(
            net, example=steps
        )(steps)


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layers_time_axis_is_found(batch_first: bool) -> None:
    net = nn.GRU(3, 6, batch_first=batch_first)
    steps = torch.randn(2, 5, 3) if batch_first else torch.randn(5, 2, 3)
    reft = rl.InterventionGraph(
        rl.Edit("e", at="output[0]", positions=[1, 3], intervention=rl.Add(torch.ones(6)))
    ).bind(net, example=steps)
    expected = net(steps)[0]
    if batch_first:
        expected[:, [1, 3]] += 1
    else:
        expected[[1, 3]] += 1
    assert_close(reft(steps)[0], expected)


def test_axes_are_told_by_their_sizes() -> None:
    tokens, plain = {"tokens": 11, "decoder": 7}, nn.Linear(1, 1)
    for shape, given, stream in (
        ((2, 11, 8), "row token feature", "tokens"),
        ((2, 7, 8), "row token feature", "decoder"),
        ((2, 17, 8), "row token feature", "own"),
        ((11, 2, 8), "token row feature", "tokens"),
        ((22, 8), "(row token) feature", "tokens"),
        ((2, 8), "row feature", "row"),
        ((2, 11, 4, 8), "row token head feature", "tokens"),
        ((2, 4, 11, 8), "row head token feature", "tokens"),
        ((2, 4, 11, 11), "row head token key", "tokens"),
        ((2, 4, 6, 6), "row channel height width", "own"),
    ):
        found = axes_of(shape, plain, 2, tokens, 1)
        assert found is not None
        assert (found[0].given, found[1]) == (given, stream)
        tensor = torch.randn(shape)
        standard = found[0].arrange(tensor, 2)
        assert standard.shape[0] == 2
        assert standard.shape[-1] == found[0].width(shape)
        assert torch.equal(found[0].restore(standard, tensor), tensor)
    assert axes_of((3, 5, 8), plain, 2, tokens, 1) is None
    assert axes_of((5,), plain, 2, tokens, 1) is None


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [True, False])
def test_joined_tokens_are_one_vector(any_model: Any, side: str, cached: bool) -> None:
    batch = batch_of((7, 4, 9), side)
    reft = rl.InterventionGraph(
        rl.Edit("pair", at="blocks[1].output", positions="joined(last(2))", intervention=rl.LoReFT(rank=3))
    ).bind(any_model)
    randomise(reft)
    built = reft.interventions["pair"]
    assert built.linear.weight.shape == (3, 2 * WIDTH)
    r = orthonormal(built.basis.weight)
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-2:])

    def change(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 1:
            return hidden
        group = hidden.shape[0] // 3
        for row in range(hidden.shape[0]):
            a, b = columns[row // group]
            h = torch.cat([hidden[row, a], hidden[row, b]])
            h = h + (built.linear.weight @ h + built.linear.bias - h @ r) @ r.T
            hidden[row, a], hidden[row, b] = h[:WIDTH], h[WIDTH:]
        return hidden

    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "use_cache": cached}
    generates = any_model.can_generate() and side == "left"
    with hooked(raw_blocks(any_model)[1], change):
        expected = any_model(**batch).logits
        replies = any_model.generate(**batch, **options) if generates else None
    assert_close(reft(**batch).logits, expected)
    if replies is not None:
        assert torch.equal(reft.generate(**batch, **options), replies)


def test_rows_too_short_to_join_are_named(llama: Any) -> None:
    reft = rl.InterventionGraph(
        rl.Edit("pair", at="blocks[1].output", positions="joined(last(5))", intervention=rl.Scale(2.0))
    ).bind(llama)
    with pytest.raises(rl.PositionError, match=r"row 1.*joins 5 different tokens.*4 prompt tokens give 4"):
        reft(**batch_of((7, 4)))

"""What one call says of its edits, against the same rows run one by one and plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from tests.models import WIDTH, batch_of, row_of
from tests.oracle import (
    VECTOR,
    assert_close,
    columns_by_hand,
    hooked,
    loreft,
    plain_edit,
    randomise,
    raw_blocks,
)

LENGTHS = (7, 4, 9)
OTHER = VECTOR.flip(0) * 0.5
sides = pytest.mark.parametrize("side", ["left", "right"])


def two_tasks(model: Any) -> rl.BoundModel:
    return rl.InterventionGraph(
        rl.Edit("emoji", at="blocks[1].output", positions="last", intervention=rl.Add(VECTOR)),
        rl.Edit("formal", at="blocks[0].output", positions="first(2)", intervention=rl.Add(OTHER)),
    ).bind(model)


@torch.no_grad()
@sides
def test_rows_of_one_batch_carry_their_own_tasks(any_model: Any, side: str) -> None:
    batch, reft = batch_of(LENGTHS, side), two_tasks(any_model)
    got = reft(**batch, tasks=["emoji", None, "formal+emoji"]).logits
    alone = [
        reft.select("emoji")(**batch).logits[0],
        any_model(**batch).logits[1],
        reft(**batch).logits[2],
    ]
    for row, expected in enumerate(alone):
        assert_close(got[row], expected)
    assert_close(reft(**batch, tasks="formal").logits, reft.select("formal")(**batch).logits)
    assert torch.equal(reft(**batch, tasks=[None, None, None]).logits, any_model(**batch).logits)


@torch.no_grad()
def test_tasks_hold_with_beams_and_sampling(llama: Any) -> None:
    batch, reft = batch_of(LENGTHS, "left"), two_tasks(llama)
    tasks = ["emoji", None, "formal+emoji"]
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
    }
    got = reft.generate(**batch, tasks=tasks, **options)
    parts = [reft.select("emoji"), llama, reft]
    for row, part in enumerate(parts):
        assert torch.equal(
            got[2 * row : 2 * row + 2], part.generate(**batch, **options)[2 * row : 2 * row + 2]
        )
    torch.manual_seed(0)
    sampled = reft.generate(**batch, tasks=tasks, max_new_tokens=5, do_sample=True, top_k=4)
    torch.manual_seed(0)
    mask = batch["attention_mask"]
    ends = [c if row != 1 else [] for row, c in enumerate(columns_by_hand(mask, lambda real: real[-1:]))]
    starts = [c if row == 2 else [] for row, c in enumerate(columns_by_hand(mask, lambda real: real[:2]))]
    with (
        plain_edit(raw_blocks(llama)[1], mask, ends, lambda h, s, n: h + VECTOR),
        plain_edit(raw_blocks(llama)[0], mask, starts, lambda h, s, n: h + OTHER),
    ):
        expected = llama.generate(**batch, max_new_tokens=5, do_sample=True, top_k=4)
    assert torch.equal(sampled, expected)


@pytest.mark.usefixtures("users_call")
def test_unknown_tasks_edits_and_wrong_counts_are_refused(llama: Any) -> None:
    batch, reft = batch_of(LENGTHS), two_tasks(llama)
    for options, message in (
        ({"tasks": ["emojy", None, None]}, "no task 'emojy'.*Did you mean 'emoji'"),
        ({"tasks": ["emoji", None]}, "tasks has 2 entries and the batch 3 rows"),
        ({"tasks": [None, None]}, "tasks has 2 entries and the batch 3 rows"),
        ({"tasks": [3, None, None]}, "3 is no task"),
        ({"scale": {"emojy": 1.0}}, "no edit 'emojy'"),
        ({"scale": {"emoji": "big"}}, "expected a finite number"),
        ({"scale": {"emoji": [1.0, 2.0]}}, "scale.*2 entries and the batch 3 rows"),
        ({"select": ["x"]}, "no edit 'x'"),
        ({"subspace": [0]}, "no edit has a basis"),
        ({"subspace": {"emoji": [WIDTH]}}, f"numbered 0 to {WIDTH - 1}"),
        ({"subspace": {"emoji": "0"}}, "expected whole numbers"),
        ({"positions": {"emoji": "joined(last(2))"}}, "bound for vectors of 1 joined"),
        ({"positions": {"emoji": [[1], [2]]}}, "given for 2 rows, and the batch has 3"),
        ({"positions": {"emoji": [[1], [2], [9]]}}, "row 2: position 9"),
        ({"positions": {"emoji.source": "last"}}, "has no source"),
        ({"reads": {"emoji": torch.ones(WIDTH)}}, "no edit with a source"),
    ):
        with pytest.raises((rl.RunError, rl.PositionError), match=message):
            reft(**batch, **options)


@torch.no_grad()
@sides
def test_strengths_and_positions_are_chosen_row_by_row(any_model: Any, side: str) -> None:
    batch, reft = batch_of(LENGTHS, side), two_tasks(any_model).select("emoji")
    mask, rows = batch["attention_mask"], [[3], [0, 1], []]
    numbers = columns_by_hand(mask, lambda real: real)
    columns = [[own[n] for n in chosen] for own, chosen in zip(numbers, rows, strict=True)]
    factors = [0.5, 0.0, 1.0]
    hidden = torch.zeros(3, mask.shape[1], 1)
    for row, chosen in enumerate(columns):
        hidden[row, chosen] = factors[row]

    with hooked(raw_blocks(any_model)[1], lambda h: h + hidden * VECTOR):
        expected = any_model(**batch).logits
    got = reft(**batch, scale={"emoji": factors}, positions={"emoji": rows}).logits
    assert_close(got, expected)
    everywhere = reft(**batch, positions={"emoji": "all"}, scale={"emoji": 2.0}).logits
    with plain_edit(raw_blocks(any_model)[1], mask, numbers, lambda h, s, n: h + 2 * VECTOR):
        assert_close(everywhere, any_model(**batch).logits)


def with_loreft(model: Any, **options: Any) -> rl.BoundModel:
    edit = rl.Edit(
        "shared", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=4), **options
    )
    reft = rl.InterventionGraph(edit).bind(model)
    randomise(reft)
    return reft


@torch.no_grad()
def test_a_rows_subspace_touches_that_row_alone(any_model: Any) -> None:
    batch, reft = batch_of(LENGTHS), with_loreft(any_model)
    built, choices = reft.interventions["shared"], [[0, 2], None, []]
    got = reft(**batch, subspace=choices).logits
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-1:])
    block, mask = raw_blocks(any_model)[1], batch["attention_mask"]
    for row, chosen in enumerate(choices):
        with plain_edit(block, mask, columns, lambda h, s, n, chosen=chosen: loreft(built, h, chosen)):
            assert_close(got[row], any_model(**batch).logits[row])
    assert_close(
        with_loreft(any_model, subspace=[1, 3])(**batch).logits, reft(**batch, subspace=[1, 3]).logits
    )
    named = reft(**batch, subspace={"shared": [[0, 2], None, []]}).logits
    assert torch.equal(named, got)


@torch.no_grad()
def test_tasks_have_directions_of_one_basis_and_recombine(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    reft = with_loreft(llama, tasks={"emoji": [0, 1], "formal": [2, 3]})
    plain = with_loreft(llama)
    got = reft(**batch, tasks=["emoji", "formal+emoji", "formal"]).logits
    expected = plain(**batch, subspace=[[0, 1], [0, 1, 2, 3], [2, 3]]).logits
    assert_close(got, expected)
    assert_close(reft(**batch).logits, plain(**batch).logits)
    with pytest.raises(rl.RunError, match="says them twice"):
        reft(**batch, tasks="emoji", subspace=[0])


@torch.no_grad()
def test_a_subspace_of_features_swaps_those_alone(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "swap",
            at="blocks[1].output",
            positions="last",
            intervention=rl.Swap(),
            source=rl.Read(run="other"),
        ),
    )
    reft, batch, other = graph.bind(llama), batch_of(LENGTHS), batch_of(LENGTHS, seed=8)
    by_view = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "swap", at="blocks[1].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="other"),
            features=[0, 5],
        ),
    ).bind(llama)  # fmt: skip
    got = reft(**batch, sources={"other": other}, subspace={"swap": [[0, 5], None, []]}).logits
    assert_close(got[0], by_view(**batch, sources={"other": other}).logits[0])
    assert_close(got[1], reft(**batch, sources={"other": other}).logits[1])
    assert_close(got[2], llama(**batch).logits[2])


@torch.no_grad()
def test_mixed_tasks_equal_the_rows_one_by_one(llama: Any) -> None:
    batch, reft = batch_of(LENGTHS), two_tasks(llama)
    tasks = ["formal", "formal+emoji", "emoji"]
    mixed = reft(**batch, tasks=tasks).logits
    for row, task in enumerate(tasks):
        alone = reft(**row_of(batch, row), tasks=task).logits[0]
        assert_close(mixed[row, : len(alone)], alone, 1e-4)

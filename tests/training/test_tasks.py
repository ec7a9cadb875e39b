"""Training and evaluation of several tasks in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from tests.oracle import assert_close

ROWS = [
    rl.Example("where is the cat", "Paris", "place"),
    rl.Example("where is the dog", "London", "place"),
    rl.Example("who gave a book", "John", "person"),
    rl.Example("who said what", "Mary", "person"),
]


def in_one_basis(model: Any, tokenizer: Any) -> rl.BoundModel:
    torch.manual_seed(0)
    edit = rl.Edit(
        "shared", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=4),
        tasks={"place": [0, 1], "person": [2, 3]},
    )  # fmt: skip
    return rl.InterventionGraph(edit).bind(model, tokenizer)


def test_tasks_are_trained_into_their_own_directions(llama: Any, tokenizer: Any) -> None:
    reft = in_one_basis(llama, tokenizer)
    built = reft.interventions["shared"]
    before = built.linear.weight.detach().clone()
    rl.train(reft, [row for row in ROWS if row.task == "place"], epochs=3, learning_rate=1e-2, progress=False)
    moved = (built.linear.weight - before).abs().sum(dim=1)
    assert (moved[:2] > 0).all()
    assert (moved[2:] == 0).all()


def test_tasks_mixed_in_one_batch_are_learned_and_told_apart(llama: Any, tokenizer: Any) -> None:
    reft = in_one_basis(llama, tokenizer)
    before = rl.answer_loss(reft, ROWS)
    rl.train(reft, ROWS, epochs=40, learning_rate=2e-2, batch_size=4, progress=False)
    assert rl.answer_loss(reft, ROWS) < 0.75 * before
    crossed = [
        rl.Example(row.prompt, row.answer, {"place": "person", "person": "place"}[row.task]) for row in ROWS
    ]
    assert rl.answer_loss(reft, crossed) > rl.answer_loss(reft, ROWS) + 0.5
    assert_close(
        torch.tensor(rl.answer_loss(reft, ROWS[:2])),
        torch.tensor(rl.answer_loss(reft, crossed[:2], task="place")),
    )
    measured = rl.evaluate(reft, ROWS, max_new_tokens=2, batch_size=3)
    replies = [rl.reply(reft, row.prompt, tasks=row.task, max_new_tokens=2)[0] for row in ROWS]
    assert all(replies)
    assert [outcome.reply for outcome in measured.outcomes] == replies


def test_an_example_without_a_task_among_others_is_named(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="example 1, 'b', has no task"):
        rl.train(in_one_basis(llama, tokenizer), [rl.Example("a", "x", "place"), ("b", "y")], progress=False)
    with pytest.raises(rl.RunError, match=r"no task 'plaice'.*Did you mean 'place'"):
        rl.train(in_one_basis(llama, tokenizer), [rl.Example("the cat", "Paris", "plaice")], progress=False)

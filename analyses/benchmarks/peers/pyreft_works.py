"""pyreft 0.1.0 with its pinned transformers 4.45.1: training and a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyreft
import torch
from works import (
    BLOCK,
    FORWARD,
    MAP,
    RANK,
    READING,
    TASKS,
    WIDTH,
    Batch,
    Bench,
    Step,
    blocks_of,
    load,
    positions_of,
    prompts,
    stepper,
    tokens_to_read,
    trainings,
)

model, tokenizer = load()


def reft_model(blocks: list[int], rank: int = RANK) -> Any:
    one = {"component": "block_output", "low_rank_dimension": rank}
    make = lambda: pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=rank, dtype=torch.float32)  # noqa: E731
    config = pyreft.ReftConfig(
        representations=[{**one, "layer": block, "intervention": make()} for block in blocks]
    )
    return pyreft.get_reft_model(model, config)


def step(blocks: list[int], positions: slice, data: Batch, few_logits: bool) -> Step:
    """`few_logits` hands the model an argument for which pyreft's own trainer has no place."""
    reft = reft_model(blocks)
    inputs = {"input_ids": data.ids, "attention_mask": data.mask}
    labels = data.labels
    if few_logits:
        inputs["num_logits_to_keep"], labels = data.kept, labels[:, -data.kept :]
    tokens = list(range(positions.start, positions.stop))
    where = {"sources->base": (None, [[tokens] * len(data.ids)] * len(blocks))}

    def loss() -> torch.Tensor:
        _, output = reft(inputs, unit_locations=where, labels=labels, use_cache=False)
        return output.loss

    return stepper(loss, reft.get_trainable_parameters())


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    return lambda few_logits: step(blocks_of(work), positions_of(work, data), data, few_logits)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reft = reft_model([BLOCK])
    reft.eval()
    where = {"sources->base": (None, [[[127]] * len(ids)])}
    with torch.inference_mode():
        ways = {
            "bare": lambda: model(**inputs, use_cache=False),
            "one edit": lambda: reft(inputs, unit_locations=where, use_cache=False),
        }
        bench.time(FORWARD, ways, repeats=3)


def tasks(bench: Bench) -> None:
    """Its paper's means for several tasks in one batch, rows with subspaces of one edit of a higher rank."""
    ids = prompts()
    reft = reft_model([BLOCK], rank=8 * RANK)
    reft.eval()

    def edited(subspaces: list[list[int]]) -> torch.Tensor:
        where = {"sources->base": (None, [[[ids.shape[1] - 1]] * len(ids)])}
        _, output = reft(
            {"input_ids": ids, "num_logits_to_keep": 1}, unit_locations=where, subspaces=[subspaces]
        )
        return output.logits

    def attempt() -> None:
        with torch.inference_mode():
            own = edited([list(range(RANK * (row // 2), RANK * (row // 2 + 1))) for row in range(16)])
            first = edited([list(range(RANK))] * 16)
        if torch.equal(own, first):
            raise RuntimeError("rows with different subspaces get one and the same edit")

    bench.cannot(TASKS, "takes `subspaces` for each row, but its LoReFT ignores them", attempt)


if __name__ == "__main__":
    every = Bench.of("pyreft")
    every.lacks((MAP, READING), "only trains edits; patching and reading are pyvene's, below it")
    every.run(
        {
            **trainings(steps, "as its trainer calls it", checked=False),
            FORWARD: forward,
            TASKS: tasks,
        }
    )

"""nnsight: the formula by hand inside traces; cells and tasks as invokes of one trace."""

from __future__ import annotations

from collections.abc import Callable

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor
from works import (
    BLOCK,
    BLOCKS,
    CELLS_TIMED,
    FORWARD,
    GREEDY,
    MAP,
    READ_BLOCK,
    READING,
    TASKS,
    Batch,
    Bench,
    LoReFT,
    Step,
    blocks_of,
    cell_batches,
    ioi,
    labels_of,
    load,
    logit_difference,
    positions_of,
    prompts,
    rows_by_block,
    stepper,
    tokens_to_read,
    trainings,
)

bare, tokenizer = load()
model = TransformersModel(load()[0], tokenizer=tokenizer)


def step(blocks: list[int], positions: slice, data: Batch, few_logits: bool) -> Step:
    edits = {block: LoReFT() for block in blocks}
    more = {"use_cache": False} | labels_of(data, few_logits)

    def loss() -> Tensor:
        with model.trace(input_ids=data.ids, attention_mask=data.mask, **more):
            for block, edit in edits.items():
                hidden = model.model.layers[block].output
                new = hidden.clone()
                new[:, positions] = edit(hidden[:, positions])
                model.model.layers[block].output = new
            value = model.output.loss.save()
        return value

    return stepper(loss, [p for edit in edits.values() for p in edit.parameters()])


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    return lambda few_logits: step(blocks_of(work), positions_of(work, data), data, few_logits)


class Map:
    def __init__(self) -> None:
        self.clean, self.corrupt, self.answers = ioi(tokenizer)

    def values(self) -> list[Tensor]:
        with model.trace(self.clean, use_cache=False, logits_to_keep=1):
            values = nnsight.save([model.model.layers[block].output for block in range(BLOCKS)])
        return list(values)

    def cell(self, values: list[Tensor], block: int, token: int) -> Tensor:
        with model.trace(self.corrupt, use_cache=False, logits_to_keep=1):
            model.model.layers[block].output[:, token] = values[block][:, token]
            last = model.lm_head.output[:, -1].save()
        return logit_difference(last, self.answers)

    def invokes(self) -> Tensor:
        """An invoke for each cell, many in one trace."""
        values, maps = self.values(), []
        for some in cell_batches():
            with model.trace(use_cache=False, logits_to_keep=1) as tracer:
                lasts = nnsight.save([])
                for block, token in some:
                    with tracer.invoke(self.corrupt):
                        model.model.layers[block].output[:, token] = values[block][:, token]
                        lasts.append(model.lm_head.output[:, -1])
            maps.append(logit_difference(torch.cat(list(lasts)), self.answers))
        return torch.cat(maps)

    def rows(self) -> Tensor:
        """A row for each cell, many rows in one trace, edited block by block."""
        values, maps = self.values(), []
        for some in cell_batches():
            places = rows_by_block(some)
            with model.trace(self.corrupt.expand(len(some), -1), use_cache=False, logits_to_keep=1):
                for block, (rows, tokens) in places.items():
                    model.model.layers[block].output[rows, tokens] = values[block][0, tokens]
                last = model.lm_head.output[:, -1].save()
            maps.append(logit_difference(last, self.answers))
        return torch.cat(maps)


def patching(bench: Bench) -> None:
    with torch.inference_mode():
        grid = Map()
        ways = {"batched, an invoke per cell": grid.invokes, "batched, a row per cell": grid.rows}
        values = grid.values()
        some = lambda: [grid.cell(values, *cell) for cell in CELLS_TIMED]  # noqa: E731
        bench.time_map({"one trace per cell": some}, ways)


def reading(bench: Bench) -> None:
    ids = tokens_to_read()

    def read() -> Tensor:
        with model.trace(ids, use_cache=False) as tracer:
            hidden = model.model.layers[READ_BLOCK].output.save()
            tracer.stop()
        return hidden

    with torch.inference_mode():
        bench.time_reading(lambda: bare(ids, use_cache=False), "tracer.stop()", read)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    edit = LoReFT()

    def edited() -> Tensor:
        with model.trace(ids, use_cache=False):
            hidden = model.model.layers[BLOCK].output
            hidden[:, -1] = edit(hidden[:, -1])
            logits = model.output.logits.save()
        return logits

    with torch.inference_mode():
        ways = {"bare": lambda: bare(ids, use_cache=False), "one edit": edited}
        bench.time(FORWARD, ways, repeats=3)


def tasks(bench: Bench) -> None:
    """An invoke of two rows for each task, all in one trace; edits on the last prompt token."""
    ids = prompts()
    edits = [[LoReFT(8 * block + task) for block in range(BLOCKS)] for task in range(8)]

    def generate(numbers: list[int], blocks: list[int]) -> list[Tensor]:
        with model.generate(**GREEDY) as tracer:
            replies = nnsight.save([])
            for task in numbers:
                with tracer.invoke(ids[2 * task : 2 * task + 2]):
                    for block in blocks:
                        hidden = model.model.layers[block].output
                        hidden[:, -1] = edits[task][block](hidden[:, -1])
                    replies.append(tracer.result)
        return list(replies)

    every, mask = list(range(8)), torch.ones_like(ids)
    with torch.inference_mode():
        ways = {
            "bare batch": lambda: bare.generate(ids, attention_mask=mask, **GREEDY),
            "one batch, one block": lambda: generate(every, [BLOCK]),
        }
        bench.time(TASKS, ways, repeats=1, warm=0)


if __name__ == "__main__":
    Bench.of("nnsight").run(
        {
            **trainings(steps),
            MAP: patching,
            READING: reading,
            FORWARD: forward,
            TASKS: tasks,
        }
    )

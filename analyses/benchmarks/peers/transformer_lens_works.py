"""TransformerLens: the formula by hand in hooks of its bridge, its patching utility, `stop_at_layer`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching as tl_patching
from transformer_lens.model_bridge import TransformerBridge
from works import (
    BLOCK,
    BLOCKS,
    CELLS_TIMED,
    FORWARD,
    GREEDY,
    MAP,
    MODEL,
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
    lens_hooks,
    lens_site,
    load,
    logit_difference,
    positions_of,
    prompts,
    stepper,
    tokens_to_read,
    trainings,
)

bare, tokenizer = load()
model = TransformerBridge.boot_transformers(MODEL, hf_model=load()[0], tokenizer=tokenizer, device="cpu")
model.eval()


def hook(edit: LoReFT, positions: slice) -> Callable[..., Tensor]:
    def change(hidden: Tensor, hook: Any) -> Tensor:
        new = hidden.clone()
        new[:, positions] = edit(hidden[:, positions])
        return new

    return change


def step(blocks: list[int], positions: slice, data: Batch, few_logits: bool) -> Step:
    edits = [LoReFT() for _ in blocks]
    hooks = [(lens_site(block), hook(edit, positions)) for block, edit in zip(blocks, edits, strict=True)]
    more: dict[str, Any] = {"logits_to_keep": data.kept} if few_logits else {}
    target = data.labels[:, data.prompt :].flatten()

    def loss() -> Tensor:
        logits = model.run_with_hooks(
            data.ids, attention_mask=data.mask, fwd_hooks=hooks, use_cache=False, **more
        )
        answer = logits[:, -data.kept : -1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(answer, target)

    return stepper(loss, [p for edit in edits for p in edit.parameters()])


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    return lambda few_logits: step(blocks_of(work), positions_of(work, data), data, few_logits)


class Map:
    def __init__(self) -> None:
        self.clean, self.corrupt, self.answers = ioi(tokenizer)

    def cache(self) -> Any:
        names = [lens_site(block) for block in range(BLOCKS)]
        return model.run_with_cache(self.clean, names_filter=names, use_cache=False, logits_to_keep=1)[1]

    def utility(self, cache: Any, cells: list[tuple[int, int]]) -> Tensor:
        """What its `get_act_patch_resid_*` functions call, on some cells: one forward pass for each."""
        metric = lambda logits: logit_difference(logits[:, -1], self.answers)[0]  # noqa: E731
        return tl_patching.generic_activation_patch(
            model,
            self.corrupt,
            cache,
            metric,
            tl_patching.layer_pos_patch_setter,
            "resid_post",
            index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
        )

    def cell(self, cache: Any, block: int, token: int) -> Tensor:
        """The same by hand, logits of the last token only."""

        def patch(hidden: Tensor, hook: Any) -> Tensor:
            hidden[:, token] = cache[lens_site(block)][:, token]
            return hidden

        logits = model.run_with_hooks(
            self.corrupt, fwd_hooks=[(lens_site(block), patch)], use_cache=False, logits_to_keep=1
        )
        return logit_difference(logits[:, -1], self.answers)

    def rows(self) -> Tensor:
        """A row for each cell, many rows in one pass, by hand."""
        cache, maps = self.cache(), []
        for some in cell_batches():
            hooks = lens_hooks(some, cache)
            ids = self.corrupt.expand(len(some), -1)
            logits = model.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
            maps.append(logit_difference(logits[:, -1], self.answers))
        return torch.cat(maps)


def patching(bench: Bench) -> None:
    with torch.inference_mode():
        grid = Map()
        cache = grid.cache()
        ways = {
            "its patching utility": lambda: grid.utility(cache, list(CELLS_TIMED)),
            "one forward per cell, by hand": lambda: [grid.cell(cache, *cell) for cell in CELLS_TIMED],
        }
        bench.time_map(ways, {"batched, a row per cell, by hand": grid.rows})


def reading(bench: Bench) -> None:
    ids = tokens_to_read()
    read = lambda: model(ids, stop_at_layer=READ_BLOCK + 1, use_cache=False)  # noqa: E731
    with torch.inference_mode():
        bench.time_reading(lambda: bare(ids, use_cache=False), "stop_at_layer", read)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    hooks = [(lens_site(BLOCK), hook(LoReFT(), slice(-1, None)))]
    with torch.inference_mode():
        ways = {
            "bare": lambda: bare(ids, use_cache=False),
            "its model without hooks": lambda: model(ids, use_cache=False),
            "one edit": lambda: model.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False),
        }
        bench.time(FORWARD, ways, repeats=3)


def tasks(bench: Bench) -> None:
    """Hooks by hand that know which rows carry which task, on the last prompt token."""
    ids = prompts()
    options = {"max_new_tokens": 32, "do_sample": False, "stop_at_eos": False, "verbose": False}
    edits = [[LoReFT(8 * block + task) for block in range(BLOCKS)] for task in range(8)]

    def generate(rows: list[int], blocks: list[int]) -> Any:
        def change(block: int) -> Callable[..., Tensor]:
            def edit(hidden: Tensor, hook: Any) -> Tensor:
                if hidden.shape[1] == 1:  # a decoding step
                    return hidden
                for first in range(0, len(rows), 2):
                    part = hidden[first : first + 2, -1]
                    hidden[first : first + 2, -1] = edits[rows[first] // 2][block](part)
                return hidden

            return edit

        with model.hooks(fwd_hooks=[(lens_site(block), change(block)) for block in blocks]):
            return model.generate(ids[rows], **options)

    every, mask = list(range(16)), torch.ones_like(ids)
    with torch.inference_mode():
        ways = {
            "bare batch": lambda: bare.generate(ids, attention_mask=mask, **GREEDY),
            "one batch, one block": lambda: generate(every, [BLOCK]),
        }
        bench.time(TASKS, ways, repeats=1, warm=0)


if __name__ == "__main__":
    Bench.of("transformer_lens").run(
        {
            **trainings(steps, "all logits"),
            MAP: patching,
            READING: reading,
            FORWARD: forward,
            TASKS: tasks,
        }
    )

"""pyvene: LoReFT as an intervention of one's own, collected activations, interchange with given sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyvene as pv
import torch
from works import (
    BLOCK,
    BLOCKS,
    CELLS_TIMED,
    FORWARD,
    MAP,
    READ_BLOCK,
    READING,
    TASKS,
    Batch,
    Bench,
    LoReFT,
    Step,
    blocks_of,
    ioi,
    labels_of,
    load,
    logit_difference,
    positions_of,
    prompts,
    stepper,
    tokens_to_read,
    trainings,
)

model, tokenizer = load()


class LoreftIntervention(
    pv.SourcelessIntervention, pv.TrainableIntervention, pv.DistributedRepresentationIntervention
):
    """The formula in pyvene's clothes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, keep_last_dim=True)
        self.edit = LoReFT()

    def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
        return self.edit(base)


def intervenable(blocks: list[int], kind: Any, units: int = 1) -> Any:
    one = {"component": "block_output", "unit": "pos", "max_number_of_units": units}
    config = pv.IntervenableConfig([{**one, "layer": block} for block in blocks], intervention_types=kind)
    made = pv.IntervenableModel(config, model=model)
    made.disable_model_gradients()
    return made


def step(blocks: list[int], positions: slice, data: Batch, few_logits: bool) -> Step:
    made = intervenable(blocks, LoreftIntervention)
    inputs = {"input_ids": data.ids, "attention_mask": data.mask} | labels_of(data, few_logits)
    labels = inputs.pop("labels")
    tokens = list(range(positions.start, positions.stop))
    where = {"sources->base": (None, [[tokens] * len(data.ids)] * len(blocks))}

    def loss() -> torch.Tensor:
        _, output = made(inputs, unit_locations=where, labels=labels, use_cache=False)
        return output.loss

    return stepper(loss, made.get_trainable_parameters())


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    return lambda few_logits: step(blocks_of(work), positions_of(work, data), data, few_logits)


class Map:
    """Clean values at every block, and one intervenable model for each block."""

    def __init__(self) -> None:
        self.clean, self.corrupt, self.answers = ioi(tokenizer)
        self.everything = intervenable(list(range(BLOCKS)), pv.CollectIntervention, units=14)
        self.swaps = [intervenable([block], pv.VanillaIntervention) for block in range(BLOCKS)]

    def values(self) -> list[torch.Tensor]:
        tokens = list(range(14))
        where = {"base": [[tokens]] * BLOCKS}
        (_, collected), _ = self.everything({"input_ids": self.clean}, unit_locations=where, use_cache=False)
        return [value.reshape(14, -1) for value in collected]

    def cells(self, values: list[torch.Tensor], block: int, tokens: list[int]) -> torch.Tensor:
        """One call: a row for each token."""
        swap = self.swaps[block]
        where = [[[token] for token in tokens]]
        _, output = swap(
            {"input_ids": self.corrupt.expand(len(tokens), -1), "logits_to_keep": 1},
            unit_locations={"sources->base": (where, where)},
            source_representations={next(iter(swap.interventions)): values[block][tokens].unsqueeze(1)},
            use_cache=False,
        )
        return logit_difference(output.logits[:, -1], self.answers)

    def batched(self) -> torch.Tensor:
        values = self.values()
        return torch.stack([self.cells(values, block, list(range(14))) for block in range(BLOCKS)])


def patching(bench: Bench) -> None:
    with torch.inference_mode():
        grid = Map()
        values = grid.values()
        some = lambda: [grid.cells(values, block, [token]) for block, token in CELLS_TIMED]  # noqa: E731
        bench.time_map({"one call per cell": some}, {"14 cells a call (one block)": grid.batched})


def reading(bench: Bench) -> None:
    ids = tokens_to_read()
    made = intervenable([READ_BLOCK], pv.CollectIntervention, units=128)
    where = {"base": [[list(range(128))] * len(ids)]}
    inputs = {"input_ids": ids, "logits_to_keep": 1}

    def read() -> torch.Tensor:
        (_, collected), _ = made(inputs, unit_locations=where, use_cache=False)
        return collected[0]

    with torch.inference_mode():
        way = "CollectIntervention (cannot stop early; logits of the last token only)"
        bench.time_reading(lambda: model(ids, use_cache=False), way, read)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = intervenable([BLOCK], LoreftIntervention)
    made.eval()
    where = {"sources->base": (None, [[[127]] * len(ids)])}
    with torch.inference_mode():
        ways = {
            "bare": lambda: model(**inputs, use_cache=False),
            "one edit": lambda: made(inputs, unit_locations=where, use_cache=False),
        }
        bench.time(FORWARD, ways, repeats=3)


def tasks(bench: Bench) -> None:
    def attempt() -> None:
        made = intervenable([BLOCK, BLOCK], LoreftIntervention)
        ids = prompts()
        rows = [[[23]] * 2 + [None] * 14, [None] * 2 + [[23]] * 2 + [None] * 12]
        made.generate(
            {"input_ids": ids},
            unit_locations={"sources->base": (None, rows)},
            intervene_on_prompt=True,
            max_new_tokens=1,
        )

    bench.cannot(TASKS, "an intervention acts on every row of the batch", attempt)


if __name__ == "__main__":
    Bench.of("pyvene").run(
        {
            **trainings(steps),
            MAP: patching,
            READING: reading,
            FORWARD: forward,
            TASKS: tasks,
        }
    )

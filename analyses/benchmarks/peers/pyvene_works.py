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
    LONG,
    MAP,
    READ_BLOCK,
    READING,
    SHORT,
    TASKS,
    WIDE,
    Batch,
    Bench,
    LoReFT,
    batch,
    ioi,
    load,
    logit_difference,
    prompts,
    stepper,
    tokens_to_read,
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


def step(blocks: list[int], tokens: list[int], data: Batch, few_logits: bool) -> Callable[[], float]:
    made = intervenable(blocks, LoreftIntervention)
    inputs = {"input_ids": data.ids, "attention_mask": data.mask}
    labels = data.labels
    if few_logits:
        inputs["logits_to_keep"], labels = data.kept, labels[:, -data.kept :]
    where = {"sources->base": (None, [[tokens] * len(data.ids)] * len(blocks))}

    def loss() -> torch.Tensor:
        _, output = made(inputs, unit_locations=where, labels=labels, use_cache=False)
        return output.loss

    return stepper(loss, made.get_trainable_parameters())


def training(work: str, repeats: int) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        data = batch(work)
        blocks = list(range(BLOCKS)) if work == WIDE else [BLOCK]
        tokens = list(range(data.prompt - 7, data.prompt)) if work == WIDE else [data.last]
        ways = {"logits only where labelled": step(blocks, tokens, data, few_logits=True)}
        if work == SHORT:
            ways["labels given"] = step(blocks, tokens, data, few_logits=False)
        bench.check_losses(work, ways)
        bench.time(work, ways, repeats, warm=0)

    return do


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
        bench.time(MAP, {"one call per cell": some}, repeats=1, times=14, warm=0)
        ways = {"14 cells a call (one block)": grid.batched}
        for way, found in bench.time(MAP, ways, repeats=1, warm=0).items():
            bench.check(MAP, way, found)


def reading(bench: Bench) -> None:
    ids = tokens_to_read()
    made = intervenable([READ_BLOCK], pv.CollectIntervention, units=128)
    where = {"base": [[list(range(128))] * len(ids)]}
    inputs = {"input_ids": ids, "logits_to_keep": 1}

    def read() -> torch.Tensor:
        (_, collected), _ = made(inputs, unit_locations=where, use_cache=False)
        return collected[0]

    with torch.inference_mode():
        bench.check(READING, "read", read()[:, -1, :4])
        ways = {
            "full forward": lambda: model(ids, use_cache=False),
            "CollectIntervention (cannot stop early; logits of the last token only)": read,
        }
        bench.time(READING, ways, repeats=3)


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
            SHORT: training(SHORT, 3),
            LONG: training(LONG, 1),
            WIDE: training(WIDE, 1),
            MAP: patching,
            READING: reading,
            FORWARD: forward,
            TASKS: tasks,
        }
    )

"""adapters (AdapterHub): its LoReFT, on a sequence's first and last tokens; it knows no last prompt token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapters
import adapters.composition as ac
import torch
from works import (
    BLOCK,
    FORWARD,
    MAP,
    RANK,
    READING,
    TASKS,
    WIDE,
    Batch,
    Bench,
    Step,
    compare_forward,
    load,
    model_step,
    prompts,
    trainings,
)


def with_reft(layers: Any, tokens: int, names: tuple[str, ...] = ("edit",), training: bool = True) -> Any:
    """A fresh model whose last tokens are edited: nearest to the last prompt tokens, at the same cost."""
    model, _ = load()
    adapters.init(model)
    config = adapters.LoReftConfig(
        layers=layers, prefix_positions=0, suffix_positions=tokens, r=RANK, orthogonality=True, dropout=0.0
    )
    for name in names:
        model.add_adapter(name, config=config)
    if training:
        model.train_adapter(names[0])
    else:
        model.set_active_adapters(names[0])
    return model.eval()


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    model = with_reft("all", 7) if work == WIDE else with_reft([BLOCK], 1)
    return lambda few_logits: model_step(model, data, few_logits)


def forward(bench: Bench) -> None:
    compare_forward(bench, with_reft([BLOCK], 1, training=False))


def tasks(bench: Bench) -> None:
    """`BatchSplit` gives rows to adapters; its rows must say what calls of each adapter alone say."""
    names = tuple(f"task{number}" for number in range(8))
    model = with_reft([BLOCK], 1, names, training=False)
    for number, reft in enumerate(model.base_model.layers[BLOCK].reft_layer.refts.values()):
        for unit in reft.units:
            torch.nn.init.normal_(unit.learned_source.weight, generator=torch.Generator().manual_seed(number))
    ids = prompts()

    def attempt() -> None:
        with torch.inference_mode():
            model.set_active_adapters(ac.BatchSplit(*names, batch_sizes=[2] * 8))
            together = model(ids, use_cache=False, logits_to_keep=1).logits
            alone = []
            for number, name in enumerate(names):
                model.set_active_adapters(name)
                alone.append(
                    model(ids[2 * number : 2 * number + 2], use_cache=False, logits_to_keep=1).logits
                )
        wrong = (together - torch.cat(alone)).abs().amax(dim=(1, 2)) > 1e-2
        if wrong.any():
            raise RuntimeError(f"{int(wrong.sum())} of 16 rows do not get their own adapter's edit")

    bench.cannot(TASKS, "its BatchSplit does not reach LoReFT", attempt)


if __name__ == "__main__":
    every = Bench.of("adapters")
    every.lacks((MAP, READING), "adds adapters and trains them; has no call for reading or patching")
    every.run(
        {
            **trainings(steps, checked=False),
            FORWARD: forward,
            TASKS: tasks,
        }
    )

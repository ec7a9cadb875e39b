"""PEFT: LoRA of rank 4 on `o_proj`. A change of weights acts on every token; positions have no meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from works import (
    BLOCK,
    BLOCKS,
    FORWARD,
    GREEDY,
    MAP,
    RANK,
    READING,
    TASKS,
    Batch,
    Bench,
    Step,
    blocks_of,
    compare_forward,
    load,
    model_step,
    prompts,
    trainings,
)


def lora(blocks: list[int]) -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=["o_proj"],
        layers_to_transform=blocks,
        layers_pattern="layers",
        bias="none",
        init_lora_weights=False,
    )


def steps(work: str, data: Batch) -> Callable[[bool], Step]:
    model = get_peft_model(load()[0], lora(blocks_of(work)))
    return lambda few_logits: model_step(model, data, few_logits)


def forward(bench: Bench) -> None:
    compare_forward(bench, get_peft_model(load()[0], lora([BLOCK])).eval())


def tasks(bench: Bench) -> None:
    """Rows name their adapter; eight calls switch the active adapter instead."""
    ids = prompts()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [f"task{number}" for number in range(8)]
    of_row = [names[row // 2] for row in range(16)]
    bare, _ = load()

    def model_with(blocks: list[int]) -> Any:
        model = get_peft_model(load()[0], lora(blocks), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora(blocks))
        return model.eval()

    def eight(model: Any) -> None:
        for number, name in enumerate(names):
            model.set_adapter(name)
            part = {key: value[2 * number : 2 * number + 2] for key, value in inputs.items()}
            model.generate(**part, **GREEDY)

    one, all_blocks = model_with([BLOCK]), model_with(list(range(BLOCKS)))
    with torch.inference_mode():
        ways = {
            "bare batch": lambda: bare.generate(**inputs, **GREEDY),
            "one batch, one block": lambda: one.generate(**inputs, **GREEDY, adapter_names=of_row),
            "eight calls, one block": lambda: eight(one),
            "one batch, all blocks": lambda: all_blocks.generate(**inputs, **GREEDY, adapter_names=of_row),
        }
        bench.time(TASKS, ways, repeats=1, warm=0)


if __name__ == "__main__":
    every = Bench.of("peft")
    every.lacks((MAP, READING), "changes weights; has no call for reading or patching")
    every.run(
        {
            **trainings(steps, checked=False),
            FORWARD: forward,
            TASKS: tasks,
        }
    )

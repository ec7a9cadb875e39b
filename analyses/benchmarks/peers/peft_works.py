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
    LONG,
    MAP,
    RANK,
    READING,
    SHORT,
    TASKS,
    WIDE,
    Batch,
    Bench,
    batch,
    load,
    prompts,
    stepper,
    tokens_to_read,
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


def step(model: Any, data: Batch, few_logits: bool) -> Callable[[], float]:
    more: dict[str, Any] = {"labels": data.labels}
    if few_logits:
        more = {"labels": data.labels[:, -data.kept :], "logits_to_keep": data.kept}

    def loss() -> torch.Tensor:
        return model(input_ids=data.ids, attention_mask=data.mask, use_cache=False, **more).loss

    return stepper(loss, [p for p in model.parameters() if p.requires_grad])


def training(work: str, repeats: int) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        data = batch(work)
        model = get_peft_model(load()[0], lora(list(range(BLOCKS)) if work == WIDE else [BLOCK]))
        ways = {"logits only where labelled": step(model, data, few_logits=True)}
        if work == SHORT:
            ways["labels given"] = step(model, data, few_logits=False)
        bench.time(work, ways, repeats)

    return do


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare, _ = load()
    model = get_peft_model(load()[0], lora([BLOCK])).eval()
    with torch.inference_mode():
        ways = {
            "bare": lambda: bare(**inputs, use_cache=False),
            "one edit": lambda: model(**inputs, use_cache=False),
        }
        bench.time(FORWARD, ways, repeats=3)


def tasks(bench: Bench) -> None:
    """Rows name their adapter; eight calls switch the active adapter instead."""
    ids = prompts()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 2}
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
            model.generate(**part, **options)

    one, all_blocks = model_with([BLOCK]), model_with(list(range(BLOCKS)))
    with torch.inference_mode():
        ways = {
            "bare batch": lambda: bare.generate(**inputs, **options),
            "one batch, one block": lambda: one.generate(**inputs, **options, adapter_names=of_row),
            "eight calls, one block": lambda: eight(one),
            "one batch, all blocks": lambda: all_blocks.generate(**inputs, **options, adapter_names=of_row),
        }
        bench.time(TASKS, ways, repeats=1, warm=0)


def nothing(bench: Bench) -> None:
    for work in (MAP, READING):
        if work in bench.only:
            bench.cannot(work, "changes weights; has no call for reading or patching")


if __name__ == "__main__":
    every = Bench.of("peft")
    nothing(every)
    every.run(
        {
            SHORT: training(SHORT, 3),
            LONG: training(LONG, 1),
            WIDE: training(WIDE, 1),
            FORWARD: forward,
            TASKS: tasks,
        }
    )

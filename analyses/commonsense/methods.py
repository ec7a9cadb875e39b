"""What is trained: edits of several kinds and places, and LoRA at two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import reftlab as rl

__all__ = ["METHODS", "PROBED", "Adapters", "Edits", "bind", "nearest_lora", "trained_numbers"]

SECOND, LAST_TEN = "blocks[1::2].output", "blocks[-10:].output"


@dataclass(frozen=True)
class Edits:
    """Learned edits of the residual stream.

    Attributes:
        label: in words.
        kind: name of the intervention.
        rank: of each edit.
        at: their sites.
        positions: their tokens.
        learning_rate: highest one.
    """

    label: str
    kind: str
    rank: int
    at: str
    positions: str
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class Adapters:
    """LoRA on linear layers, by PEFT.

    Attributes:
        label: in words.
        modules: in which layers of each block.
        rank: of each; None for as many numbers as `as_many_as` has, as near as can be.
        as_many_as: name of the method to equal.
        dropout: of its inputs.
        learning_rate: highest one.
    """

    label: str
    modules: tuple[str, ...]
    rank: int | None
    as_many_as: str | None
    dropout: float
    learning_rate: float


PROBED = "loreft"
"""The method in the middle: each other edit differs from it in one thing."""

METHODS: dict[str, Edits | Adapters] = {
    PROBED: Edits("LoReFT rank 4, last token, every second block", "LoReFT", 4, SECOND, "last"),
    "loreft-rank16": Edits("… rank 16", "LoReFT", 16, SECOND, "last"),
    "loreft-f3l3": Edits("… first 3 and last 3 tokens", "LoReFT", 4, SECOND, "first(3)+last(3)"),
    "loreft-last10": Edits("… last ten blocks", "LoReFT", 4, LAST_TEN, "last"),
    "direft": Edits("… DiReFT (NodiReFT here)", "NodiReFT", 4, SECOND, "last"),
    "lora-equal": Adapters(
        "LoRA on q and v, as many numbers", ("q_proj", "v_proj"), None, PROBED, 0.0, 1e-3
    ),
    "lora-large": Adapters(
        "LoRA rank 32 on q, k, v, up and down",
        ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 32, None, 0.05, 3e-4,
    ),
}  # fmt: skip


def nearest_lora(numbers: int, sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Rank and number of blocks, counted from the last, that come nearest to so many trained numbers.

    Of equally near ones the one in most blocks.

    Args:
        numbers: how many.
        sizes: for each block, input plus output width of each layer that gets an adapter.

    >>> nearest_lora(40, [[4, 6]] * 3)
    (2, 2)
    """
    found = [
        (abs(rank * sum(map(sum, sizes[-count:])) - numbers), -count, rank)
        for count in range(1, len(sizes) + 1)
        for rank in range(1, 65)
    ]
    _, count, rank = min(found)
    return rank, -count


def bind(name: str, model: Any, tokenizer: Any, seed: int) -> tuple[Any, str]:
    """The method on a model, untrained, and what it is in figures.

    Args:
        name: of the method.
        model: a fresh one; LoRA changes it.
        tokenizer: its tokenizer.
        seed: of the first values.
    """
    method = METHODS[name]
    torch.manual_seed(seed)
    if isinstance(method, Edits):
        intervention = getattr(rl, method.kind)(rank=method.rank)
        edit = rl.Edit("answer", at=method.at, positions=method.positions, intervention=intervention)
        reft = rl.InterventionGraph(edit).bind(model, tokenizer)
        return reft, f"{len(reft.edits)} edits of rank {method.rank}"
    from peft import LoraConfig, get_peft_model

    blocks = model.config.num_hidden_layers
    rank, last = method.rank, blocks
    if method.as_many_as is not None:
        rank, last = nearest_lora(_edit_numbers(method.as_many_as, model), _sizes(model, method.modules))
    assert rank is not None
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=method.dropout, target_modules=list(method.modules),
        layers_to_transform=list(range(blocks - last, blocks)), task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    where = "all blocks" if last == blocks else f"the last {last} of {blocks} blocks"
    return rl.InterventionGraph().bind(wrapped, tokenizer), f"rank {rank} in {where}"


def trained_numbers(reft: Any) -> int:
    """How many numbers a training changes: those of the edits and of the model that require gradients."""
    parts = (reft.interventions, reft.model)
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def _edit_numbers(name: str, model: Any) -> int:
    method = METHODS[name]
    assert isinstance(method, Edits)
    # Edits leave the model as it is, so that it can be bound only to count.
    edit = rl.Edit(
        "count", at=method.at, positions=method.positions, intervention=rl.LoReFT(rank=method.rank)
    )
    reft = rl.InterventionGraph(edit).bind(model)
    return sum(p.numel() for p in reft.interventions.parameters() if p.requires_grad)


def _sizes(model: Any, modules: Sequence[str]) -> list[list[int]]:
    sizes: list[list[int]] = [[] for _ in range(model.config.num_hidden_layers)]
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in modules:
            block = next(int(part) for part in parts if part.isdigit())
            sizes[block].append(module.in_features + module.out_features)
    return sizes

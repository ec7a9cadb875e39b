"""One forward pass per cell with plain torch hooks, sharing nothing with reftlab's engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import VOCABULARY

CAUSAL = ("llama", "qwen3", "gemma3", "gpt2", "falcon_alibi", "bloom", "gpt_neox", "mixtral")
SHARED = 3
"""The first tokens that both prompts of `prompts` begin with."""


def blocks_of(model: Any) -> nn.ModuleList:
    kind = model.config.model_type
    if kind in ("gpt2", "falcon", "bloom"):
        return model.transformer.h
    if kind == "gpt_neox":
        return model.gpt_neox.layers
    if kind == "mamba":
        return model.backbone.layers
    return model.bert.encoder.layer if kind == "bert" else model.model.layers


def prompts(length: int = 11, seed: int = 0, rows: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Clean and corrupted prompts whose first tokens are the same."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(3, VOCABULARY, (2, rows, length), generator=generator)
    corrupt[:, :SHARED] = clean[:, :SHARED]
    return {"input_ids": clean}, {"input_ids": corrupt}


def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`(vocab,)` at the last token of a single row."""
    with torch.no_grad():
        return model(**inputs).logits[0, -1].float()


def main(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def instead(output: Any, new: Tensor) -> Any:
    return new if isinstance(output, Tensor) else (new, *output[1:])


@contextlib.contextmanager
def changing(module: nn.Module, side: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output, or its first argument, by what `change` makes of a copy."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return instead(output, change(main(output).clone()))

    def before(module: nn.Module, args: Any) -> Any:
        return (change(args[0].clone()), *args[1:])

    handle = (
        module.register_forward_hook(after) if side == "output" else module.register_forward_pre_hook(before)
    )
    try:
        yield
    finally:
        handle.remove()


def value_at(model: Any, module: nn.Module, side: str, inputs: dict[str, Tensor]) -> Tensor:
    """What a module returns or receives, `(1, token, width)`."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.clone())
        return tensor

    with changing(module, side, keep):
        last_logits(model, inputs)
    return kept[0]


def patched(
    model: Any,
    module: nn.Module,
    side: str,
    inputs: dict[str, Tensor],
    tokens: list[int],
    new: Tensor,
    features: slice = slice(None),
) -> Tensor:
    """Logits `(vocab,)` of one run with `new`, `(token, width)`, put in."""

    def put(tensor: Tensor) -> Tensor:
        tensor[0, tokens, features] = new.to(tensor)
        return tensor

    with changing(module, side, put):
        return last_logits(model, inputs)


def difference(logits: Tensor) -> Tensor:
    """A metric: the logit of token 7 minus that of token 9."""
    return logits[..., 7] - logits[..., 9]


def patched_map(
    model: Any,
    modules: list[nn.Module],
    side: str,
    base: dict[str, Tensor],
    source: dict[str, Tensor],
    features: slice = slice(None),
) -> Tensor:
    """The metric of one run for each module and token, `(module, token)`."""
    rows = []
    for module in modules:
        values = value_at(model, module, side, source)[0]
        length = base["input_ids"].shape[1]
        runs = [
            patched(model, module, side, base, [t], values[[t]][:, features], features) for t in range(length)
        ]
        rows.append(torch.stack([difference(run) for run in runs]))
    return torch.stack(rows)

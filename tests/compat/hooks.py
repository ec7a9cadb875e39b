"""Plain hooks, which know nothing of reftlab."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output by `change(output)` in every call."""

    def act(module: nn.Module, args: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        new = change(first.clone())
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(act)
    try:
        yield
    finally:
        handle.remove()


def outputs(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A module's output in a bare pass."""
    kept: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        kept.append(values)
        return values

    with torch.no_grad(), hooked(module, keep):
        model(**batch)
    return kept[0]

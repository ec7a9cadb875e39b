"""Training and eval mode, which each part of a model has for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["evaluating", "modes_kept", "saves_activations"]


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every submodule in the mode that it had, after a `with` block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside a `with` block, and as it was afterwards."""
    with modes_kept(module):
        module.eval()
        yield


def saves_activations(model: Any) -> bool:
    """Whether gradient checkpointing is on, by its name in newer and older versions of transformers."""
    newer = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if newer is None else newer)

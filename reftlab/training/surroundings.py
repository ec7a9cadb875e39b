"""What a training leaves as it was: the model, random numbers, notices, folders."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from reftlab.runtime import BoundModel
from reftlab.runtime.modes import modes_kept, saves_activations

__all__ = ["learning", "own_randomness", "quiet", "temporary_folder"]


@contextlib.contextmanager
def learning(reft: BoundModel, train_model: bool = False) -> Iterator[None]:
    """Freeze the model inside a `with` block, and restore it and the training mode afterwards.

    Args:
        reft: whose interventions learn.
        train_model: whether those of the model's parameters that require gradients learn too.
    """
    config: Any = getattr(reft.model, "config", None)
    caches = getattr(config, "use_cache", None)
    saving = saves_activations(reft.model)
    wanted = {parameter: parameter.requires_grad for parameter in reft.model.parameters()}
    try:
        for parameter in () if train_model else wanted:
            parameter.requires_grad_(False)
        with modes_kept(reft):
            yield
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        if caches is not None:
            config.use_cache = caches
        if not saving and saves_activations(reft.model):
            newer = getattr(reft.model, "activation_checkpointing_disable", None)
            (newer or reft.model.gradient_checkpointing_disable)()
            if hasattr(reft.model, "disable_input_require_grads"):
                reft.model.disable_input_require_grads()
        for parameter in reft.parameters() if train_model else reft.interventions.parameters():
            parameter.grad = None


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Seed inside a `with` block without changing the caller's random numbers."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices about its own defaults out of the user's way."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone after a `with` block."""
    with tempfile.TemporaryDirectory(prefix="reftlab-") as folder:
        yield Path(folder)

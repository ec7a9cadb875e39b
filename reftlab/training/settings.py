"""The arguments of a training, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainingArguments

from reftlab.errors import DataError, RunError, did_you_mean
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts

__all__ = ["check", "number", "whole"]

_OWN_NAMES = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "output_dir": "folder",
    "resume_from_checkpoint": "resume",
    "remove_unused_columns": "",
    "label_names": "",
    "disable_tqdm": "progress",
}
"""Arguments of `TrainingArguments` that `train` sets, with the names that they have there."""


def check(
    reft: BoundModel,
    options: Mapping[str, Any],
    folder: Any,
    resume: bool,
    arguments: Iterable[str],
    train_model: bool = False,
) -> None:
    """Refuse what cannot be trained, and arguments that `train` does not take.

    Args:
        reft: what is to be trained.
        options: further arguments for `TrainingArguments`.
        folder, resume: as for `train`.
        arguments: names of the arguments that `train` takes itself.
        train_model: as for `train`.

    Raises:
        DataError: an argument cannot be used.
        RunError: nothing can learn.
    """
    if not isinstance(reft, BoundModel):
        raise DataError(f"train takes a bound model, graph.bind(model, tokenizer), not {type(reft).__name__}")
    if reft.tokenizer is None:
        raise DataError("train needs a tokenizer: graph.bind(model, tokenizer)")
    if type(train_model) is not bool:
        raise DataError(f"train_model={train_model!r}: expected True or False")
    if train_model:
        _check_model(reft.model)
    elif not any(parameter.requires_grad for parameter in reft.interventions.parameters()):
        kinds = ", ".join(f"{e.name!r} ({type(e.intervention).__name__})" for e in reft.graph.edits) or "none"
        raise RunError(f"nothing to train: no edit has trainable numbers; the edits are {kinds}")
    if not continues_texts(reft.model):
        raise RunError(
            f"{type(reft.model).__name__} has no language-model loss; train needs a causal language model, "
            "such as AutoModelForCausalLM loads"
        )
    if not isinstance(folder, str | Path | None) or str(folder or ".") == "" or folder == "":
        raise DataError(f"folder={folder!r}: expected the path of a folder")
    if folder is not None and Path(folder).expanduser().is_file():
        raise DataError(f"folder={str(folder)!r} is a file; checkpoints need a folder")
    disabled = sorted(reft._disabled)
    if disabled:
        raise RunError(f"train inside reft.disabled(): {', '.join(map(repr, disabled))} cannot learn there")
    for name, own in _OWN_NAMES.items():
        if name in options:
            raise DataError(f"{name} is called {own} here" if own else f"{name} is reftlab's own matter")
    if resume and folder is None:
        raise DataError("resume=True needs the folder= that holds the checkpoints")
    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in options:
        if name not in known:
            raise DataError(
                f"train has no argument {name!r}, and neither has transformers.TrainingArguments."
                + did_you_mean(name, [*known, *arguments])
            )


def _check_model(model: nn.Module) -> None:
    """Refuse to train all of a model, or none of it, together with the edits."""
    learn = [parameter.requires_grad for parameter in model.parameters()]
    name = type(model).__name__
    if not any(learn):
        raise RunError(
            f"train_model=True: no parameter of {name} requires gradients; wrap the model with "
            "peft.get_peft_model, or leave train_model out"
        )
    if all(learn):
        raise RunError(
            f"train_model=True: every parameter of {name} requires gradients, so the whole model would be "
            "trained; freeze what is to stay as it is, or wrap the model with peft.get_peft_model"
        )


def number(name: str, value: Any, *, low: float, above: bool = False) -> float:
    """Check that an argument is a finite number of at least `low`, or `above` it."""
    value = value.item() if isinstance(value, np.generic) else value
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < low or (above and value == low):
        raise DataError(f"{name}={value!r}: expected a number {'above' if above else 'of at least'} {low:g}")
    return value


def whole(name: str, value: Any, low: int) -> int:
    """Check that an argument is a whole number of at least `low`."""
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) is not int or value < low:
        raise DataError(f"{name}={value!r}: expected a whole number of {low} or more")
    return value

"""Training the interventions of a bound model on (prompt, answer) pairs, with Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

import reftlab
from reftlab.errors import DataError, RunError, did_you_mean
from reftlab.runtime import BoundModel
from reftlab.runtime.saving import signature_of
from reftlab.training.checkpoints import (
    COMPLETE,
    digest,
    graph_digest,
    latest,
    load_interventions,
    plain,
    refuse_other_settings,
    save_interventions,
)
from reftlab.training.collate import Collator
from reftlab.training.data import Encoded, encode
from reftlab.training.loss import mean_loss, with_answers
from reftlab.training.replies import prompt_form
from reftlab.training.result import TrainResult, TrainStep

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["train"]


def train(
    reft: BoundModel,
    examples: Any,
    *,
    epochs: float = 10,
    learning_rate: float = 4e-3,
    batch_size: int = 8,
    evaluation: Any = None,
    chat: bool | None = None,
    system: str | None = None,
    side: Literal["left", "right"] = "right",
    max_length: int | None = None,
    warmup_steps: float = 0,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> TrainResult:
    """Train the interventions so that the model gives the answers; the model itself stays frozen.

    The loss is the cross-entropy of the answer's tokens. Optimiser AdamW, with Hugging Face's
    `Trainer` underneath.

    Args:
        reft: a bound model with a tokenizer; its interventions are trained in place.
        examples: (prompt, answer) pairs, see `reftlab.training.as_examples`.
        epochs: passes over the examples.
        learning_rate: highest learning rate.
        batch_size: rows in one step.
        evaluation: examples on which the answer loss is measured after every epoch.
        chat: whether prompts go through the tokenizer's chat template; if it has one unless given.
        system: system message, with the template only.
        side: where batches are padded; the result does not depend on it.
        max_length: refuse examples of more tokens.
        warmup_steps: steps of linear warm-up, or below 1 their share of all steps.
        schedule: what the learning rate does then: `linear` (to 0), `cosine`, `constant`, or any
            other `lr_scheduler_type` of transformers.
        weight_decay: of AdamW, on matrices.
        seed: of the order of examples and of dropout.
        folder: where to keep checkpoints, the last two, one an epoch unless options say otherwise;
            none are kept without it.
        resume: whether to go on from the newest whole checkpoint in `folder`, if there is one. The
            result is that of a training that was never interrupted.
        progress: whether to show a progress bar.
        callbacks: further `TrainerCallback`s.
        **options: further arguments of `TrainingArguments`, such as `gradient_accumulation_steps`.

    Returns:
        The history of the training. The settings are noted in `reft.facts["training"]`.

    Raises:
        DataError: an argument or an example that cannot be used.
        RunError: nothing is trainable, the model has no language-model loss, or the loss is no
            longer finite.

    >>> result = train(reft, [("What is the sea like?", "🌊🐠🐚")], epochs=30)  # doctest: +SKIP
    """
    _check(reft, options, folder, resume)
    epochs = _number("epochs", epochs, low=0.0, above=True)
    learning_rate = _number("learning_rate", learning_rate, low=0.0)
    weight_decay = _number("weight_decay", weight_decay, low=0.0)
    warmup_steps = _number("warmup_steps", warmup_steps, low=0.0)
    batch_size, seed = _whole("batch_size", batch_size, 1), _whole("seed", seed, 0)
    form = prompt_form(reft, reft.tokenizer, chat, system)
    collator = Collator.of(reft.tokenizer, side)

    def encoded_pairs(data: Any) -> list[Encoded]:
        return encode(reft.tokenizer, with_answers(data), max_length=max_length, **form)

    encoded = encoded_pairs(examples)
    held_out = None if evaluation is None else encoded_pairs(evaluation)
    settings: dict[str, Any] = {
        "examples": len(encoded),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "warmup_steps": warmup_steps,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "seed": seed,
        **form,
        **options,
    }
    identity = {
        **{name: plain(value) for name, value in settings.items()},
        "data": digest(encoded),
        "graph": graph_digest(reft.graph),
        "model": signature_of(reft.model)["fingerprint"],
    }
    home = None if folder is None else Path(folder).expanduser()
    checkpoint = latest(home) if resume and home is not None else None
    if home is not None and checkpoint is None and any(home.glob("checkpoint-*")):
        raise DataError(
            f"folder={str(folder)!r} holds checkpoints already; give resume=True to go on, or another folder"
        )
    if checkpoint is not None:
        refuse_other_settings(checkpoint, identity)
    with contextlib.ExitStack() as stack:
        where = home if home is not None else stack.enter_context(_temporary_folder())
        stack.enter_context(_only_interventions_learn(reft))
        stack.enter_context(_own_randomness(reft.device))
        stack.enter_context(_quiet())
        watcher = _Watcher(progress)
        stack.callback(watcher.close)
        arguments = _arguments(
            reft,
            where,
            {
                "num_train_epochs": epochs,
                "learning_rate": learning_rate,
                "per_device_train_batch_size": batch_size,
                "per_device_eval_batch_size": batch_size,
                "eval_strategy": "no" if held_out is None else "epoch",
                "warmup_steps": warmup_steps,
                "lr_scheduler_type": schedule,
                "weight_decay": weight_decay,
                "seed": seed,
                "save_strategy": "no" if folder is None else "epoch",
                **options,
            },
        )
        trainer = _Trainer(
            model=reft,
            args=arguments,
            train_dataset=encoded,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=[watcher, *(callbacks or [])],
            identity=identity,
        )
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
        for name, parameter in reft.interventions.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(
                    f"the training left numbers in {name} that are not finite; lower learning_rate={learning_rate:g}"
                )
    resumed = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    result = TrainResult(_history(trainer.state.log_history), trainer.state.global_step, seconds, resumed)
    reft.facts["training"] = {
        **{name: plain(value) for name, value in settings.items() if value is not None},
        "steps": result.steps,
        "loss": result.loss,
        **({} if result.evaluation_loss is None else {"evaluation_loss": result.evaluation_loss}),
        "seconds": round(seconds, 1),
        "reftlab": reftlab.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return result


class _Trainer(Trainer):
    """Hugging Face's Trainer, saving and loading only the interventions."""

    def __init__(self, *, identity: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.identity = identity
        self.remove_callback(PrinterCallback)
        # Whether the loss is averaged over accumulated batches is the inner model's matter.
        inner = self.model.model
        arguments = inspect.signature(inner.forward).parameters.values()
        open_ended = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
        self.model_accepts_loss_kwargs = getattr(inner, "accepts_loss_kwargs", open_ended)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the exact mean over all answer tokens, where the Trainer's own averages over batches."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        loss = mean_loss(self.model, data, self.data_collator, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_interventions(self.model.interventions, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Written last, so that a checkpoint that was cut short is told from a whole one.
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / COMPLETE).write_text(json.dumps(self.identity), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_interventions(self.model.interventions, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_interventions(self.model.interventions, Path(str(self.state.best_model_checkpoint)))


class _Watcher(TrainerCallback):
    """Shows a progress bar and stops a training whose loss is no longer a number."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}; lower learning_rate="
                f"{args.learning_rate:g}, or add warmup_steps"
            )
        self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=state.global_step == state.max_steps)


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


def _check(reft: BoundModel, options: Mapping[str, Any], folder: Any, resume: bool) -> None:
    if not isinstance(reft, BoundModel):
        raise DataError(f"train takes a bound model, graph.bind(model, tokenizer), not {type(reft).__name__}")
    if reft.tokenizer is None:
        raise DataError("train needs a tokenizer: graph.bind(model, tokenizer)")
    if not any(parameter.requires_grad for parameter in reft.interventions.parameters()):
        kinds = ", ".join(f"{e.name!r} ({type(e.intervention).__name__})" for e in reft.graph.edits) or "none"
        raise RunError(f"nothing to train: no edit has trainable numbers; the edits are {kinds}")
    if not getattr(reft.model, "can_generate", lambda: False)():
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
                + did_you_mean(name, [*known, *inspect.signature(train).parameters])
            )


def _number(name: str, value: Any, *, low: float, above: bool = False) -> float:
    """Check that an argument is a finite number of at least `low`, or `above` it."""
    value = value.item() if isinstance(value, np.generic) else value
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < low or (above and value == low):
        raise DataError(f"{name}={value!r}: expected a number {'above' if above else 'of at least'} {low:g}")
    return value


def _whole(name: str, value: Any, low: int) -> int:
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) is not int or value < low:
        raise DataError(f"{name}={value!r}: expected a whole number of {low} or more")
    return value


def _arguments(reft: BoundModel, folder: Path, settings: dict[str, Any]) -> TrainingArguments:
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            **{
                "logging_steps": 1,
                "logging_nan_inf_filter": False,
                "save_total_limit": 2,
                "report_to": "none",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "dataloader_pin_memory": reft.device.type == "cuda",
                "use_cpu": reft.device.type == "cpu",
                **settings,
            },
        )
    except (ValueError, TypeError) as error:
        raise DataError(f"these settings cannot be used for training: {error}") from error
    # Replicas of one process would share the hooks; several devices are for one process each.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _history(log: list[dict[str, float]]) -> tuple[TrainStep, ...]:
    entries: dict[int, dict[str, Any]] = {}
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    for line in log:
        found = {field: line[key] for key, field in names.items() if key in line}
        if "eval_loss" in line:
            found["evaluation_loss"] = line["eval_loss"]
        if found:
            entries.setdefault(int(line["step"]), {"epoch": line["epoch"]}).update(found)
    return tuple(TrainStep(step=step, **entry) for step, entry in sorted(entries.items()))


@contextlib.contextmanager
def _only_interventions_learn(reft: BoundModel) -> Iterator[None]:
    """Freeze the model inside a `with` block, and restore it and the training mode afterwards."""
    config = getattr(reft.model, "config", None)
    caches = getattr(config, "use_cache", None)
    saving = bool(getattr(reft.model, "is_gradient_checkpointing", False))
    wanted = {parameter: parameter.requires_grad for parameter in reft.model.parameters()}
    modes = {module: module.training for module in reft.modules()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        if caches is not None:
            config.use_cache = caches
        if not saving and getattr(reft.model, "is_gradient_checkpointing", False):
            reft.model.gradient_checkpointing_disable()
            if hasattr(reft.model, "disable_input_require_grads"):
                reft.model.disable_input_require_grads()
        for module, training in modes.items():
            module.training = training
        for parameter in reft.interventions.parameters():
            parameter.grad = None


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
    """Keep transformers' notices about its own defaults out of the user's way."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="reftlab-") as folder:
        yield Path(folder)

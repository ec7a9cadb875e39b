"""Training the interventions of a bound model on (prompt, answer) pairs, with Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import time
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import reftlab
from reftlab.errors import DataError, RunError
from reftlab.runtime import BoundModel
from reftlab.runtime.cone import ConeStore
from reftlab.runtime.saving import signature_of
from reftlab.training.checkpoints import (
    digest,
    graph_digest,
    latest,
    learning_in,
    plain,
    refuse_other_settings,
)
from reftlab.training.collate import Collator
from reftlab.training.data import Encoded, encode
from reftlab.training.edit_trainer import EditTrainer, Watcher
from reftlab.training.loss import with_answers
from reftlab.training.on_cone import prepare, runner_for, visits_all
from reftlab.training.replies import prompt_form
from reftlab.training.result import TrainResult, TrainStep
from reftlab.training.settings import check, number, whole
from reftlab.training.surroundings import (
    learning,
    own_randomness,
    quiet,
    temporary_folder,
)

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
    train_model: bool = False,
    cone: bool | ConeStore = True,
    progress: bool = True,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> TrainResult:
    """Train the interventions so that the model gives the answers; the model itself stays frozen.

    The loss is the cross-entropy of the answer's tokens, and the interventions' own penalties where
    they have some. Before each step the interventions learn how much of the training is done, for
    their temperatures. Optimiser AdamW, with Hugging Face's `Trainer` underneath.

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
        train_model: whether those of the model's own parameters that require gradients learn too, such
            as the LoRA of a model that PEFT has wrapped. They are not part of the artifact that
            `reft.save` writes; save them with `reft.model.save_pretrained`.
        cone: whether to run only the causal cone of the edits where that is exact: values that no edit
            can change are computed at an example's first visit and kept. `rl.ConeStore` says how many
            bytes they may take, in memory and in a file; what finds no room is computed each time.
            The result's `why_plain` says where everything had to run.
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
    check(reft, options, folder, resume, inspect.signature(train).parameters, train_model)
    epochs = number("epochs", epochs, low=0.0, above=True)
    learning_rate = number("learning_rate", learning_rate, low=0.0)
    weight_decay = number("weight_decay", weight_decay, low=0.0)
    warmup_steps = number("warmup_steps", warmup_steps, low=0.0)
    batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed, 0)
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
        **({"train_model": True} if train_model else {}),
        **form,
        **options,
    }
    if not isinstance(cone, bool | ConeStore):
        raise DataError(f"cone={cone!r}: expected True, False or an rl.ConeStore with budgets of its own")
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
        where = home if home is not None else stack.enter_context(temporary_folder())
        stack.enter_context(learning(reft, train_model))
        stack.enter_context(own_randomness(reft.device))
        stack.enter_context(quiet())
        watcher = Watcher(progress)
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
        runner, why_plain = runner_for(reft, cone, train_model=train_model, arguments=arguments)
        trainer = EditTrainer(
            model=reft,
            args=arguments,
            train_dataset=encoded,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=[watcher, *(callbacks or [])],
            identity=identity,
            runner=runner,
        )
        started = time.perf_counter()
        if runner is not None and visits_all(arguments, len(encoded)):
            reft.train()
            with trainer.accelerator.autocast():
                prepare(runner, encoded, collator, batch_size, progress)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
        learned = {**dict(reft.interventions.named_parameters()), **learning_in(reft.model)}
        for name, parameter in learned.items():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(
                    f"the training left numbers in {name} that are not finite; lower "
                    f"learning_rate={learning_rate:g}"
                )
    resumed = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    result = TrainResult(
        _history(trainer.state.log_history),
        trainer.state.global_step,
        seconds,
        resumed,
        trainer.on_cone,
        why_plain if runner is None else runner.why_plain,
    )
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
    names = {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "gradient_norm",
        "penalty": "penalty",
    }
    for line in log:
        found = {field: line[key] for key, field in names.items() if key in line}
        if "eval_loss" in line:
            found["evaluation_loss"] = line["eval_loss"]
        if found:
            entries.setdefault(int(line["step"]), {"epoch": line["epoch"]}).update(found)
    return tuple(TrainStep(step=step, **entry) for step, entry in sorted(entries.items()))

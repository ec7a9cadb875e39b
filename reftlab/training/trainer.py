"""Training the interventions of a bound model on (prompt, answer) pairs, with Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import reftlab
from reftlab.errors import DataError, RunError
from reftlab.interventions import Intervention, SoftGate
from reftlab.runtime import BoundModel
from reftlab.runtime.saving import signature_of
from reftlab.runtime.wrapped import is_dispatched
from reftlab.training.checkpoints import (
    COMPLETE,
    digest,
    graph_digest,
    latest,
    learning_in,
    load_learned,
    plain,
    refuse_other_settings,
    save_learned,
)
from reftlab.training.collate import Collator
from reftlab.training.data import Encoded, encode
from reftlab.training.loss import mean_loss, with_answers
from reftlab.training.replies import prompt_form
from reftlab.training.result import TrainResult, TrainStep
from reftlab.training.settings import check, number, whole
from reftlab.training.surroundings import (
    learning,
    own_randomness,
    quiet,
    temporary_folder,
)

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
    train_model: bool = False,
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
        learned = {**dict(reft.interventions.named_parameters()), **learning_in(reft.model)}
        for name, parameter in learned.items():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(
                    f"the training left numbers in {name} that are not finite; lower "
                    f"learning_rate={learning_rate:g}"
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
        self.penalties: Any = 0.0
        self.logged_at: int | None = None
        self.remove_callback(PrinterCallback)
        if is_dispatched(self.model):
            self.accelerator.device_placement = False
        # Whether the loss is averaged over accumulated batches is the inner model's matter.
        inner = self.model.model
        arguments = inspect.signature(inner.forward).parameters.values()
        open_ended = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
        self.model_accepts_loss_kwargs = getattr(inner, "accepts_loss_kwargs", open_ended)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The answer loss of a batch and the penalties of its pass."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = [part.penalty() for part in _parts(self.model)]
        penalties = [term.to(loss) for term in terms if term is not None]
        if penalties:
            penalty = torch.stack(penalties).sum()
            batches = self.current_gradient_accumulation_steps
            # Divided by all accumulated answers already, the loss is not divided by the batches later.
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + (penalty / batches if scaled else penalty)
            self.penalties = self.penalties + penalty.detach() / batches
            if self.logged_at is None:
                self.logged_at = self.state.global_step
        if not loss.requires_grad:
            # Nothing that learns acted on this batch: its condition was false, or its task has no numbers.
            loss = loss + sum(0.0 * p.sum() for p in self.model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the answer loss under its name, and the mean penalty of a step apart from it."""
        if "loss" in logs and self.logged_at is not None:
            penalty = float(self.penalties) / max(self.state.global_step - self.logged_at, 1)
            logs = {**logs, "loss": logs["loss"] - penalty, "penalty": penalty}
            self.penalties, self.logged_at = 0.0, self.state.global_step
        super().log(logs, start_time)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model, unless its parts are on several devices or on disk already."""
        if not is_dispatched(model):
            super()._move_model_to_device(model, device)

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
        save_learned(self.model, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Written last, so that a checkpoint that was cut short is told from a whole one.
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / COMPLETE).write_text(json.dumps(self.identity), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_learned(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_learned(self.model, Path(str(self.state.best_model_checkpoint)))


class _Watcher(TrainerCallback):
    """Shows a progress bar, tells interventions how far it is, and stops on a loss that is no number."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        _tell_progress(kwargs["model"], state)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the end of a step, so that checkpoints and evaluations are as the next step finds them.
        _tell_progress(kwargs["model"], state)
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


def _parts(reft: BoundModel) -> list[Intervention | SoftGate]:
    """The bound model's interventions and gates; one that stands under several names is there once."""
    found = {id(part): part for part in reft.interventions.values()}
    return [part for part in found.values() if isinstance(part, Intervention | SoftGate)]


def _tell_progress(reft: BoundModel, state: Any) -> None:
    for part in _parts(reft):
        if isinstance(part, Intervention):
            part.schedule(min(state.global_step / max(state.max_steps, 1), 1.0))


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

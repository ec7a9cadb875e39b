"""Hugging Face's Trainer for edits: what it computes, what it keeps, and what it shows."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from reftlab.errors import RunError
from reftlab.interventions import Intervention, SoftGate
from reftlab.runtime import BoundModel
from reftlab.runtime.cone import ConeRunner
from reftlab.runtime.wrapped import is_dispatched
from reftlab.training.checkpoints import COMPLETE, load_learned, save_learned
from reftlab.training.loss import mean_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["EditTrainer", "Watcher"]


class EditTrainer(Trainer):
    """Hugging Face's Trainer, saving and loading only the interventions.

    Args:
        identity: what a checkpoint must share with a training that goes on from it.
        runner: runs batches on the cone of the edits, or None where everything is to run.
        **kwargs: as for `Trainer`.
    """

    def __init__(self, *, identity: Mapping[str, Any], runner: ConeRunner | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.identity, self.runner = identity, runner
        self.on_cone = 0
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
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        loss, outputs = None, None
        if self.runner is not None:
            # What accelerate puts around the bound model's forward, which the runner does not call.
            with self.accelerator.autocast():
                loss = self.runner.loss(inputs, items)
        if loss is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            self.on_cone += 1
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
        with self.accelerator.autocast():
            rows = self.args.per_device_eval_batch_size
            loss = mean_loss(self.model, data, self.data_collator, rows, self.runner)
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


class Watcher(TrainerCallback):
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

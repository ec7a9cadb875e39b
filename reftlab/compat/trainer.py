"""pyreft's trainers: Hugging Face's `Trainer` over a `ReftModel`. Natively `rl.train(reft, examples)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from reftlab.compat.model import IntervenableModel
from reftlab.errors import ConfigError, DataError

__all__ = ["ReftTrainer", "ReftTrainerForCausalLM", "ReftTrainerForSequenceClassification"]

_FOLDER = "intervenable_model"


class ReftTrainer(Trainer):
    """Train the interventions of a `ReftModel`; natively `rl.train(reft, examples, epochs=30)`.

    Args:
        model: the `ReftModel`; Hugging Face's `Trainer` is given its bound model.
        tokenizer: as `processing_class`, by its older name.
        **kwargs: as for `transformers.Trainer`: `args`, `train_dataset`, `data_collator`, ….

    Raises:
        DataError: `model` is no `ReftModel`.
        ConfigError: the training is distributed over several processes.
    """

    def __init__(self, model: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, IntervenableModel):
            raise DataError(
                f"model={type(model).__name__}: expected what get_reft_model returns; natively it is "
                "rl.train(reft, ...)"
            )
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        self.reft_model = model
        super().__init__(model=model.reft, **kwargs)
        if self.args.world_size > 1:
            # The loss is that of `reft_model`, not of the wrapper that would average its gradients.
            raise ConfigError(
                f"training in {self.args.world_size} processes is not supported, since they would never "
                "share their gradients; start one, or natively rl.train(reft, examples), which trains on one "
                "device"
            )
        self.model_accepts_loss_kwargs = False
        self.label_names = ["labels"]
        if self.args.n_gpu > 1:
            # Replicas of one process would share the hooks.
            self.args._n_gpu = 1

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        # Locations are no argument of the model's.
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss with the interventions at the batch's `intervention_locations`."""
        locations, subspaces = inputs.get("intervention_locations"), inputs.get("subspaces")
        base = {k: inputs[k] for k in ("input_ids", "attention_mask", "position_ids") if k in inputs}
        _, outputs = self.reft_model(
            base,
            unit_locations=None if locations is None else {"sources->base": (None, _nested(locations))},
            subspaces=None if subspaces is None else _nested(subspaces),
            labels=inputs["labels"],
        )
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the interventions to `intervenable_model` in a folder; natively `reft.save(folder)`."""
        self.reft_model.save(Path(output_dir or str(self.args.output_dir)) / _FOLDER)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.save_model(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.reft_model.load_intervention(Path(resume_from_checkpoint) / _FOLDER)

    def _load_best_model(self) -> None:
        self.reft_model.load_intervention(Path(str(self.state.best_model_checkpoint)) / _FOLDER)


class ReftTrainerForCausalLM(ReftTrainer):
    """Train on prompts with answers; natively `rl.train(reft, [(prompt, answer), ...])`.

    The loss is that of the answer's tokens. Checkpoints hold the interventions alone.
    """


class ReftTrainerForSequenceClassification(ReftTrainer):
    """Train a classifier's interventions; natively a `transformers.Trainer` of your own over `reft`.

    The loss is the classification model's own, by its `problem_type`; `compute_metrics` is called as
    Hugging Face's `Trainer` does it, with logits and labels.
    """


def _nested(values: Any) -> list[Any]:
    """`(row, intervention, unit)` as pyvene's `[intervention][row][unit]`."""
    nested: list[Any] = torch.as_tensor(values).permute(1, 0, 2).tolist()
    return nested

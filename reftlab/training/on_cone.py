"""Whether a training runs on the causal cone of its edits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import TrainingArguments

from reftlab.runtime import BoundModel
from reftlab.runtime.cone import ConeRunner, ConeStore
from reftlab.training.collate import Collator, moved
from reftlab.training.data import Encoded

__all__ = ["prepare", "runner_for", "visits_all"]


def runner_for(
    reft: BoundModel, cone: bool | ConeStore, *, train_model: bool, arguments: TrainingArguments
) -> tuple[ConeRunner | None, tuple[str, ...]]:
    """What runs a training's batches on the cone, or None and why everything must run.

    Args:
        reft: what is trained.
        cone: as for `train`.
        train_model: whether parameters of the model itself learn.
        arguments: of the Trainer.
    """
    reasons = []
    if cone is False:
        reasons.append("cone=False")
    if train_model:
        reasons.append("parameters of the model itself learn (train_model=True)")
    if arguments.fp16:
        reasons.append("float16 mixed precision, whose loss is scaled; bf16=True runs on the cone")
    if arguments.label_smoothing_factor:
        reasons.append("label smoothing, which the Trainer works out from all logits")
    if arguments.gradient_checkpointing:
        reasons.append("gradient checkpointing, which runs without a cache")
    if arguments.neftune_noise_alpha:
        reasons.append("noise on the embeddings (neftune_noise_alpha), which makes each pass another")
    if arguments.world_size > 1:
        reasons.append("several processes, whose gradients are averaged around the plain pass")
    if arguments.torch_compile:
        reasons.append("the model is compiled, and compiled code cannot be entered in the middle")
    if reasons:
        return None, tuple(reasons)
    return ConeRunner(reft, cone if isinstance(cone, ConeStore) else None), ()


def visits_all(arguments: TrainingArguments, examples: int) -> bool:
    """Whether a training sees every example, so that all may be prepared before it."""
    if arguments.max_steps <= 0:
        return arguments.num_train_epochs >= 1
    in_one_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return arguments.max_steps >= math.ceil(examples / in_one_step)


def prepare(
    runner: ConeRunner, encoded: Sequence[Encoded], collate: Collator, batch_size: int, progress: bool
) -> None:
    """Compute what lies outside the cones of all examples, as long as there is room to keep it.

    Batches hold examples of about the same length, the longest first, so that what is computed together
    depends on the examples alone.
    """
    from tqdm.auto import tqdm

    order = sorted(encoded, key=lambda one: (-len(one), one.input_ids))
    starts = range(0, len(order), batch_size)
    with tqdm(starts, desc="first visits", unit="batch", disable=not progress, leave=False) as bar:
        runner.fill(moved(collate(order[start : start + batch_size]), runner.reft) for start in bar)

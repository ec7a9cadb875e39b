"""Examples as the batches that a model takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reftlab.runtime.calls import continues_texts
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.collate import Collator, moved
from reftlab.training.data import Encoded

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["accepted", "batches"]

_TOKENS_A_BATCH = 2048


def batches(reft: BoundModel, encoded: list[Encoded], sources: Any) -> list[dict[str, Any]]:
    """Batches of about 2048 tokens, or one where source inputs for all examples come with it.

    Prompts are padded on the left and answers on the right, so that all answers of a batch begin in
    the same column. Entries as from `Collator`, and the `sources`.
    """
    assert reft.tokenizer is not None
    collate = Collator.of(reft.tokenizer, "right")
    groups: list[list[Encoded]] = [[]]
    for one in encoded:
        group = groups[-1]
        longest = max([len(one), *(len(other) for other in group)])
        if group and not sources and longest * (len(group) + 1) > _TOKENS_A_BATCH:
            groups.append([])
        groups[-1].append(one)
    made = [moved(_aligned(collate(group), collate.pad_id), reft) for group in groups]
    return [{**batch, "sources": sources} for batch in made] if sources else made


def _aligned(batch: dict[str, Any], pad_id: int) -> dict[str, Any]:
    """Shift the rows of a batch that is padded on the right until their prompts end together."""
    mask, labels = batch["attention_mask"], batch["labels"]
    prompts = ((labels == IGNORED_LABEL) & (mask == 1)).sum(1)
    shift = int(prompts.max()) - prompts
    width = int((mask.sum(1) + shift).max())
    columns = torch.arange(width)[None, :] - shift[:, None]
    real = (columns >= 0) & (columns < mask.sum(1)[:, None])
    columns = columns.clamp(0, mask.shape[1] - 1)
    mask = real.long()
    return {
        **batch,
        "input_ids": torch.where(real, batch["input_ids"].gather(1, columns), pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.where(real, labels.gather(1, columns), IGNORED_LABEL),
    }


def accepted(model: nn.Module) -> frozenset[str]:
    """Which of a batch's entries the forward of a bound model takes."""
    names = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    usual = {"input_ids", "attention_mask", "position_ids"}
    taken = usual & (set(names) | ({"attention_mask"} if anything else set()))
    labels = {"labels"} & set(names) if continues_texts(model) else set()
    return frozenset(taken | labels | {"sources", "positions"})

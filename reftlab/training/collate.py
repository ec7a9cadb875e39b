"""Batches: encoded examples padded to one length, on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from reftlab.errors import DataError
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.data import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into one batch.

    Args:
        pad_id: token id to pad with; its value never matters, since the mask leaves it out.
        side: where the padding goes.
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise DataError(f"side={self.side!r}: expected 'left' or 'right'")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, side: Literal["left", "right"] | None = None) -> Collator:
        """The collator for a tokenizer, on the side that it pads unless another is given."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(0 if pad is None else int(pad), side or tokenizer.padding_side)

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Build a batch.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` and `labels`, each `(row, token)` int64.
            `position_ids` count real tokens, so that padding on the left changes nothing in models
            with learned positions either. Where the examples have tasks, `tasks` is their list.
        """
        width = max(len(example) for example in examples)
        ids = torch.full((len(examples), width), self.pad_id)
        labels = torch.full((len(examples), width), IGNORED_LABEL)
        mask = torch.zeros(len(examples), width, dtype=torch.long)
        for row, example in enumerate(examples):
            here = slice(width - len(example), width) if self.side == "left" else slice(0, len(example))
            ids[row, here] = torch.tensor(example.input_ids)
            labels[row, here] = torch.tensor(example.labels)
            mask[row, here] = 1
        tasks = [example.task for example in examples]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
            **({} if None in tasks else {"tasks": tasks}),
        }

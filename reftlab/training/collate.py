"""Batches: encoded examples padded to one length, on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from reftlab.errors import DataError
from reftlab.runtime import BoundModel
from reftlab.runtime.scan import moved as on_device
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.data import Encoded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["OF_EDITS", "Collator", "moved"]

OF_EDITS = ("tasks", "sources", "positions")
"""What a batch says of the edits, by the names of a bound model's arguments."""


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
            with learned positions either. Where the examples have `tasks`, `sources` or `positions`,
            these are there as a bound model's `forward` takes them; the sources have no labels.
        """
        batch: dict[str, Any] = self._padded([example.input_ids for example in examples])
        labels = torch.full(batch["input_ids"].shape, IGNORED_LABEL)
        wanted = [label for example in examples for label in example.labels]
        batch["labels"] = labels.masked_scatter(batch["attention_mask"].bool(), torch.tensor(wanted))
        first = examples[0]
        if first.task is not None:
            batch["tasks"] = [example.task for example in examples]
        if first.sources is not None:
            batch["sources"] = {
                name: self._padded([(example.sources or {})[name] for example in examples])
                for name in first.sources
            }
        if first.positions is not None:
            batch["positions"] = {
                name: [list((example.positions or {})[name]) for example in examples]
                for name in first.positions
            }
        return batch

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            here = slice(width - len(row), width) if self.side == "left" else slice(0, len(row))
            ids[number, here] = torch.tensor(row)
            mask[number, here] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }


def moved(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A batch on the model's device; what it says of the edits is for bound models alone."""
    known = batch if isinstance(model, BoundModel) else {k: v for k, v in batch.items() if k not in OF_EDITS}
    return dict(on_device(known, model.device))

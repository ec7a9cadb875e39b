"""Which tokens a call covers, and which of them an edit chooses.

A *column* is a place on the token axis of the whole padded sequence, counted from 0 however much
of it is in a cache. A forward call covers the columns `[start, stop)`. A `Layout` knows which
columns of each row are real tokens and where its prompt ends; a `Selection` is what a node's
positions come to under a layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from reftlab.address import Position, Prompt
from reftlab.errors import PositionError, RunError
from reftlab.graph import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "Layout", "Selection"]

IGNORED_LABEL = -100
"""The label of tokens that the loss leaves out, as in torch and transformers."""


@dataclass(frozen=True)
class Selection:
    """Chosen tokens, row by row and ascending in each row.

    Attributes:
        rows: `(n,)` int64.
        columns: `(n,)` int64.
        numbers: `(n,)` int64, each token's number among the real tokens of its row.
    """

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    numbers: Int[Tensor, " n"]

    def __len__(self) -> int:
        return self.rows.shape[0]

    def counts(self, rows: int) -> list[int]:
        """How many tokens were chosen in each of `rows` rows."""
        return torch.bincount(self.rows, minlength=rows).tolist()

    def where(self, mask: Tensor | slice) -> Selection:
        return Selection(self.rows[mask], self.columns[mask], self.numbers[mask])

    def ascending(self) -> tuple[Selection, Tensor]:
        """The same tokens row after row and ascending in each, and the order that makes them so."""
        span = int(self.columns.max()) + 1 if len(self) else 1
        order = (self.rows * span + self.columns).argsort(stable=True)
        return self.where(order), order

    def repeated(self, group: int) -> Selection:
        """The same tokens for `group` rows in place of each row."""
        copies = torch.arange(group).repeat(len(self))
        return Selection(
            self.rows.repeat_interleave(group) * group + copies,
            self.columns.repeat_interleave(group),
            self.numbers.repeat_interleave(group),
        )

    @classmethod
    def joined(cls, parts: Sequence[Selection]) -> Selection:
        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.columns for part in parts]),
            torch.cat([part.numbers for part in parts]),
        )


@dataclass(frozen=True)
class Layout:
    """Where each row's prompt and answer stand on the token axis.

    Attributes:
        width: number of columns that are known so far.
        prompts: for each row the columns of its prompt, ascending int64.
        answers: for each row the columns of its given answer; empty where there is none.
        ids: token ids `(row, width)`, or None where the model was given vectors.
        open: whether more tokens may follow column `width`, as in generation.
    """

    width: int
    prompts: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    ids: Tensor | None = None
    open: bool = False

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @classmethod
    def everything(cls, rows: int, width: int) -> Layout:
        """Every column is a real token of the prompt; for models that take no attention mask."""
        nothing = torch.empty(0, dtype=torch.long)
        return cls(width, (torch.arange(width),) * rows, (nothing,) * rows)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], *, causal: bool, open: bool = False) -> Layout | None:
        """Read the layout off a call's inputs; None where they hold no token axis.

        Args:
            inputs: the call's arguments by name: `input_ids` or `inputs_embeds`, and where given
                `attention_mask` and `labels`.
            causal: whether labels mark an answer that follows the prompt.
            open: whether the call is the prompt of a generation.

        Raises:
            RunError: the arguments contradict each other.
        """
        ids, tokens = inputs.get("input_ids"), inputs.get("input_ids")
        if tokens is None:
            tokens = inputs.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return None
        rows, width = tokens.shape[:2]
        real = _mask(inputs.get("attention_mask"), rows, width)
        answered = torch.zeros(rows, width, dtype=torch.bool)
        labels = inputs.get("labels")
        if causal and isinstance(labels, Tensor) and labels.shape == (rows, width):
            answered = (labels.detach().cpu() != IGNORED_LABEL).long().cummax(dim=1).values.bool()
        return cls._of_masks(real, answered, ids, open)

    @classmethod
    def _of_masks(cls, real: Tensor, answered: Tensor, ids: Tensor | None, open: bool) -> Layout:
        """The layout of rows `(row, token)` of which some tokens are real, and some of those the answer."""
        rows, width = real.shape
        ids = None if ids is None else ids.detach().cpu()
        if bool(real.all()) and not bool(answered.any()):
            return replace(cls.everything(rows, width), ids=ids, open=open)
        pairs = list(zip(real, answered, strict=True))
        prompts = tuple((row & ~answer).nonzero()[:, 0] for row, answer in pairs)
        answers = tuple((row & answer).nonzero()[:, 0] for row, answer in pairs)
        return cls(width, prompts, answers, ids, open)

    @classmethod
    def of_decoder(cls, inputs: Mapping[str, Any], *, open: bool = False) -> Layout | None:
        """The layout of an encoder-decoder's decoder; None where the call gives it no tokens.

        Labels are the decoder's tokens one place later, so that the token before the first label is
        the last one of the prompt; without labels everything given is the prompt.
        """
        ids, labels = inputs.get("decoder_input_ids"), inputs.get("labels")
        tokens = ids if ids is not None else inputs.get("decoder_inputs_embeds")
        tokens = labels if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return None
        rows, width = tokens.shape[:2]
        real = _mask(inputs.get("decoder_attention_mask"), rows, width)
        answered = torch.zeros(rows, width, dtype=torch.bool)
        if isinstance(labels, Tensor) and labels.shape == (rows, width):
            labelled = labels.detach().cpu() != IGNORED_LABEL
            answered[:, 1:] = labelled.long().cummax(dim=1).values.bool()[:, :-1]
            real[:, 1:] &= labelled[:, :-1] | ~answered[:, 1:]
        return cls._of_masks(real, answered, ids, open)

    def select(
        self, position: Position, phase: Phase, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Selection:
        """The tokens that a position chooses in the columns known so far.

        Raises:
            PositionError: a row does not have the position; the message names the row.
        """
        position.check_rows(self.rows)
        if position.by_length and self.rows > 1 and self._alike:
            one = self._select_row(position, phase, tokenizer, 0)
            rows = torch.arange(self.rows).repeat_interleave(len(one))
            return Selection(rows, one.columns.repeat(self.rows), one.numbers.repeat(self.rows))
        parts = [self._select_row(position, phase, tokenizer, row) for row in range(self.rows)]
        return Selection.joined(parts)

    @property
    def _alike(self) -> bool:
        """Whether all rows stand on the same columns, as without padding."""
        return all(prompt is self.prompts[0] for prompt in self.prompts) and all(
            answer is self.answers[0] for answer in self.answers
        )

    def _select_row(
        self, position: Position, phase: Phase, tokenizer: PreTrainedTokenizerBase | None, row: int
    ) -> Selection:
        places: list[Tensor] = []
        prompt, answer = self.prompts[row], self.answers[row]
        if phase != "decode":
            places.append(self._in_prompt(position, row, tokenizer))
        if phase != "prompt":
            places.append(position.select_generated(len(answer)) + len(prompt))
        numbers = torch.cat(places)
        columns = torch.cat([prompt, answer])[numbers]
        return Selection(torch.full_like(columns, row), columns, numbers)

    def select_grown(self, position: Position, rows: int, start: int, stop: int) -> Selection:
        """The tokens that a position chooses among those generated in columns `[start, stop)`."""
        start = max(start, self.width)
        chosen = position.select_generated(max(0, stop - self.width))
        columns = chosen[chosen + self.width >= start] + self.width
        group = max(1, rows // max(1, self.rows))
        lengths = torch.tensor([len(prompt) for prompt in self.prompts]).repeat_interleave(group)
        numbers = (lengths[:, None] + columns[None, :] - self.width).flatten()
        row = torch.arange(rows).repeat_interleave(len(columns))
        return Selection(row, columns.repeat(rows), numbers)

    def _in_prompt(self, position: Position, row: int, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        columns = self.prompts[row]
        if len(columns) == 0:
            raise PositionError(
                f"row {row} has no prompt tokens: its attention mask is all 0, or its labels begin at "
                "its first token"
            )
        ids = None
        if self.ids is not None:
            ids = tuple(self.ids[row, columns].tolist()) if tokenizer is not None else ()
        return position.select(Prompt(len(columns), ids, tokenizer, row))


def _mask(mask: Any, rows: int, width: int) -> Tensor:
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise RunError(
            "attention_mask must be (row, token) so that positions can count real tokens; for any "
            "other mask give the tokenizer's output as prompt="
        )
    if mask.shape != (rows, width):
        raise RunError(
            f"attention_mask is {tuple(mask.shape)}, the tokens are {(rows, width)}; they must match. "
            "In a call that continues a cache made elsewhere, give the whole prompt as prompt="
        )
    return mask.detach().cpu() != 0

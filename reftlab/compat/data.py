"""pyreft's data modules: prompts and answers as rows with `intervention_locations`.

Natively the tokens are the edit's own matter (`positions="last"`), and `rl.train` takes
`(prompt, answer)` pairs; nothing of this is needed there.

Locations are columns of a row without padding, as in pyreft. `ReftDataCollator` moves them along
where it pads on the left, so that they stay on the tokens that were meant; pyreft leaves them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from reftlab.errors import DataError, PositionError
from reftlab.runtime.window import IGNORED_LABEL

__all__ = [
    "ReftDataCollator",
    "ReftRows",
    "get_intervention_locations",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
]

_LOCATIONS = "intervention_locations"


class ReftRows(Dataset[dict[str, Any]]):
    """Rows of `input_ids`, `labels` and `intervention_locations`; natively (prompt, answer) pairs."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, str):
            return [row[place] for row in self.rows]
        return {name: list(value) for name, value in self.rows[place].items()}


@dataclass
class ReftDataCollator:
    """Pad rows into a batch and move their locations along; natively `reftlab.training.Collator`.

    Attributes:
        data_collator: pads, `transformers.DataCollatorForSeq2Seq` in the data modules.
    """

    data_collator: Any

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch: the padded tensors, and `intervention_locations` `(row, intervention, unit)`."""
        lengths = [len(instance["input_ids"]) for instance in instances]
        rest = [{k: v for k, v in row.items() if k not in (_LOCATIONS, "subspaces")} for row in instances]
        batch: dict[str, Any] = dict(self.data_collator(rest))
        if _LOCATIONS not in instances[0]:
            return batch
        width = batch["input_ids"].shape[-1]
        side = getattr(getattr(self.data_collator, "tokenizer", None), "padding_side", "right")
        locations = torch.as_tensor([row[_LOCATIONS] for row in instances])
        if side == "left":
            locations = locations + (width - torch.tensor(lengths))[:, None, None]
        batch[_LOCATIONS] = locations
        if "subspaces" in instances[0]:
            batch["subspaces"] = torch.as_tensor([row["subspaces"] for row in instances])
        return batch


def parse_positions(positions: str) -> tuple[int, int]:
    """How many first and last tokens a text such as `f5+l5` means; natively `"first(5)+last(5)"`.

    Raises:
        PositionError: it is no such text.

    >>> parse_positions("f5+l3"), parse_positions("l1")
    ((5, 3), (0, 1))
    """
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", str(positions).replace(" ", ""))
    if not found or not (found[1] or found[2]):
        raise PositionError(
            f"positions={positions!r}: expected the first and last tokens, as in 'f5+l5' or 'l1'"
        )
    return int(found[1] or 0), int(found[2] or 0)


def get_intervention_locations(
    *,
    last_position: int,
    num_interventions: int,
    positions: str | None = None,
    first_n: int | None = None,
    last_n: int | None = None,
    pad_mode: str = "first",
    share_weights: bool = False,
    **kwargs: Any,
) -> list[list[int]]:
    """The columns of each intervention in a prompt; natively `positions="first(5)+last(5)"`.

    A prompt that is too short for the first and last tokens asked for has half of its tokens taken
    as first and half as last; the lists are filled up to one length with a place that pyreft sets
    aside for it, −1 or `last_position`.

    Args:
        last_position: length of the prompt.
        num_interventions: number of interventions; with first and last tokens and without
            `share_weights` the first half of them takes the first tokens and the rest the last.
        positions: such as `f5+l5`, in place of `first_n` and `last_n`.
        pad_mode: `first` fills up with −1, `last` with `last_position`.
        share_weights: whether each intervention takes both.

    >>> get_intervention_locations(last_position=9, positions="f2+l2", num_interventions=2)
    [[0, 1], [7, 8]]
    """
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    if first_n is None or last_n is None:
        raise PositionError("get_intervention_locations needs positions= or first_n= and last_n=")
    filler = -1 if pad_mode == "first" else last_position
    first, last = min(last_position // 2, first_n), min(last_position // 2, last_n)
    head, tail = list(range(first)), list(range(last_position - last, last_position))
    if share_weights or first == 0 or last == 0:
        row = head + tail + [filler] * (first_n - first + last_n - last)
        return [list(row) for _ in range(num_interventions)]
    longest = max(first_n, last_n)
    half = num_interventions // 2
    filled = [part + [filler] * (longest - len(part)) for part in (head, tail)]
    return [list(part) for part in filled for _ in range(half)]


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    num_interventions: int = 1,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Rows for edits of the prompt's last token; natively `rl.train(reft, zip(inputs, outputs))`.

    Args:
        tokenizer: the model's tokenizer.
        model: the model, for the collator.
        inputs, outputs: prompts and answers.
        num_interventions: number of interventions.
        nonstop: whether answers have no end-of-text token.

    Returns:
        `train_dataset`, `eval_dataset` (None) and `data_collator`, for `ReftTrainerForCausalLM`.

    Raises:
        DataError: as many prompts as answers are needed, and an answer must have tokens.
    """

    def last(length: int) -> list[list[int]]:
        return [[length - 1] for _ in range(num_interventions)]

    return _module(tokenizer, model, _rows(tokenizer, inputs, outputs, nonstop, last))


make_last_position_supervised_chat_data_module = make_last_position_supervised_data_module


def make_multiple_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """Rows for edits of the prompt's first and last tokens; natively `positions="first(1)+last(1)"`.

    As the one for the last token. In a prompt that is too short the lists are filled up with
    tokens that they have already, which are edited once; pyreft fills up with the answer's first
    token, and edits that.

    Args:
        positions: which tokens, such as `f5+l5`.
        share_weights: whether each intervention takes first and last tokens; else the first half of
            the interventions takes the first, the rest the last.
    """
    first_n, last_n = parse_positions(positions)

    def both(length: int) -> list[list[int]]:
        rows = get_intervention_locations(
            last_position=length,
            first_n=first_n,
            last_n=last_n,
            pad_mode="last",
            num_interventions=num_interventions,
            share_weights=share_weights,
        )
        if not rows:
            raise DataError(
                f"num_interventions={num_interventions} without share_weights: first and last tokens need "
                "one each"
            )
        kept = [[n for n in row if n < length] or [0] for row in rows]
        return [own + [own[-1]] * (len(row) - len(own)) for own, row in zip(kept, rows, strict=True)]

    return _module(tokenizer, model, _rows(tokenizer, inputs, outputs, nonstop, both))


def _module(tokenizer: Any, model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    import transformers

    padded = transformers.DataCollatorForSeq2Seq(
        tokenizer=tokenizer, model=model, label_pad_token_id=IGNORED_LABEL, padding="longest"
    )
    return {
        "train_dataset": ReftRows(rows),
        "eval_dataset": None,
        "data_collator": ReftDataCollator(data_collator=padded),
    }


def _rows(
    tokenizer: Any, inputs: Sequence[str], outputs: Sequence[str], nonstop: bool, locate: Any
) -> list[dict[str, Any]]:
    if len(inputs) != len(outputs):
        raise DataError(f"there are {len(inputs)} inputs and {len(outputs)} outputs; give as many")
    rows = []
    for number, (prompt, answer) in enumerate(zip(inputs, outputs, strict=True)):
        text = answer if nonstop or not tokenizer.eos_token else answer + tokenizer.eos_token
        first = _ids(tokenizer, prompt)
        whole = _ids(tokenizer, prompt + text)
        if whole[: len(first)] != first:
            # The prompt's last token would swallow the answer's beginning, which no reply ever does.
            whole = first + _ids(tokenizer, text, special=False)
        limit = tokenizer.model_max_length
        whole = whole[:limit]
        if not first or len(whole) <= len(first):
            raise DataError(
                f"example {number}: {prompt!r} with {answer!r} leaves no token of an answer to learn"
                + (f" within model_max_length={limit}" if len(first) >= limit else "")
            )
        labels = [IGNORED_LABEL] * len(first) + whole[len(first) :]
        rows.append({"input_ids": whole, _LOCATIONS: locate(len(first)), "labels": labels})
    return rows


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])

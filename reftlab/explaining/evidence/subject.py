"""What the public functions of explaining share: one recording of the examples, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.errors import DataError
from reftlab.explaining.geometry.record import Recorded, record
from reftlab.measuring.inputs import accepted, batches
from reftlab.runtime.calls import continues_texts
from reftlab.training.data import Example, encode
from reftlab.training.replies import prompt_form

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["above_rounding", "check_budget", "recorded_on", "whole_number"]

_ROUNDING = 16
"""Steps of the model's precision that sums of a few of its runs may be off by."""


def recorded_on(
    reft: BoundModel,
    rows: list[Example],
    *,
    answers: bool,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recorded:
    """What every edit is given and makes on examples, each by its number there.

    Args:
        reft: a bound model with its tokenizer.
        rows: the examples.
        answers: whether their answers are run too.
        chat, system, sources: as for `behaviour_of`.
    """
    assert reft.tokenizer is not None
    kept = rows if answers and continues_texts(reft.model) else [replace(row, answer=None) for row in rows]
    encoded = encode(reft.tokenizer, kept, **prompt_form(reft, reft.tokenizer, chat, system))
    return record(reft, batches(reft, encoded, sources), accepted(reft.model))


def above_rounding(values: Tensor, size: Tensor, reft: BoundModel) -> Tensor:
    """Values with those at 0 that sums of numbers of this `size` may have by rounding alone."""
    floating = [p.dtype for p in reft.model.parameters() if p.is_floating_point()]
    step = torch.finfo(floating[0] if floating else torch.float32).eps
    return torch.where(values.abs() <= _ROUNDING * step * size, 0.0, values)


def whole_number(name: str, value: Any, low: int) -> int:
    """A whole number of `low` or more.

    Raises:
        DataError: it is none.
    """
    if type(value) is not int or value < low:
        raise DataError(f"{name}={value!r}: expected a whole number of {low} or more")
    return value


def check_budget(budget: Any) -> None:
    """Refuse a time that is no number of seconds.

    Raises:
        DataError: it is none.
    """
    if budget is not None and (not isinstance(budget, int | float) or not budget > 0):
        raise DataError(f"budget={budget!r}: expected seconds above 0, or None for no limit")

"""Positions that are found by looking at the prompt's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reftlab.address.position import Position, Prompt
from reftlab.errors import PositionError

__all__ = ["After", "Span", "TextPosition", "Token"]


@dataclass(frozen=True)
class TextPosition(Position):
    """A position found by looking at text; `occurrence` counts from 1, or from the end below 0."""

    text: str
    occurrence: int = 1
    by_length = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise PositionError(f"{self._name}(...) needs a text that is not empty, not {self.text!r}")
        if type(self.occurrence) is not int or self.occurrence == 0:
            raise PositionError(
                f"{self._name}({self.text!r}, {self.occurrence!r}): the occurrence is a whole number, "
                "1 for the first, -1 for the last"
            )

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def __str__(self) -> str:
        number = "" if self.occurrence == 1 else f", {self.occurrence}"
        return f"{self._name}({self.text!r}{number})"

    def _pick(self, found: int, prompt: Prompt, what: str) -> int:
        """Turn the wanted occurrence into a number from 1 to `found`, or say why there is none."""
        number = self.occurrence if self.occurrence > 0 else found + 1 + self.occurrence
        if 1 <= number <= found:
            return number
        times = "does not occur" if found == 0 else f"occurs {found} time{'s' * (found != 1)}"
        raise PositionError(
            f"row {prompt.row}: {str(self)!r} was not found; {what} {times} in the prompt "
            f"{_shorten(prompt.text())!r}"
        )

    def _cover(self, prompt: Prompt) -> tuple[int, int]:
        """The smallest range of tokens `[start, stop)` whose text holds the wanted occurrence."""
        whole, text = prompt.text(), self.text
        if text not in whole and prompt.tokenizer is not None:
            # An uncased or normalising tokenizer changes the text on its way in; look for that.
            ids = prompt.tokenizer(text, add_special_tokens=False)["input_ids"]
            normal = str(prompt.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()
            text = normal if normal else text
        number = self._pick(whole.count(text), prompt, repr(text))
        stop = _first_true(1, prompt.length, lambda end: prompt.text(0, end).count(text) >= number)
        late = _first_true(0, stop - 1, lambda begin: text not in prompt.text(begin + 1, stop))
        return late, stop


@dataclass(frozen=True)
class Span(TextPosition):
    """The tokens that cover a piece of text, `span('Eiffel Tower')`."""

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(*self._cover(prompt))


@dataclass(frozen=True)
class After(TextPosition):
    """Every token of the prompt behind a piece of text, `after('Question:')`."""

    def select(self, prompt: Prompt) -> Tensor:
        stop = self._cover(prompt)[1]
        if stop == prompt.length:
            raise PositionError(f"row {prompt.row}: {str(self)!r}: no token follows that text in the prompt")
        return torch.arange(stop, prompt.length)


@dataclass(frozen=True)
class Token(TextPosition):
    """One token by its exact text, space included, `token(' Paris')`."""

    def select(self, prompt: Prompt) -> Tensor:
        prompt.text(0, 0)
        assert prompt.tokenizer is not None
        assert prompt.ids is not None
        ids = prompt.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise PositionError(
                f"{str(self)!r}: that text is {len(ids)} tokens, not one; use span({self.text!r})"
            )
        places = [place for place, token in enumerate(prompt.ids) if token == ids[0]]
        return torch.tensor([places[self._pick(len(places), prompt, "the token") - 1]])


def _first_true(low: int, high: int, test: Any) -> int:
    """The smallest number in `[low, high]` that passes a test which, once passed, stays passed."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle + 1, high)
    return low


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :]

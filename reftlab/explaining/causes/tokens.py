"""Edited tokens by name: the first, the second, …, the last of a row, as an edit's positions count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from reftlab.address import All, Every, First, Indices, Last, Position, Union

if TYPE_CHECKING:
    from reftlab.runtime.places import BoundEdit

__all__ = ["Token", "named_tokens"]

_WORDS = ("first", "second", "third")


@dataclass(frozen=True, order=True)
class Token:
    """Which token of a row.

    Attributes:
        side: 0 counts from the first token of the row, 2 from the last of the prompt, 1 among those that
            the edit chooses.
        number: from 0; from −1 downwards where it counts from the last.
        among: the edit's positions, where it counts among those.
    """

    side: int
    number: int
    among: str = ""

    @property
    def label(self) -> str:
        """In words, `first`, `5th`, `second last`, `first of span('Paris')`.

        >>> Token(0, 0).label, Token(0, 11).label, Token(2, -1).label, Token(2, -2).label
        ('first', '12th', 'last', 'second last')
        """
        if self.side == 2:
            return "last" if self.number == -1 else f"{_ordinal(-self.number)} last"
        return _ordinal(self.number + 1) + (f" of {self.among}" if self.side == 1 else "")


def named_tokens(bound: BoundEdit, rows: Int[Tensor, " n"], numbers: Int[Tensor, " n"]) -> list[Token]:
    """Name the tokens that an edit chooses.

    Args:
        bound: the edit.
        rows: row of each of its vectors.
        numbers: of its token among the real tokens of the row. All tokens that the edit chooses in a row
            must be among them.

    Returns:
        One name a vector.
    """
    own: dict[int, list[int]] = {}
    for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
        own.setdefault(row, []).append(number)
    names = {
        row: dict(zip(sorted(found), _row(bound, sorted(found)), strict=True)) for row, found in own.items()
    }
    return [names[row][number] for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)]


def _row(bound: BoundEdit, numbers: list[int]) -> list[Token]:
    """Names of the tokens that an edit chooses in one row, whose numbers ascend."""
    terms = _terms(bound.positions)
    if any(isinstance(term, All | Every) for term in terms):
        return [Token(0, number) for number in numbers]
    among = [Token(1, rank, str(bound.positions)) for rank in range(len(numbers))]
    if not all(isinstance(term, First | Last | Indices) for term in terms):
        return among
    counted = {n for term in terms for n in _counts(term)}
    start, ends = {n for n in counted if n >= 0}, sorted(n for n in counted if n < 0)
    left = [number for number in numbers if number not in start]
    # In a short row two counts may meet at one token. A count from the first token on meets the end's
    # farthest ones, so that those nearest to the end are left; of single numbers nobody can say which.
    begins = start == set(range(len(start))) and ends == list(range(-len(ends), 0))
    if bound.phase != "prompt" or not (len(left) == len(ends) or begins):
        return [Token(0, n) if n in start else other for n, other in zip(numbers, among, strict=True)]
    from_end = dict(zip(reversed(left), reversed(ends), strict=False))
    return [Token(2, from_end[n]) if n in from_end else Token(0, n) for n in numbers]


def _counts(term: Position) -> Sequence[int]:
    """The numbers of the tokens that a position counts, from −1 downwards those from the end."""
    if isinstance(term, First):
        return range(term.count)
    return range(-term.count, 0) if isinstance(term, Last) else getattr(term, "numbers", ())


def _terms(position: Position) -> tuple[Position, ...]:
    return position.terms if isinstance(position, Union) else (position,)


def _ordinal(number: int) -> str:
    if number <= len(_WORDS):
        return _WORDS[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"

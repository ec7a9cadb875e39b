"""Positions: which tokens of each row, as small objects; `position_parser` reads the strings for them.

Positions count the real tokens of a row's prompt, as the attention mask gives them, so padding on
either side changes nothing. Negative numbers count from the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.errors import PositionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "All",
    "Every",
    "First",
    "Generated",
    "Given",
    "Indices",
    "Joined",
    "Last",
    "PerRow",
    "Position",
    "Prompt",
    "Union",
]


@dataclass(frozen=True)
class Prompt:
    """The real tokens of one row's prompt, which is all that a position needs to know.

    Attributes:
        length: number of real tokens.
        ids: their token ids, for positions that look at text; None where only vectors are known.
        tokenizer: the tokenizer that made them, or None.
        row: the row of the batch, for error messages.
    """

    length: int
    ids: tuple[int, ...] | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False)
    row: int = 0

    def text(self, start: int = 0, stop: int | None = None) -> str:
        """The text of the tokens `[start, stop)`.

        Raises:
            PositionError: the ids or the tokenizer are unknown.
        """
        if self.tokenizer is None or self.ids is None:
            missing = "tokenizer" if self.tokenizer is None else "input_ids"
            raise PositionError(
                f"a position that looks at text needs {missing}: bind with graph.bind(model, tokenizer) "
                "and call with input_ids"
            )
        return str(self.tokenizer.decode(list(self.ids[start:stop]), clean_up_tokenization_spaces=False))


class Position:
    """Base of all positions; `a + b` is the union of both.

    Attributes:
        size: how many tokens of each row it chooses, or None where that depends on the row.
        joins: how many tokens' vectors make one vector together; 1 unless they are joined.
        generated: whether it chooses generated tokens only.
        by_length: whether it is the same in all rows of one length.
    """

    size: int | None = None
    joins: int = 1
    generated: bool = False
    by_length: bool = True

    def check_rows(self, rows: int) -> None:
        """Refuse a batch with another number of rows than the position was written for."""

    def select(self, prompt: Prompt) -> Tensor:
        """Return the chosen tokens of one prompt, ascending, `(k,)` int64, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tokens it chooses")

    def select_generated(self, count: int) -> Tensor:
        """Return the chosen ones among the first `count` generated tokens, `(k,)` int64.

        Raises:
            PositionError: the position has no meaning while tokens are still being generated.
        """
        raise PositionError(
            f"positions {str(self)!r} have no meaning among generated tokens; "
            "use 'all', 'last', 'first(n)' or numbers from 0, or phase='prompt'"
        )

    def __add__(self, other: Position | str | int | Sequence[Any]) -> Position:
        from reftlab.address.position_parser import parse_position

        return Union((*_terms(self), *_terms(parse_position(other))))


@dataclass(frozen=True)
class All(Position):
    """Every token of the prompt."""

    def __str__(self) -> str:
        return "all"

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(prompt.length)

    def select_generated(self, count: int) -> Tensor:
        return torch.arange(count)


@dataclass(frozen=True)
class Every(Position):
    """Every token, or every `step`-th one beginning with the first."""

    step: int = 1

    def __post_init__(self) -> None:
        _check_count("every", self.step)

    def __str__(self) -> str:
        return "every" if self.step == 1 else f"every({self.step})"

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(0, prompt.length, self.step)

    def select_generated(self, count: int) -> Tensor:
        return torch.arange(0, count, self.step)


@dataclass(frozen=True)
class Generated(Position):
    """Generated tokens `[start, stop)`, counted from the first generated one; for phase `decode`."""

    start: int = 0
    stop: int | None = None
    generated = True

    def __post_init__(self) -> None:
        ends = (self.start, 0 if self.stop is None else self.stop)
        if not all(type(n) is int and n >= 0 for n in ends) or (
            self.stop is not None and self.stop <= self.start
        ):
            raise PositionError(
                f"{str(self)!r}: expected numbers from 0 with the second above the first; the last generated "
                "token is not known while tokens are generated"
            )

    def __str__(self) -> str:
        return f"generated({self.start}:{'' if self.stop is None else self.stop})"

    def select(self, prompt: Prompt) -> Tensor:
        raise PositionError(f"positions {str(self)!r} are not in the prompt; use phase='decode'")

    def select_generated(self, count: int) -> Tensor:
        return torch.arange(
            self.start, max(self.start, min(count, count if self.stop is None else self.stop))
        )


@dataclass(frozen=True)
class Given(Position):
    """Tokens that each call gives: `reft(**batch, positions={"edit": [[3], [4, 5]]})`."""

    def __str__(self) -> str:
        return "given"

    def select(self, prompt: Prompt) -> Tensor:
        raise PositionError(
            "positions 'given' come with the call, as in reft(**batch, positions={'edit': [[3], [4, 5]]}), "
            "and this call gives none"
        )


@dataclass(frozen=True)
class First(Position):
    """The first `count` tokens, or all of them where the prompt is shorter."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count("first", self.count)

    def __str__(self) -> str:
        return "first" if self.count == 1 else f"first({self.count})"

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.count

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(min(self.count, prompt.length))

    def select_generated(self, count: int) -> Tensor:
        return torch.arange(min(self.count, count))


@dataclass(frozen=True)
class Last(Position):
    """The last `count` tokens, or all of them where the prompt is shorter.

    While tokens are generated each new token is the last one in its turn, so that `last` among
    generated tokens is every one of them.
    """

    count: int = 1

    def __post_init__(self) -> None:
        _check_count("last", self.count)

    def __str__(self) -> str:
        return "last" if self.count == 1 else f"last({self.count})"

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.count

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(max(0, prompt.length - self.count), prompt.length)

    def select_generated(self, count: int) -> Tensor:
        if self.count != 1:
            return super().select_generated(count)
        return torch.arange(count)


@dataclass(frozen=True)
class Indices(Position):
    """Tokens by number; negative numbers count from the end of the prompt."""

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.numbers or not all(type(n) is int for n in self.numbers):
            raise PositionError(
                f"positions by number need one or more whole numbers, not {list(self.numbers)!r}"
            )

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.numbers))}]"

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(set(self.numbers))

    def select(self, prompt: Prompt) -> Tensor:
        for number in self.numbers:
            if not -prompt.length <= number < prompt.length:
                raise PositionError(
                    f"row {prompt.row}: position {number} of {str(self)!r} is outside its "
                    f"{prompt.length} prompt tokens; use numbers from {-prompt.length} to "
                    f"{prompt.length - 1}, or 'first(n)'/'last(n)', which stop at the prompt's ends"
                )
        return torch.tensor(sorted({n % prompt.length for n in self.numbers}))

    def select_generated(self, count: int) -> Tensor:
        if min(self.numbers) < 0:
            return super().select_generated(count)
        return torch.tensor(sorted({n for n in self.numbers if n < count}), dtype=torch.long)


@dataclass(frozen=True)
class PerRow(Position):
    """Tokens by number, for each row of the batch its own: `rows([3], [4, 5])`."""

    rows: tuple[tuple[int, ...], ...]
    by_length = False

    def __post_init__(self) -> None:
        if not self.rows or not all(type(n) is int for row in self.rows for n in row):
            raise PositionError(f"rows(...) needs a list of whole numbers for each row, not {self.rows!r}")

    def __str__(self) -> str:
        return f"rows({', '.join(str(list(row)) for row in self.rows)})"

    @property
    def size(self) -> int | None:  # type: ignore[override]
        sizes = {len(set(row)) for row in self.rows}
        return sizes.pop() if len(sizes) == 1 else None

    def check_rows(self, rows: int) -> None:
        if rows != len(self.rows):
            raise PositionError(
                f"positions are given for {len(self.rows)} rows, and the batch has {rows}; give one list a "
                "row"
            )

    def select(self, prompt: Prompt) -> Tensor:
        numbers = self.rows[prompt.row]
        return Indices(numbers).select(prompt) if numbers else torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Joined(Position):
    """The vectors of several tokens as one long vector, in their order: `joined(last(2))`.

    The intervention sees `count · width` numbers for each row. Every row must have all the tokens.
    """

    inner: Position

    def __post_init__(self) -> None:
        if self.inner.size is None or self.inner.joins > 1:
            raise PositionError(
                f"joined({self.inner}): expected a fixed number of tokens, such as joined(last(2)), "
                "joined(first(3)) or joined([0, -1])"
            )

    def __str__(self) -> str:
        return f"joined({self.inner})"

    @property
    def size(self) -> int | None:  # type: ignore[override]
        return self.inner.size

    @property
    def joins(self) -> int:  # type: ignore[override]
        return self.inner.size or 1

    @property
    def by_length(self) -> bool:  # type: ignore[override]
        return self.inner.by_length

    def check_rows(self, rows: int) -> None:
        self.inner.check_rows(rows)

    def select(self, prompt: Prompt) -> Tensor:
        chosen = self.inner.select(prompt)
        if len(chosen) != self.joins:
            raise PositionError(
                f"row {prompt.row}: {str(self)!r} joins {self.joins} different tokens, and the row's "
                f"{prompt.length} prompt tokens give {len(chosen)}"
            )
        return chosen


@dataclass(frozen=True)
class Union(Position):
    """Tokens that any of several positions choose, each once, `first(7)+last(7)`."""

    terms: tuple[Position, ...]

    def __post_init__(self) -> None:
        if any(term.joins > 1 for term in self.terms):
            raise PositionError(f"{str(self)!r}: joined(...) stands alone; write joined(a+b)")

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @property
    def generated(self) -> bool:  # type: ignore[override]
        return any(term.generated for term in self.terms)

    @property
    def size(self) -> int | None:  # type: ignore[override]
        sizes = [term.size for term in self.terms]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def by_length(self) -> bool:  # type: ignore[override]
        return all(term.by_length for term in self.terms)

    def check_rows(self, rows: int) -> None:
        for term in self.terms:
            term.check_rows(rows)

    def select(self, prompt: Prompt) -> Tensor:
        return torch.cat([term.select(prompt) for term in self.terms]).unique()

    def select_generated(self, count: int) -> Tensor:
        return torch.cat([term.select_generated(count) for term in self.terms]).unique()


def _terms(position: Position) -> tuple[Position, ...]:
    return position.terms if isinstance(position, Union) else (position,)


def _check_count(name: str, count: Any) -> None:
    if type(count) is not int or count < 1:
        raise PositionError(f"{name}(n) needs a whole number of 1 or more, not {count!r}")

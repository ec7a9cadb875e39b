"""Positions: which tokens of each row, as small objects and as the short strings that stand for them.

Positions count the real tokens of a row's prompt, as the attention mask gives them, so padding on
either side changes nothing. Negative numbers count from the end of the prompt.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.address.scanner import Scanner
from reftlab.errors import PositionError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "After",
    "All",
    "First",
    "Indices",
    "Last",
    "Position",
    "Prompt",
    "Span",
    "Token",
    "Union",
    "parse_position",
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
    """Base of all positions; `a + b` is the union of both."""

    def select(self, prompt: Prompt) -> Tensor:
        """Return the chosen tokens of one prompt, ascending, `(k,)` int64, counted from 0."""
        raise NotImplementedError

    def select_generated(self, count: int) -> Tensor:
        """Return the chosen ones among the first `count` generated tokens, `(k,)` int64.

        Raises:
            PositionError: the position has no meaning while tokens are still being generated.
        """
        raise PositionError(
            f"positions {str(self)!r} have no meaning among generated tokens; "
            "use 'all', 'last', 'first(n)' or numbers from 0, or phase='prompt'"
        )

    def __add__(self, other: Position | str | int | Sequence[int]) -> Position:
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
class First(Position):
    """The first `count` tokens, or all of them where the prompt is shorter."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count("first", self.count)

    def __str__(self) -> str:
        return "first" if self.count == 1 else f"first({self.count})"

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
class _Text(Position):
    """A position found by looking at text; `occurrence` counts from 1, or from the end below 0."""

    text: str
    occurrence: int = 1

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
class Span(_Text):
    """The tokens that cover a piece of text, `span('Eiffel Tower')`."""

    def select(self, prompt: Prompt) -> Tensor:
        return torch.arange(*self._cover(prompt))


@dataclass(frozen=True)
class After(_Text):
    """Every token of the prompt behind a piece of text, `after('Question:')`."""

    def select(self, prompt: Prompt) -> Tensor:
        stop = self._cover(prompt)[1]
        if stop == prompt.length:
            raise PositionError(f"row {prompt.row}: {str(self)!r}: no token follows that text in the prompt")
        return torch.arange(stop, prompt.length)


@dataclass(frozen=True)
class Token(_Text):
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


@dataclass(frozen=True)
class Union(Position):
    """Tokens that any of several positions choose, each once, `first(7)+last(7)`."""

    terms: tuple[Position, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    def select(self, prompt: Prompt) -> Tensor:
        return torch.cat([term.select(prompt) for term in self.terms]).unique()

    def select_generated(self, count: int) -> Tensor:
        return torch.cat([term.select_generated(count) for term in self.terms]).unique()


def parse_position(value: Position | str | int | Sequence[int]) -> Position:
    """Read positions.

    Args:
        value: a `Position`, a number, a list of numbers, or a string: `all`, `last`, `first`,
            `first(7)+last(7)` and its short form `f7+l7`, `[0, 2, -1]`, `span('Eiffel Tower')`,
            `token(' Paris')`, `after('text')`; the last three take the occurrence as a second
            argument, `span('John', -1)` for the last one.

    Raises:
        PositionError: the value is not a position; the message points at the character.

    >>> str(parse_position("f7+l7"))
    'first(7)+last(7)'
    >>> parse_position([0, -1])
    Indices(numbers=(0, -1))
    """
    if isinstance(value, Position):
        return value
    if type(value) is int:
        return Indices((value,))
    if isinstance(value, list | tuple):
        return Indices(tuple(value))
    if not isinstance(value, str):
        raise PositionError(f"positions must be a string such as 'last' or a list of numbers, not {value!r}")
    scanner = Scanner(value, "positions", PositionError)
    terms = [_term(scanner)]
    while scanner.take("+"):
        terms.append(_term(scanner))
    if not scanner.done:
        scanner.fail("'+' or the end")
    return terms[0] if len(terms) == 1 else Union(tuple(terms))


def _term(scanner: Scanner) -> Position:
    scanner.skip_spaces()
    start = scanner.at
    if scanner.take("["):
        term: Position = _numbers(scanner)
    elif (short := scanner.match(r"[fl][0-9]{1,9}(?![A-Za-z0-9_])")) is not None:
        term = _counted(scanner, First if short[0] == "f" else Last, int(short[1:]), start)
    else:
        term = _named(scanner, start)
    scanner.skip_spaces()
    return term


_WORDS = ("all", "first", "last", "span", "token", "after")


def _named(scanner: Scanner, start: int) -> Position:
    word = scanner.match(r"[A-Za-z_]+")
    if word == "all":
        return All()
    if word in ("first", "last"):
        kind = First if word == "first" else Last
        if not scanner.take("("):
            return kind()
        scanner.skip_spaces()
        count = scanner.integer("how many tokens")
        scanner.skip_spaces()
        scanner.expect(")")
        return _counted(scanner, kind, count, start)
    if word in ("span", "token", "after"):
        return _text(scanner, {"span": Span, "token": Token, "after": After}[word])
    scanner.fail(
        "all, first, last, first(n), last(n), span('text'), token('text'), after('text') or [numbers]",
        start,
        f".{near}" if (near := did_you_mean(word or "", _WORDS)) else "",
    )


def _counted(scanner: Scanner, kind: type[First] | type[Last], count: int, start: int) -> Position:
    if count < 1:
        scanner.fail("a count of 1 or more", start)
    return kind(count)


def _numbers(scanner: Scanner) -> Indices:
    numbers: list[int] = []
    while True:
        scanner.skip_spaces()
        numbers.append(scanner.integer())
        scanner.skip_spaces()
        if scanner.take("]"):
            return Indices(tuple(numbers))
        scanner.expect(",", "',' or ']'")


def _text(scanner: Scanner, kind: type[_Text]) -> Position:
    scanner.expect("(")
    scanner.skip_spaces()
    start = scanner.at
    quoted = scanner.match(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
    if quoted is None:
        scanner.fail("a quoted text")
    try:
        text = ast.literal_eval(quoted)
    except (SyntaxError, ValueError):
        scanner.fail("a quoted text with valid escapes", start)
    if not text:
        scanner.fail("a text that is not empty", start)
    scanner.skip_spaces()
    occurrence = 1
    if scanner.take(","):
        scanner.skip_spaces()
        here = scanner.at
        occurrence = scanner.integer("which occurrence, 1 for the first, -1 for the last")
        if occurrence == 0:
            scanner.fail("an occurrence other than 0", here)
        scanner.skip_spaces()
    scanner.expect(")")
    return kind(text, occurrence)


def _terms(position: Position) -> tuple[Position, ...]:
    return position.terms if isinstance(position, Union) else (position,)


def _check_count(name: str, count: Any) -> None:
    if type(count) is not int or count < 1:
        raise PositionError(f"{name}(n) needs a whole number of 1 or more, not {count!r}")


def _first_true(low: int, high: int, test: Any) -> int:
    """The smallest number in `[low, high]` that passes a test which, once passed, stays passed."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle + 1, high)
    return low


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :]

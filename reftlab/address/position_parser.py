"""The short strings that stand for positions."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from reftlab.address.position import (
    All,
    Every,
    First,
    Generated,
    Given,
    Indices,
    Joined,
    Last,
    PerRow,
    Position,
    Union,
)
from reftlab.address.scanner import Scanner
from reftlab.address.text_position import After, Span, TextPosition, Token
from reftlab.errors import PositionError, did_you_mean

__all__ = ["parse_position"]


def parse_position(value: Position | str | int | Sequence[Any]) -> Position:
    """Read positions.

    Args:
        value: a `Position`, a number, a list of numbers, a list of such lists, one for each row, or
            a string: `all`, `every(2)`, `last`, `first`, `first(7)+last(7)` and its short form
            `f7+l7`, `[0, 2, -1]`, `rows([3], [4, 5])`, `joined(last(2))`, `generated(0:5)`,
            `given`, `span('Eiffel Tower')`, `token(' Paris')`, `after('text')`; the last three take
            the occurrence as a second argument, `span('John', -1)` for the last one.

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
        if value and all(isinstance(row, list | tuple) for row in value):
            return PerRow(tuple(tuple(row) for row in value))
        return Indices(tuple(value))
    if not isinstance(value, str):
        raise PositionError(f"positions must be a string such as 'last' or a list of numbers, not {value!r}")
    scanner = Scanner(value, "positions", PositionError)
    position = _sum(scanner)
    if not scanner.done:
        scanner.fail("'+' or the end")
    return position


def _sum(scanner: Scanner) -> Position:
    terms = [_term(scanner)]
    while scanner.take("+"):
        here = scanner.at
        terms.append(_term(scanner))
        if any(term.joins > 1 for term in terms):
            scanner.fail("joined(...) to stand alone, as in joined(first+last)", here)
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


_WORDS = (
    "all", "every", "first", "last", "span", "token", "after", "rows", "joined", "generated", "given",
)  # fmt: skip


def _named(scanner: Scanner, start: int) -> Position:
    word = scanner.match(r"[A-Za-z_]+")
    if word in ("all", "given"):
        return All() if word == "all" else Given()
    if word in ("first", "last", "every"):
        counted: dict[str, type[First] | type[Last] | type[Every]] = {
            "first": First,
            "last": Last,
            "every": Every,
        }
        kind = counted[word]
        if not scanner.take("("):
            return kind()
        scanner.skip_spaces()
        count = scanner.integer("how many tokens")
        scanner.skip_spaces()
        scanner.expect(")")
        return _counted(scanner, kind, count, start)
    if word in ("span", "token", "after"):
        return _text(scanner, {"span": Span, "token": Token, "after": After}[word])
    if word == "generated" and not scanner.peek("("):
        return Generated()
    if word in ("rows", "joined", "generated"):
        scanner.expect("(")
        term = {"rows": _rows, "joined": _joined, "generated": _generated}[word](scanner, start)
        scanner.expect(")")
        return term
    scanner.fail(
        "all, first, last, first(n), last(n), span('text'), token('text'), after('text') or [numbers]",
        start,
        f".{near}" if (near := did_you_mean(word or "", _WORDS)) else "",
    )


def _rows(scanner: Scanner, start: int) -> PerRow:
    rows: list[tuple[int, ...]] = []
    while True:
        scanner.skip_spaces()
        scanner.expect("[", "a list of numbers, '[3]'")
        scanner.skip_spaces()
        rows.append(() if scanner.take("]") else _numbers(scanner).numbers)
        scanner.skip_spaces()
        if scanner.peek(")"):
            return PerRow(tuple(rows))
        scanner.expect(",", "',' or ')'")


def _joined(scanner: Scanner, start: int) -> Joined:
    inner = _sum(scanner)
    try:
        return Joined(inner)
    except PositionError:
        scanner.fail("joined(...) with a fixed number of tokens, such as joined(last(2))", start)


def _generated(scanner: Scanner, start: int) -> Generated:
    scanner.skip_spaces()
    first = 0 if scanner.peek(":") else scanner.integer("a range such as 0:5")
    scanner.skip_spaces()
    stop: int | None = first + 1
    if scanner.take(":"):
        scanner.skip_spaces()
        stop = None if scanner.peek(")") else scanner.integer("a number or ')'")
        scanner.skip_spaces()
    try:
        return Generated(first, stop)
    except PositionError:
        scanner.fail("generated(start:stop) with numbers from 0, the second above the first", start)


def _counted(
    scanner: Scanner, kind: type[First] | type[Last] | type[Every], count: int, start: int
) -> Position:
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


def _text(scanner: Scanner, kind: type[TextPosition]) -> Position:
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

"""`unit_locations` and `subspaces`: nested lists, read once and turned into tokens of each row.

pyvene writes `{"sources->base": (source, base)}`, each of the two `[intervention][row][unit]`, and
has short forms. A unit is a column of the padded batch. Native positions count real tokens, so a
column becomes the number of real tokens before it; a column of padding, whose edit no real token
can see, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reftlab.errors import PositionError
from reftlab.runtime.window import Layout

__all__ = ["Tokens", "Units", "batch_rows", "read_locations", "read_subspaces", "token_numbers"]

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Units:
    """Where one intervention acts in one run.

    Attributes:
        columns: for each row the columns of its tokens, or None for every token.
        heads: the heads, or None for all.
    """

    columns: Rows | None = None
    heads: tuple[int, ...] | None = None


Pair = tuple[Units, Units]


@dataclass(frozen=True)
class Tokens:
    """Which columns of a batch are real tokens.

    Attributes:
        rows: number of rows.
        width: number of columns; 0 where the batch has no tokens.
        numbers: for each row the number of each real token by its column; None without tokens.
    """

    rows: int
    width: int
    numbers: tuple[dict[int, int], ...] | None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Tokens:
        """Those of a call's inputs.

        Raises:
            PositionError: they hold no tensor.
            RunError: they contradict each other.
        """
        layout = Layout.of(inputs, causal=False)
        if layout is None:
            return cls(batch_rows(inputs), 0, None)
        numbers = [{column: n for n, column in enumerate(row.tolist())} for row in layout.prompts]
        return cls(layout.rows, layout.width, tuple(numbers))

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return self.numbers is None or all(len(row) == self.width for row in self.numbers)


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """Number of rows of a batch.

    Raises:
        PositionError: it holds no tensor.
    """
    for value in inputs.values():
        if isinstance(value, Tensor):
            return int(value.shape[0])
    raise PositionError("base holds no tensor; give the tokenizer's output with return_tensors='pt'")


def read_locations(
    given: Any, units: Sequence[str], rows: int, keys: Sequence[str] | None = None
) -> list[Pair]:
    """The units of each intervention, in the source and in the base.

    Args:
        given: `unit_locations` in any of pyvene's forms: None for everywhere; `{"base": 3}` or
            `{"sources->base": 3}` for one column everywhere; `(4, 3)` for one in the source and one
            in the base; `[0, 1, 2]` for several in every row; or nested lists. `{"base": [0, 1]}`
            means columns 0 and 1, of which pyvene takes the second alone.
        units: what each intervention's units are, `pos`, `h`, `h.pos` or `t`.
        rows: rows of the base.
        keys: in serial mode the key of each intervention, `source_0->source_1`, …, `source_1->base`.

    Raises:
        PositionError: what cannot be read; the message quotes it.
    """
    count, given = len(units), _plain(given)
    if given is None:
        return [(Units(), Units())] * count
    if not isinstance(given, Mapping):
        raise PositionError(f"unit_locations={given!r}: expected {{'sources->base': (source, base)}}")
    if keys is not None:
        missing = [key for key in keys if key not in given]
        if missing:
            raise PositionError(f"unit_locations lacks {missing[0]!r}; serial mode has {', '.join(keys)}")
        sides = [_sides(given[key], False, key) for key in keys]
        picked = [
            tuple(_own(side, keys[:n].count(key), keys.count(key)) for side in sides[n])
            for n, key in enumerate(keys)
        ]
    else:
        known = [key for key in ("sources->base", "base") if key in given]
        if not known:
            raise PositionError(f"unit_locations has {list(given)}: expected 'sources->base' or 'base'")
        both = _sides(given[known[0]], known[0] == "base", known[0])
        picked = [tuple(_own(side, number, count) for side in both) for number in range(count)]
    return [
        (_units(source, unit, rows), _units(base, unit, rows))
        for (source, base), unit in zip(picked, units, strict=True)
    ]


def read_subspaces(given: Any, count: int, rows: int) -> list[list[list[int]] | None]:
    """For each intervention the directions of each row, or None for all.

    Args:
        given: one number, a list of numbers, or `[intervention][row][direction]`, with None for an
            intervention or a row that keeps all.

    Raises:
        PositionError: what cannot be read.
    """
    given = _plain(given)
    if given is None:
        return [None] * count
    if type(given) is int:
        return [[[given]] * rows] * count
    if isinstance(given, list) and given and all(type(n) is int for n in given):
        return [[given] * rows] * count
    if not isinstance(given, list) or len(given) != count:
        size = len(given) if isinstance(given, list) else type(given).__name__
        raise PositionError(
            f"subspaces has {size} entries and there are {count} interventions; give one each"
        )
    found: list[list[list[int]] | None] = []
    for number, each in enumerate(given):
        if each is not None and (not isinstance(each, list) or len(each) != rows):
            raise PositionError(f"subspaces[{number}]={each!r}: expected directions for each of {rows} rows")
        found.append(None if each is None else [_numbers(row, f"subspaces[{number}]") for row in each])
    return found


def token_numbers(columns: Rows, tokens: Tokens, what: str) -> list[list[int | None]]:
    """Columns as numbers among the real tokens of their rows; None for padding.

    Raises:
        PositionError: a row or a column that the batch does not have.
    """
    if tokens.numbers is None:
        return [list(chosen) for chosen in columns]
    if len(columns) != tokens.rows:
        raise PositionError(
            f"unit_locations of {what} are for {len(columns)} rows, and the batch has {tokens.rows}"
        )
    for row, chosen in enumerate(columns):
        wrong = [c for c in chosen if not 0 <= c < tokens.width]
        if wrong:
            raise PositionError(
                f"unit_locations of {what}: row {row} has column {wrong[0]}, and the batch has columns 0 to "
                f"{tokens.width - 1}"
            )
    return [[numbers.get(c) for c in chosen] for chosen, numbers in zip(columns, tokens.numbers, strict=True)]


def _plain(given: Any) -> Any:
    """Nested lists of plain numbers out of what may hold tensors and arrays."""
    if isinstance(given, Mapping):
        return {key: _plain(value) for key, value in given.items()}
    if hasattr(given, "tolist"):
        return given.tolist()
    return [_plain(value) for value in given] if isinstance(given, list | tuple | range) else given


def _sides(given: Any, base_only: bool, key: str) -> tuple[Any, Any]:
    """What is said of the source and of the base."""
    if type(given) is int:
        return (None, given) if base_only else (given, given)
    if base_only:
        return None, given
    if isinstance(given, list) and len(given) == 2:
        # Two numbers are a pair in pyvene, a list of more is the same columns on both sides.
        return given[0], given[1]
    if isinstance(given, list) and given and all(type(n) is int for n in given):
        return given, given
    raise PositionError(
        f"unit_locations[{key!r}]={given!r}: expected a column, columns, or (source, base), each of them "
        "[intervention][row][unit] or None"
    )


def _own(side: Any, number: int, count: int) -> Any:
    """One intervention's part of one side."""
    if side is None or type(side) is int or all(type(n) is int for n in side):
        return side
    if len(side) != count:
        raise PositionError(
            f"unit_locations has places for {len(side)} interventions and there are {count}; give one list "
            "each"
        )
    return side[number]


def _units(given: Any, unit: str, rows: int) -> Units:
    if given is None:
        return Units()
    if unit == "h.pos":
        if not isinstance(given, list) or len(given) != 2:
            raise PositionError(
                f"unit 'h.pos' takes [heads, positions], each a list for each row, not {given!r}"
            )
        return Units(_rows(given[1], rows), _same_heads(_rows(given[0], rows)))
    if unit == "h":
        return Units(None, _same_heads(_rows(given, rows)))
    return Units(_rows(given, rows))


def _rows(given: Any, rows: int) -> Rows:
    """A list of units for each row; one number or a flat list is for every row."""
    if type(given) is int:
        given = [given]
    flat = all(type(n) is int for n in given)
    if flat:
        return (tuple(given),) * rows
    found = tuple(tuple(_numbers(row, "unit_locations")) for row in given)
    if len(found) != rows:
        raise PositionError(
            f"unit_locations has lists for {len(found)} rows and the base has {rows}; give one list a row"
        )
    return found


def _same_heads(rows: Rows) -> tuple[int, ...]:
    if len(set(rows)) > 1:
        raise PositionError(
            f"unit_locations name other heads in other rows, {[list(row) for row in rows]}, which is not "
            "supported; the native way is one edit for each head, rl.Edit(..., heads=3), and tasks= "
            "for the rows"
        )
    return rows[0]


def _numbers(given: Any, what: str) -> list[int]:
    if type(given) is int:
        return [given]
    if not isinstance(given, list) or not all(type(n) is int for n in given):
        raise PositionError(f"{what} has {given!r}: expected whole numbers for each row")
    return given

"""The prompts of a sweep: pairs of single rows without padding, and the columns of its map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reftlab.address import All, Position, Prompt, parse_position
from reftlab.errors import DataError, PositionError
from reftlab.runtime.calls import Layouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime import BoundModel

__all__ = ["Column", "Columns", "Pair", "Row", "column_tokens", "columns_of", "read_pairs"]


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt.

    Attributes:
        inputs: the model's inputs, one row each, without padding.
        layouts: where its tokens stand, by stream.
        tokens: its tokens as text, or as numbers where there is no tokenizer; by stream.
    """

    inputs: dict[str, Tensor]
    layouts: Layouts
    tokens: Mapping[str, tuple[str, ...]]

    def prompt(self, stream: str, tokenizer: Any, number: int) -> Prompt:
        """What positions need to know of it."""
        layout = self.layouts[stream]
        ids = None if layout.ids is None else tuple(layout.ids[0].tolist())
        return Prompt(layout.width, ids, tokenizer, number)


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean prompt and its corrupted one, or a clean one alone."""

    clean: Row
    corrupt: Row | None


@dataclass(frozen=True)
class Column:
    """The tokens of one column of the map in one pair, in the clean and in the corrupted prompt."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """The columns of a map.

    Attributes:
        names: each column's label: a token, or the name of a position.
        of_pairs: for each pair its columns.
        every_token: whether each token is a column.
    """

    names: tuple[str, ...]
    of_pairs: tuple[tuple[Column, ...], ...]
    every_token: bool = False


def read_pairs(reft: BoundModel, clean: Any, corrupt: Any, tokenizer: Any) -> tuple[Pair, ...]:
    """The prompts as pairs of single rows.

    Args:
        reft: the bound model.
        clean, corrupt: one text, several, or the tokenizer's output for them; corrupt may be None.
        tokenizer: for texts.

    Raises:
        DataError: a prompt that cannot be used, or other numbers of clean and corrupted ones.
    """
    first = _rows(reft, clean, tokenizer, "clean")
    if corrupt is None:
        return tuple(Pair(row, None) for row in first)
    second = _rows(reft, corrupt, tokenizer, "corrupt")
    if len(first) != len(second):
        raise DataError(
            f"clean has {len(first)} prompts and corrupt {len(second)}; each clean prompt needs its "
            "corrupted one"
        )
    return tuple(Pair(one, other) for one, other in zip(first, second, strict=True))


def _rows(reft: BoundModel, prompts: Any, tokenizer: Any, name: str) -> list[Row]:
    if isinstance(prompts, Mapping):
        given = reft._calls.forward_inputs(prompts)
        # Models take one row of position ids for all rows.
        shared = [n for n, v in given.items() if n.endswith("position_ids") and v.dim() == 2 and len(v) == 1]
        sizes = {
            v.shape[0] for n, v in given.items() if n not in shared and isinstance(v, Tensor) and v.dim()
        }
        if len(sizes) != 1 or 0 in sizes:
            raise DataError(
                f"{name}: expected a text, several, or the tokenizer's output with "
                f"return_tensors='pt', not a mapping with {', '.join(map(str, prompts)) or 'nothing in it'}"
            )
        count = sizes.pop()
        given |= {name: given[name].expand(count, -1) for name in shared}
        return [_row(reft, _cut(given, row), tokenizer, f"{name}[{row}]") for row in range(count)]
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{name}={prompts!r}: expected a text, several, or the tokenizer's output")
    if tokenizer is None:
        raise DataError(
            f"{name} is a text, and there is no tokenizer; give tokenizer= or the tokenizer's output"
        )
    rows = []
    for number, text in enumerate(texts):
        made = reft._calls.forward_inputs(dict(tokenizer(text, return_tensors="pt")))
        rows.append(_row(reft, made, tokenizer, f"{name}[{number}]"))
    return rows


def _cut(inputs: Mapping[str, Any], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    own = {key: value[row : row + 1] for key, value in inputs.items() if isinstance(value, Tensor)}
    for prefix in ("", "decoder_"):
        mask = own.get(f"{prefix}attention_mask")
        if mask is None or mask.dim() != 2:
            continue
        real = mask[0] != 0
        for key, value in own.items():
            of_decoder = key.startswith("decoder_")
            if of_decoder == bool(prefix) and value.dim() > 1 and value.shape[1] == len(real):
                own[key] = value[:, real]
    own.pop("labels", None)
    return own


def _row(reft: BoundModel, inputs: dict[str, Tensor], tokenizer: Any, name: str) -> Row:
    inputs = {key: value.to(reft.device) for key, value in inputs.items()}
    layouts = reft._calls.layouts(inputs)
    if not layouts or any(layout.width == 0 for layout in layouts.values()):
        raise DataError(f"{name} has no tokens")
    tokens = {stream: _texts(layout.ids, layout.width, tokenizer) for stream, layout in layouts.items()}
    return Row(inputs, layouts, tokens)


def _texts(ids: Tensor | None, width: int, tokenizer: Any) -> tuple[str, ...]:
    if ids is None:
        return tuple(map(str, range(width)))
    if tokenizer is None:
        return tuple(map(str, ids[0].tolist()))
    return tuple(tokenizer.decode([number]) for number in ids[0].tolist())


def columns_of(
    pairs: Sequence[Pair], positions: Any, stream: str, tokenizer: PreTrainedTokenizerBase | None
) -> Columns:
    """The columns of a map: each token, or each of several positions.

    Args:
        pairs: the prompts.
        positions: `"all"` for each token; one position or several; or names with a position each. A
            tuple of two positions stands for the clean prompt's and the corrupted prompt's.
        stream: whose tokens.
        tokenizer: for positions that look at text.

    Raises:
        DataError: prompts of different lengths, of which each token has no counterpart.
        PositionError: a position that a prompt lacks, or that is of another size in its counterpart.
    """
    for pair in pairs:
        for row in (pair.clean, pair.corrupt):
            if row is not None and stream not in row.layouts:
                raise DataError(f"the prompts have no {stream} tokens, and the sites have; give those too")
    if isinstance(positions, dict) and not positions:
        raise DataError("positions={}: expected 'all', or names with a position each")
    named = _named(positions)
    if named is None:
        return _every_token(pairs, stream)
    of_pairs = []
    for number, pair in enumerate(pairs):
        one = pair.clean.prompt(stream, tokenizer, number)
        other = one if pair.corrupt is None else pair.corrupt.prompt(stream, tokenizer, number)
        of_pairs.append(tuple(_column(name, both, one, other) for name, both in named.items()))
    return Columns(tuple(named), tuple(of_pairs))


def _named(positions: Any) -> dict[str, tuple[Position, Position]] | None:
    """Each column's position in the clean and in the corrupted prompt; None for every token."""
    if isinstance(positions, str | int | Position):
        parsed = parse_position(positions)
        return None if parsed == All() else {str(parsed): (parsed, parsed)}
    if isinstance(positions, Mapping):
        given = list(positions.items())
    elif isinstance(positions, list | tuple) and positions:
        given = [(None, value) for value in positions]
    else:
        raise PositionError(
            f"positions={positions!r}: expected 'all', a position such as \"span('Paris')\", several "
            "of them, or a mapping from names to positions"
        )
    found: dict[str, tuple[Position, Position]] = {}
    for name, value in given:
        sides = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
        one, other = (parse_position(side) for side in sides)
        label = str(one if one == other else f"{one} | {other}") if name is None else str(name)
        if label in found:
            raise PositionError(f"positions={positions!r} name {label!r} twice")
        found[label] = (one, other)
    return found


def column_tokens(name: str, position: Position, prompt: Prompt, called: str = "prompt") -> tuple[int, ...]:
    """Numbers of the tokens of one prompt that belong to a column.

    Args:
        name: of the column; called: what the prompt is, for messages.
        position: the column's.
        prompt: the prompt.

    Raises:
        PositionError: the prompt has no such token.
    """
    try:
        chosen = tuple(position.select(prompt).tolist())
    except PositionError as error:
        raise PositionError(f"positions, column {name!r}, {called}: {error}") from error
    if not chosen:
        raise PositionError(f"positions, column {name!r}: {called} {prompt.row} has no such token")
    return chosen


def _column(name: str, positions: tuple[Position, Position], clean: Prompt, corrupt: Prompt) -> Column:
    found = []
    for position, prompt, side in zip(positions, (clean, corrupt), ("clean", "corrupt"), strict=True):
        found.append(column_tokens(name, position, prompt, f"{side} prompt"))
    if len(found[0]) != len(found[1]):
        raise PositionError(
            f"positions, column {name!r}: {len(found[0])} tokens in clean prompt {clean.row} and "
            f"{len(found[1])} in "
            "its corrupted one; both sides need as many, so that each token has its counterpart"
        )
    return Column(*found)


def _every_token(pairs: Sequence[Pair], stream: str) -> Columns:
    for number, pair in enumerate(pairs):
        if pair.corrupt is None:
            continue
        one, other = (row.tokens[stream] for row in (pair.clean, pair.corrupt))
        if len(one) != len(other):
            raise DataError(
                f"positions='all' needs as many tokens in both prompts, and pair {number} has {len(one)} and "
                f"{len(other)}: clean {list(one)!r}, corrupt {list(other)!r}. Give prompts of one "
                "length, or name positions, as in positions=[\"span('Mary')\", 'last']"
            )
    lengths = [pair.clean.layouts[stream].width for pair in pairs]
    if len(set(lengths)) > 1:
        raise DataError(
            f"positions='all' needs prompts of one length, and the pairs have {lengths} tokens; name "
            "positions, as in positions=[\"span('Mary')\", 'last']"
        )
    columns = tuple(Column((token,), (token,)) for token in range(lengths[0]))
    names = []
    for token in range(lengths[0]):
        rows = [row for pair in pairs for row in (pair.clean, pair.corrupt) if row is not None]
        seen = list(dict.fromkeys(row.tokens[stream][token] for row in rows))
        names.append("/".join(seen[:2]) + ("/…" if len(seen) > 2 else ""))
    return Columns(tuple(names), (columns,) * len(pairs), True)

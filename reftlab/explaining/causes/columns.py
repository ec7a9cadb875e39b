"""The columns of a mediation map: which tokens of each example are patched together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reftlab.address import All, Position, Prompt, parse_position
from reftlab.errors import DataError, PositionError
from reftlab.explaining.causes.mediated import ANSWER
from reftlab.explaining.geometry.tokens import readable_token
from reftlab.measuring import Question
from reftlab.sweeping.prompts import column_tokens

__all__ = ["Columns", "columns_of"]

_MOST_COLUMNS = 12


@dataclass(frozen=True)
class Columns:
    """The columns of a map.

    Attributes:
        names: label of each.
        tokens: for each example and column the numbers of its tokens, prompt and answer together.
        every_token: whether each token of the prompts is a column.
        note: what was left out, in words, or an empty text.
    """

    names: tuple[str, ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    every_token: bool
    note: str


def columns_of(question: Question, positions: Any, tokenizer: Any) -> Columns:
    """The columns of a map; `positions` as for `rl.mediate`.

    Raises:
        DataError: each token was asked for, and the prompts are not of one length.
        PositionError: a position that cannot be read, or that a prompt lacks.
    """
    lengths = [len(prompt) for prompt in question.prompts]
    alike, note, names = len(set(lengths)) == 1, "", list[str]()
    chosen: list[list[tuple[int, ...]]]
    whole = isinstance(positions, str | Position) and parse_position(positions) == All()
    if whole and not alike:
        raise DataError(
            f"positions='all' needs prompts of one length, and the prompts have {lengths} tokens; name "
            "positions, as in positions=[\"span('Mary')\", 'last'], or leave positions out"
        )
    every = whole or (positions is None and alike)
    if every:
        chosen = [[(token,) for token in range(length)] for length in lengths]
        for token in range(lengths[0]):
            seen = dict.fromkeys(readable_token(tokenizer, prompt[token]) for prompt in question.prompts)
            names.append("/".join(list(seen)[:2]) + ("/…" if len(seen) > 2 else ""))
    elif positions is None:
        count = min(_MOST_COLUMNS, *lengths)
        chosen = [[(length - back,) for back in range(count, 0, -1)] for length in lengths]
        names = [f"−{back}" for back in range(count, 0, -1)]
        note = (
            f"Prompts have from {min(lengths)} to {max(lengths)} tokens; the last {count} of each are shown."
        )
    else:
        named = _named(positions)
        chosen, names = [], list(named)
        for number, prompt in enumerate(question.prompts):
            given = Prompt(len(prompt), prompt, tokenizer, number)
            chosen.append([column_tokens(name, position, given) for name, position in named.items()])
    if any(question.answers):
        names.append(ANSWER)
        for own, length, count in zip(chosen, lengths, question.answers, strict=True):
            own.append(tuple(range(length, length + count)))
    return Columns(tuple(names), tuple(map(tuple, chosen)), every, note)


def _named(positions: Any) -> dict[str, Position]:
    if isinstance(positions, Mapping) and positions:
        return {str(name): parse_position(value) for name, value in positions.items()}
    given = positions if isinstance(positions, list | tuple) else [positions]
    found = [parse_position(value) for value in given]
    names = list(map(str, found))
    if not names or len(set(names)) < len(names):
        raise PositionError(f"positions={positions!r}: expected one position or several, each once")
    return dict(zip(names, found, strict=True))

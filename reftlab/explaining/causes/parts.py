"""The parts of edits, edits, layers, positions or dimensions, and runs in which only some of them act."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.address import Given
from reftlab.errors import DataError, did_you_mean
from reftlab.explaining.altering import Change, Written, altered, nothing, only_along, without_directions
from reftlab.explaining.causes.game import Coalitions
from reftlab.explaining.causes.tokens import Token, named_tokens
from reftlab.explaining.geometry.directions import CONSTANT, directions_of
from reftlab.explaining.geometry.record import Recorded
from reftlab.measuring import Behaviour
from reftlab.runtime import BoundModel
from reftlab.runtime.modes import evaluating
from reftlab.training.data import Example

if TYPE_CHECKING:
    from reftlab.explaining.subject import Subject
    from reftlab.runtime.places import BoundEdit

__all__ = ["By", "Part", "banded", "game_of", "parts_of", "present", "taken_apart"]

By = Literal["edit", "site", "layer", "position", "dimension"]
"""What counts as one part: a named edit with all its sites, one site of an edit, all edits of one block,
one edited token of each row, or one direction of one edit."""

REST = "rest"
"""Label of what an edit adds outside all of its directions."""

_SEEN = 1e-6
"""The share of the squared length written that must lie outside the directions to be a part."""


@dataclass(frozen=True, eq=False)
class Part:
    """What can act or be left out by itself.

    Attributes:
        label: its name among the parts.
        by: what counts as one part.
        edits: keys of the bound edits that it is a part of.
        token: which of a row's edited tokens, where parts are positions.
        rows: its direction, `(1, width)`, where parts are dimensions; None for the rest outside all
            directions.
    """

    label: str
    by: str
    edits: tuple[str, ...]
    token: Token | None = None
    rows: Float[Tensor, "1 width"] | None = None

    def __repr__(self) -> str:
        return f"Part({self.label!r} of {', '.join(self.edits)})"


def parts_of(
    reft: BoundModel,
    recorded: Recorded | None = None,
    by: By = "edit",
    of: str | Sequence[str] | None = None,
) -> tuple[Part, ...]:
    """Take the edits of a bound model apart.

    All parts together are exactly the edits that they are parts of.

    Args:
        reft: the bound model.
        recorded: what the edits were given and made on the examples; needed for positions and dimensions.
        by: what counts as one part. Positions are named as the edits' own positions count them, from the
            first or from the last token of the prompt, and one position is a part of all edits together.
            Dimensions are the directions of one edit by falling gain, its constant part, and what it adds
            outside of these, if anything.
        of: names of edits, or keys of their sites, to take apart; the others stay as they are. All unless
            given; dimensions are those of one.

    Raises:
        DataError: there is nothing to take apart, or it cannot be taken apart in this way.

    >>> parts_of(reft, by="layer")                                           # doctest: +SKIP
    (Part('block 3' of emoji[3]), Part('block 7' of emoji[7]))
    """
    if by not in get_args(By):
        raise DataError(f"by={by!r}: expected one of {list(get_args(By))}")
    chosen = _chosen(reft, of)
    if by == "dimension":
        return _dimensions(reft, chosen, _needed(recorded, by), of)
    if by == "position":
        return _positions(chosen, _needed(recorded, by))
    groups: dict[str, list[str]] = {}
    names = _block_names(chosen)
    for bound in chosen:
        label = {"edit": bound.edit.name, "site": bound.key, "layer": names[bound.key]}[by]
        groups.setdefault(label, []).append(bound.key)
    return tuple(Part(label, by, tuple(keys)) for label, keys in groups.items())


@contextlib.contextmanager
def present(reft: BoundModel, parts: Sequence[Part], chosen: Collection[int]) -> Iterator[BoundModel]:
    """Let only some parts act inside a `with` block; edits that none of the parts belong to act as ever.

    Args:
        reft: the bound model.
        parts: all parts, as from `parts_of`.
        chosen: numbers of those that act. With all of them nothing at all is altered.

    >>> with present(reft, parts, {0, 2}):                                   # doctest: +SKIP
    ...     logits = reft(**batch).logits
    """
    changes: dict[str, Change] = {}
    for key in dict.fromkeys(key for part in parts for key in part.edits):
        mine = [(number in chosen, part) for number, part in enumerate(parts) if key in part.edits]
        if all(acts for acts, _ in mine):
            continue
        if not any(acts for acts, _ in mine):
            changes[key] = nothing
        elif mine[0][1].by == "dimension":
            changes[key] = _only_directions(mine)
        else:
            (bound,) = (bound for bound in reft.edits if bound.key == key)
            changes[key] = _only_tokens(bound, frozenset(part.token for acts, part in mine if acts))
    with altered(reft, changes):
        yield reft


def banded(parts: Sequence[Part], count: int) -> tuple[Part, ...]:
    """Neighbouring parts joined into at most `count` larger ones of like size, as blocks into bands.

    Args:
        parts: whole edits, sites or layers, in the order in which they should stay.
        count: how many there may be.

    >>> banded([Part(f"block {n}", "layer", (f"e[{n}]",)) for n in range(5)], 2)
    (Part('block 0 to block 1' of e[0], e[1]), Part('block 2 to block 4' of e[2], e[3], e[4]))
    """
    if len(parts) <= count:
        return tuple(parts)
    ends = [len(parts) * number // count for number in range(count + 1)]
    bands = [parts[start:stop] for start, stop in pairwise(ends)]
    return tuple(
        Part(
            band[0].label if len(band) == 1 else f"{band[0].label} to {band[-1].label}",
            band[0].by,
            tuple(key for part in band for key in part.edits),
        )
        for band in bands
    )


def game_of(
    reft: BoundModel,
    behaviour: Behaviour,
    parts: Sequence[Part],
    tick: Callable[[str], None] = lambda what: None,
) -> Coalitions:
    """The game in which the parts of edits are the players and a behaviour is what they achieve."""

    def value(chosen: frozenset[int]) -> Tensor:
        with evaluating(reft), torch.no_grad(), present(reft, parts, chosen):
            return behaviour()

    known = {frozenset(range(len(parts))): behaviour.full}
    if {key for part in parts for key in part.edits} == {bound.key for bound in reft.edits}:
        known[frozenset()] = behaviour.bare
    return Coalitions(
        value, [part.label for part in parts], behaviour.weights, name=behaviour.name, unit=behaviour.unit,
        by=parts[0].by, known=known, tick=tick,
    )  # fmt: skip


def taken_apart(subject: Subject, by: By, of: str | Sequence[str] | None) -> tuple[Part, ...]:
    """The parts of what is explained, see `parts_of`; what passes the edits is recorded where it is needed.

    Raises:
        DataError: as `parts_of`, or examples that move an edit where its own positions name the parts.
    """
    if by == "position":
        _check_own_positions(subject.reft, subject.rows)
    return parts_of(subject.reft, subject.recorded if by in ("position", "dimension") else None, by, of)


def _chosen(reft: BoundModel, of: str | Sequence[str] | None) -> tuple[BoundEdit, ...]:
    if not reft.edits:
        raise DataError("this graph has no edits, so there is nothing to take apart")
    if of is None:
        return reft.edits
    names = [of] if isinstance(of, str) else list(of)
    known = dict.fromkeys(name for bound in reft.edits for name in (bound.edit.name, bound.key))
    for name in names:
        if name not in known:
            raise DataError(
                f"of={name!r}: there is no such edit; there is {list(known)}.{did_you_mean(name, known)}"
            )
    if not names:
        raise DataError("of=[] names no edit; leave it out to take all of them apart")
    return tuple(bound for bound in reft.edits if bound.key in names or bound.edit.name in names)


def _needed(recorded: Recorded | None, by: str) -> Recorded:
    if recorded is None:
        raise DataError(f"by={by!r} needs recorded=, what the edits were given and made on the examples")
    return recorded


def _block_names(chosen: Sequence[BoundEdit]) -> dict[str, str]:
    """The block of each edit, `block 3`, with the stack's path where several stacks have edits."""
    found: dict[str, tuple[str, str]] = {}
    for bound in chosen:
        words = bound.site.module.split(".")
        at = next((place for place, word in enumerate(words) if word.isdigit()), None)
        stack = "" if at is None else ".".join(words[:at])
        found[bound.key] = stack, str(bound.site) if at is None else f"block {words[at]}"
    several = len({stack for stack, _ in found.values() if stack}) > 1
    return {key: f"{stack} {name}" if several and stack else name for key, (stack, name) in found.items()}


def _check_own_positions(reft: BoundModel, rows: Sequence[Example]) -> None:
    """Refuse examples that put an edit elsewhere than its own positions, by which tokens are named."""
    given = {name for row in rows for name in row.positions or ()}
    for bound in reft.edits:
        if bound.edit.name in given and not isinstance(bound.positions, Given):
            raise DataError(
                f"by='position': the examples give edit {bound.edit.name!r} other tokens than its own, "
                f"{str(bound.positions)!r}; write positions='given' in the graph"
            )


def _positions(chosen: Sequence[BoundEdit], recorded: Recorded) -> tuple[Part, ...]:
    edits: dict[Token, list[str]] = {}
    for bound in chosen:
        if bound.edit.when is not None:
            raise DataError(
                f"by='position': edit {bound.key!r} acts under a condition, which decides by itself at which "
                "tokens it acts; leave it out with of=, or take it apart by 'edit' or 'dimension'"
            )
        vectors = recorded.vectors.get(bound.key)
        if vectors is None:
            continue
        for token in dict.fromkeys(named_tokens(bound, vectors.rows, vectors.positions)):
            edits.setdefault(token, []).append(bound.key)
    if not edits:
        raise DataError("by='position': the edits touch no token of these examples")
    return tuple(Part(token.label, "position", tuple(edits[token]), token) for token in sorted(edits))


def _dimensions(
    reft: BoundModel, chosen: Sequence[BoundEdit], recorded: Recorded, of: Any
) -> tuple[Part, ...]:
    if len(chosen) > 1:
        keys = [bound.key for bound in chosen]
        raise DataError(f"of={of!r}: dimensions are those of one edit at one site; choose one of {keys}")
    (bound,) = chosen
    vectors = recorded.vectors.get(bound.key)
    if vectors is None or not bool(vectors.delta.any()):
        raise DataError(f"edit {bound.key!r} changes no token of these examples, so it has no dimensions")
    found = directions_of(reft, {bound.key: vectors})[bound.key]
    parts = [
        Part(label if label == CONSTANT else f"direction {label}", "dimension", (bound.key,), None, row[None])
        for label, row in zip(found.labels, found.write, strict=True)
    ]
    delta, write = vectors.delta.double(), found.write.double()
    outside = delta - (delta @ write.T) @ write
    if float(outside.square().sum()) > _SEEN * float(delta.square().sum()):
        parts.append(Part(REST, "dimension", (bound.key,)))
    return tuple(parts)


def _only_directions(mine: Sequence[tuple[bool, Part]]) -> Change:
    """Only the chosen directions; what lies outside all of them goes with the rest."""
    rows = [(acts, part.rows) for acts, part in mine if part.rows is not None]
    if any(acts and part.rows is None for acts, part in mine):
        return without_directions(torch.cat([row for acts, row in rows if not acts]))
    chosen = [row for acts, row in rows if acts]
    return only_along(torch.cat(chosen))


def _only_tokens(bound: BoundEdit, kept: frozenset[Token | None]) -> Change:
    def change(written: Written) -> Tensor:
        assert written.rows is not None
        assert written.positions is not None
        names = named_tokens(bound, written.rows.cpu(), written.positions.cpu())
        acts = torch.tensor([token in kept for token in names], device=written.delta.device)
        return torch.where(acts[:, None], written.delta, 0.0)

    return change

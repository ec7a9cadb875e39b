"""One call of an `IntervenableModel` in the language of the graph: which edits, where, from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from reftlab.address import Indices, Joined, PerRow, Position
from reftlab.compat.builtin import BuiltIn, directions_of
from reftlab.compat.config import Entry
from reftlab.compat.locations import Tokens, Units, batch_rows, read_locations, read_subspaces, token_numbers
from reftlab.compat.translate import Role, usual_roles
from reftlab.errors import PositionError, RunError
from reftlab.graph import BASE

__all__ = ["Call", "When", "planned"]

When = Literal["forward", "prompt", "decode"]
"""A forward pass; a generation whose prompt is edited; one whose generated tokens are."""


@dataclass
class Call:
    """What one call comes to.

    Attributes:
        entries, roles: the interventions that act, and what they are in the graph.
        constants: by edit, a vector in place of a source, where the graph holds it.
        positions, subspace, sources, reads: as `BoundModel.forward` takes them.
        columns: by edit, the columns of each row that the call names; None for every one.
        units: by edit, how many vectors each row has, None where that differs.
        subspaces: by edit, the directions of each row, as the call gives them.
        rows: rows of the base.
        width: columns of the base.
    """

    rows: int
    width: int
    entries: list[Entry] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, Any] = field(default_factory=dict)
    subspace: dict[str, list[list[int] | None]] = field(default_factory=dict)
    sources: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, tuple[tuple[int, ...], ...] | None] = field(default_factory=dict)
    units: dict[str, int | None] = field(default_factory=dict)
    subspaces: dict[str, list[list[int]] | None] = field(default_factory=dict)


def planned(
    entries: Sequence[Entry],
    mode: str,
    base: Mapping[str, Any],
    sources: Any = None,
    unit_locations: Any = None,
    source_representations: Any = None,
    subspaces: Any = None,
    when: When = "forward",
) -> Call:
    """What a call comes to; arguments as for `IntervenableModel.forward`.

    Raises:
        RunError, PositionError: what cannot be carried out.
    """
    rows = batch_rows(base)
    groups = max(entry.group for entry in entries) + 1 if entries else 0
    runs = _sources(sources, groups)
    given = _representations(source_representations, entries)
    keys = None
    if mode == "serial" and unit_locations is not None:
        ends = [f"source_{n + 1}" if n + 1 < groups else "base" for n in range(groups)]
        keys = [f"source_{entry.group}->{ends[entry.group]}" for entry in entries]
    places = read_locations(unit_locations, [entry.unit for entry in entries], rows, keys)
    chosen = read_subspaces(subspaces, len(entries), rows)
    acts = [
        runs[entry.group] is not None or entry.key in given or (entry.acts_alone and mode != "serial")
        for entry in entries
    ]
    batches = {id(batch): batch for batch in (base, *runs) if batch is not None} if any(acts) else {}
    tokens = {number: Tokens.of(batch) for number, batch in batches.items()}
    call = Call(rows, tokens[id(base)].width if any(acts) else 0)
    roles = usual_roles(entries, mode)
    for act, entry, role, (there, here), directions in zip(acts, entries, roles, places, chosen, strict=True):
        if act:
            _place(call, entry, role, (there, here), base, runs, tokens, given, when, mode)
            _confine(call, entry, directions)
    return call


def _place(
    call: Call,
    entry: Entry,
    role: Role,
    places: tuple[Units, Units],
    base: Mapping[str, Any],
    runs: list[Any],
    tokens: Mapping[int, Tokens],
    given: Mapping[str, Tensor],
    when: When,
    mode: str,
) -> None:
    """Note an entry's run, source, heads and tokens."""
    there, here = places
    name, inputs, tensor = entry.name, runs[entry.group], given.get(entry.key)
    if entry.place.heads and entry.unit == "pos":
        raise PositionError(
            f"{entry.key}: component {entry.representation.component!r} is made of heads; give unit='h.pos'"
        )
    if here.heads is not None:
        role = replace(role, heads=here.heads)
    if entry.constant or (inputs is None and tensor is None):
        role = replace(role, source=None, source_heads=None)
    else:
        first = (
            next(n for n, other in enumerate(runs) if other is inputs) if inputs is not None else entry.group
        )
        run = f"source_{entry.group if mode == 'serial' else first}"
        role = replace(role, source=run, source_heads=there.heads or role.heads)
    own = entry.intervention
    if isinstance(own, BuiltIn) and own.source_representation is not own.attached_source:
        # Given since the model was made.
        call.constants[name] = own.source_representation  # type: ignore[assignment]
    all_along = when == "decode" or (when == "prompt" and here.columns is None)
    if all_along:
        role = _along(call, entry, role, here, tensor, when)
    elif role.source is not None and tensor is None:
        call.sources[role.source] = inputs
    if tensor is not None and not all_along and role.source is not None:
        call.reads[name] = _arranged(tensor, entry, role)
    call.entries.append(entry)
    call.roles.append(role)
    call.columns[name], call.units[name] = here.columns, 1
    if not all_along:
        run_inputs = base if role.run == BASE else runs[int(role.run.rpartition("_")[2])]
        if run_inputs is None:
            raise RunError(f"{entry.key} acts in {role.run}, and sources= gives None for it")
        from_run = None if tensor is not None or role.source is None else tokens[id(inputs)]
        _tokens(call, entry, (there, here), tokens[id(run_inputs)], from_run)


def _along(call: Call, entry: Entry, role: Role, here: Units, tensor: Tensor | None, when: When) -> Role:
    """The role of an edit that goes along with generation, token by token."""
    if when == "decode" and here.columns is not None and any(set(row) != {0} for row in here.columns):
        raise PositionError(
            f"unit_locations={[list(row) for row in here.columns]} without intervene_on_prompt=True: each "
            "generated token is one column, so only 0 has a meaning; the native way to choose generated "
            "tokens is positions='generated(0:5)'"
        )
    if entry.joins > 1:
        raise PositionError(
            f"{entry.key}: {entry.joins} units in one vector need unit_locations in the prompt"
        )
    if role.source is not None:
        if tensor is None or tensor.numel() != tensor.shape[-1]:
            raise RunError(
                f"{entry.key}: a source has no tokens that belong to generated ones; give one vector as "
                "source_representations=, or edit the prompt (unit_locations= and intervene_on_prompt=True)"
            )
        call.constants[entry.name] = tensor
    phase: Any = "decode" if when == "decode" else "both"
    return replace(role, phase=phase, positions="all", source=None, source_heads=None)


def _tokens(
    call: Call,
    entry: Entry,
    places: tuple[Units, Units],
    base: Tokens,
    source: Tokens | None,
) -> None:
    """Note which tokens an entry edits, and which of its source's belong to them."""
    there, here = places
    name = entry.name
    if here.columns is None:
        if entry.joins > 1:
            raise PositionError(f"{entry.key} joins {entry.joins} units; give unit_locations")
        call.positions[name] = "all"
        call.units[name] = base.width or None if base.full else None
        return
    own = token_numbers(here.columns, base, entry.key)
    other: list[list[int | None]] | None = None
    if source is not None and there.columns is not None:
        columns = there.columns
        if source.rows == 1 < len(columns) and len(set(columns)) == 1:
            columns = columns[:1]
        other = token_numbers(columns, source, f"the source of {entry.key}")
    pairs = [_paired(row, own, other, entry) for row in range(len(own))]
    call.positions[name] = _position([[n for n, _ in row] for row in pairs], entry)
    if other is not None:
        kept = pairs if len(other) == len(own) else pairs[:1]
        call.positions[f"{name}.source"] = _position([[n for _, n in row] for row in kept], entry)
    counts = {len(row) for row in pairs}
    call.units[name] = counts.pop() if len(counts) == 1 else None


def _paired(
    row: int, own: list[list[int | None]], other: list[list[int | None]] | None, entry: Entry
) -> list[tuple[int, int]]:
    """One row's tokens and those of its source, without padding, each once and ascending."""
    mine = own[row]
    theirs = mine if other is None else other[row if len(other) == len(own) else 0]
    if len(mine) != len(theirs):
        raise PositionError(
            f"{entry.key}: row {row} has {len(mine)} units and its source {len(theirs)}; they must be as many"
        )
    pairs = sorted({(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None}, key=lambda p: p[0])
    if entry.joins > 1 and [a for a in mine if a is not None] != [a for a, _ in pairs]:
        raise PositionError(f"{entry.key}: the units {mine} of row {row} are joined, so they must ascend")
    if any(b is None for _, b in pairs):
        raise PositionError(f"{entry.key}: row {row} takes its source's vector from padding")
    found = [(a, b) for a, b in pairs if b is not None]
    steps = [b for _, b in found]
    if len({a for a, _ in found}) < len(found) or steps != sorted(set(steps)):
        raise PositionError(
            f"{entry.key}: in row {row} the units {mine} take the source's {theirs}, in another order or "
            "one for several, which is not supported; the native way is one rl.Edit for each of them"
        )
    return found


def _position(rows: list[list[int]], entry: Entry) -> Position:
    if entry.unit == "t":
        if any(row != rows[0] for row in rows):
            raise PositionError(
                f"{entry.key}: time steps that differ between rows, {rows}, are not supported; the native "
                "way is one edit for each, rl.Edit(..., positions=[3]), and tasks= for the rows"
            )
        return Indices(tuple(rows[0]))
    position = PerRow(tuple(map(tuple, rows)))
    if entry.joins == 1:
        return position
    wrong = [row for row in rows if len(row) != entry.joins]
    if wrong:
        raise PositionError(f"{entry.key} joins {entry.joins} units, and a row gives {wrong[0]}")
    return Joined(position)


def _confine(call: Call, entry: Entry, directions: list[list[int]] | None) -> None:
    """Note the directions that an entry acts in."""
    own = entry.intervention
    call.subspaces[entry.name] = directions
    if entry.users_own and directions is not None and call.units[entry.name] is None:
        raise PositionError(
            f"{entry.key}: subspaces= for an intervention of your own needs as many units in each row, "
            "without padding; the native way is a subclass of rl.Intervention whose forward takes subspace="
        )
    if entry.users_own or entry.collects:
        return
    if directions is not None:
        call.subspace[entry.name] = [directions_of(own, row) for row in directions]
    elif isinstance(own, BuiltIn) and (first := own.confined()) is not None:
        call.subspace[entry.name] = [first]


def _arranged(tensor: Tensor, entry: Entry, role: Role) -> Tensor:
    """Vectors that a call gives, as `reads=` takes them."""
    if tensor.dim() == 4:
        # (row, head, token, feature), as pyvene keeps heads.
        tensor = tensor.transpose(1, 2).flatten(2)
    if tensor.numel() == tensor.shape[-1]:
        return tensor.flatten()
    return tensor.flatten(1) if entry.joins > 1 else tensor


def _sources(given: Any, groups: int) -> list[Any]:
    """The inputs of each group's source, or None."""
    if given is None:
        return [None] * groups
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if len(listed) == 1:
        listed = listed * groups
    if len(listed) != groups:
        raise RunError(
            f"sources has {len(listed)} entries and there are {groups} interventions or groups; give one "
            "each, None for those that take none, or one for all"
        )
    for number, inputs in enumerate(listed):
        if inputs is not None and not isinstance(inputs, Mapping):
            raise RunError(f"sources[{number}]={inputs!r}: expected the tokenizer's output")
    return listed


def _representations(given: Any, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The tensors in place of source runs, by key."""
    if given is None:
        return {}
    if isinstance(given, Tensor):
        return {entry.key: given for entry in entries}
    if isinstance(given, list | tuple):
        if len(given) != len(entries):
            raise RunError(
                f"source_representations has {len(given)} tensors and there are {len(entries)} interventions"
            )
        return {e.key: t for e, t in zip(entries, given, strict=True) if t is not None}
    if not isinstance(given, Mapping):
        raise RunError(f"source_representations={given!r}: expected a tensor, a list, or tensors by key")
    known = [entry.key for entry in entries]
    for key in given:
        if key not in known:
            raise RunError(f"source_representations has {key!r}; the interventions are {known}")
    return dict(given)

"""From pyvene's representations and one call's choices to an intervention graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from reftlab.address import parse_path
from reftlab.compat.bases import Intervention
from reftlab.compat.config import Entry
from reftlab.errors import ConfigError
from reftlab.graph import BASE, Edit, InterventionGraph, Phase, Read, Source
from reftlab.interventions import Add, Mean, Subtract, Swap
from reftlab.interventions import Intervention as Native

__all__ = ["Role", "graph_of", "usual_roles"]


@dataclass(frozen=True)
class Role:
    """What one representation is in a graph.

    Attributes:
        phase: where its positions are.
        positions: its positions, `given` where the call gives them.
        run: the run in which it acts.
        source: the run that its source's vectors come from, or None.
        heads: the heads that it edits, or None for all.
        source_heads: the heads that its source is read at.
        subspace: the directions in which it acts, or None for all or as the call says.
    """

    phase: Phase = "prompt"
    positions: str = "given"
    run: str = BASE
    source: str | None = None
    heads: tuple[int, ...] | None = None
    source_heads: tuple[int, ...] | None = None
    subspace: tuple[int, ...] | None = None


def usual_roles(entries: Sequence[Entry], mode: str) -> list[Role]:
    """The roles of all representations in `parallel` or `serial` mode before any call says more."""
    runs = max((entry.group for entry in entries), default=-1) + 1 if mode == "serial" else 0
    return [_usual_role(entry, runs) for entry in entries]


def _usual_role(entry: Entry, serial_runs: int) -> Role:
    """One representation's role; `serial_runs` is the number of sources in serial mode, else 0."""
    units = int(entry.representation.max_number_of_units)
    heads = tuple(range(units)) if entry.place.heads else None
    role = Role(
        positions=f"joined(last({entry.joins}))" if entry.joins > 1 else "given",
        source=None if entry.constant else f"source_{entry.group}",
        heads=heads,
        source_heads=None if entry.constant else heads,
    )
    if serial_runs and entry.group + 1 < serial_runs:
        return replace(role, run=f"source_{entry.group + 1}")
    return role


def graph_of(
    entries: Sequence[Entry],
    roles: Sequence[Role],
    constants: dict[str, Tensor] | None = None,
    collecting: bool = False,
) -> InterventionGraph:
    """The graph of some representations.

    Args:
        entries, roles: the representations and what they are.
        constants: by name of edit, a vector in place of a source.
        collecting: whether representations that only collect are edits that change nothing, so that
            a call sees their vectors in its own pass; else they are reads.

    Raises:
        ConfigError, GraphError: a combination that cannot be said.
    """
    runs = {run for role in roles for run in (role.run, role.source) if run not in (BASE, None)}
    nodes: list[Any] = [Source(run, grad=True) for run in sorted(runs, key=_number)]
    for entry, role in zip(entries, roles, strict=True):
        if entry.collects and not collecting:
            where = None if role.positions == "given" else role.positions
            nodes.append(Read(entry.place.at, where, name=entry.name, heads=role.heads))
            continue
        description = _with_constant(entry.intervention, (constants or {}).get(entry.name))
        takes = description.takes_source == "required" or (
            description.takes_source == "optional" and not entry.constant and role.source is not None
        )
        source = None
        if takes:
            if role.source is None:
                raise ConfigError(f"{entry.key}: {type(entry.intervention).__name__} needs sources=")
            source = Read(_source_site(entry), run=role.source, heads=role.source_heads)
        nodes.append(
            Edit(
                entry.name,
                at=entry.place.at,
                positions=role.positions,
                intervention=description,
                run=role.run,
                source=source,
                phase=role.phase,
                heads=role.heads,
                subspace=role.subspace,
                share=entry.share,
            )
        )
    return InterventionGraph(*nodes)


def _number(run: Any) -> int:
    return int(str(run).rpartition("_")[2])


def _source_site(entry: Entry) -> str:
    if not entry.skips:
        return entry.place.at
    path = parse_path(entry.place.at)
    return str(replace(path, side="input", leaf=()))


def _with_constant(intervention: Intervention, value: Tensor | None) -> Native:
    """The native description, with a fixed vector in place of its source where the call gives one."""
    description = intervention.description()
    if value is None:
        return description
    kinds: dict[type[Native], type[Native]] = {Add: Add, Subtract: Subtract, Swap: Mean, Mean: Mean}
    kind = kinds.get(type(description))
    if kind is None:
        raise ConfigError(
            f"{type(intervention).__name__} takes no constant vector while tokens are generated; the native "
            "way is an edit without a source, such as rl.Add(vector) with phase='decode'"
        )
    return kind(value.detach().flatten())  # type: ignore[call-arg]

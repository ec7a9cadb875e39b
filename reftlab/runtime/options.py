"""What one call says of its edits: which act, in which rows, where, how strongly, in which directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlab.address import Position, parse_position
from reftlab.errors import ReftlabError, RunError, did_you_mean
from reftlab.graph import BASE, Edit, InterventionGraph
from reftlab.interventions.base import number

__all__ = ["PER_CALL", "Options"]

PER_CALL = ("tasks", "positions", "scale", "subspace", "select")
"""What a call may say of its edits, by the names of its arguments."""

Directions = tuple[int, ...] | None


@dataclass(frozen=True)
class Options:
    """One call's choices, checked against the graph; `Options()` leaves every edit as it is.

    Attributes:
        select: names of the edits that act, or None for all. In a source run of which it names no edit
            all act: they belong to whoever reads that run.
        select_runs: the runs of the edits that it names.
        tasks: the tasks of each row, or None where every edit acts in every row; one entry stands
            for all rows.
        subspace: by edit, the directions of each row; one entry stands for all rows.
        scale: by edit, the factor of each row; one entry stands for all rows.
        positions: by edit, or by `edit.source` for its source, the tokens in place of its own.
        listed: what was given row by row, with the edit's name (none for tasks) and how many rows.
    """

    select: frozenset[str] | None = None
    tasks: tuple[frozenset[str], ...] | None = None
    subspace: Mapping[str, tuple[Directions, ...]] = field(default_factory=dict)
    scale: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    positions: Mapping[str, Position] = field(default_factory=dict)
    listed: tuple[tuple[str, str, int], ...] = ()
    select_runs: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        graph: InterventionGraph,
        tasks: Any = None,
        subspace: Any = None,
        scale: Any = None,
        select: Any = None,
        positions: Any = None,
    ) -> Options:
        """Check what a call was given; see `BoundModel.forward` for the forms.

        Raises:
            RunError: an unknown edit or task, or a value of the wrong form; the message quotes it.
        """
        if all(given is None for given in (tasks, subspace, scale, select, positions)):
            return _PLAIN
        edits = {edit.name: edit for edit in graph.edits}
        named = None if select is None else _selected(select, edits)
        return cls(
            named,
            None if tasks is None else _tasks(tasks, graph),
            {} if subspace is None else _subspaces(subspace, edits),
            {} if scale is None else _scales(scale, edits),
            {} if positions is None else _positions(positions, edits),
            tuple(_listed(tasks, subspace, scale, edits)),
            frozenset(edits[name].run for name in named or ()),
        )

    def check_rows(self, rows: int, edit: Edit | None = None) -> None:
        """Refuse choices made for another number of rows than the batch has.

        Args:
            rows: of the batch.
            edit: the edit whose choices matter; all of them where it is None.
        """
        for what, name, length in self.listed:
            mine = edit is None or name == edit.name or (not name and self._chosen_by_task(edit))
            if mine and length != rows:
                raise RunError(f"{what} has {length} entries and the batch {rows} rows; give one a row")

    def check_tasks(self, rows: int | None) -> None:
        """Refuse tasks for another number of rows than a call has in which nothing acts."""
        if self.tasks is not None and rows is not None:
            self.check_rows(rows)

    def acts(self, edit: Edit) -> bool:
        """Whether an edit acts in any row."""
        chosen = edit.run == BASE or edit.run in self.select_runs
        if self.select is not None and chosen and edit.name not in self.select:
            return False
        return not self._chosen_by_task(edit) or any(row & set(edit.task_names) for row in self.tasks or ())

    def _chosen_by_task(self, edit: Edit) -> bool:
        """Whether tasks decide where an edit acts; one in a source run belongs to whoever reads that run."""
        return self.tasks is not None and (edit.run == BASE or bool(edit.tasks))

    def rows_of(self, edit: Edit, rows: Int[Tensor, " n"]) -> Bool[Tensor, " n"] | None:
        """For each vector's row of the prompts, whether the edit acts there; None for everywhere."""
        if self.tasks is None or not self._chosen_by_task(edit):
            return None
        names = set(edit.task_names)
        return _each([bool(row & names) for row in self.tasks], rows)

    def factor(self, edit: Edit, rows: Int[Tensor, " n"]) -> float | Float[Tensor, "n 1"]:
        """The edit's strength in each vector's row."""
        factors = self.scale.get(edit.name, (1.0,))
        if len(factors) == 1:
            return edit.strength * factors[0]
        return edit.strength * _each(factors, rows)[:, None]

    def directions(
        self, edit: Edit, rows: Int[Tensor, " n"], count: int | None
    ) -> Bool[Tensor, "n directions"] | None:
        """Which of an intervention's `count` directions act for each vector; None for all of them."""
        chosen = self._directions(edit)
        if all(row is None for row in chosen):
            return None
        if count is None:
            raise RunError(
                f"edit {edit.name!r}: {type(edit.intervention).__name__} has no directions to choose a "
                "subspace from"
            )
        table = torch.zeros(len(chosen), count, dtype=torch.bool)
        for row, numbers in enumerate(chosen):
            wrong = [n for n in numbers or () if not 0 <= n < count]
            if wrong:
                raise RunError(
                    f"edit {edit.name!r}: subspace {list(numbers or ())} has {wrong[0]}, and its directions "
                    f"are numbered 0 to {count - 1}"
                )
            table[row, list(range(count) if numbers is None else numbers)] = True
        return table[rows] if len(chosen) > 1 else table.expand(len(rows), -1)

    def _directions(self, edit: Edit) -> tuple[Directions, ...]:
        by_task = {name: numbers for name, numbers in edit.tasks if numbers is not None}
        if edit.name in self.subspace:
            if by_task and self.tasks is not None:
                raise RunError(
                    f"edit {edit.name!r}: its tasks give its directions, so subspace= says them twice"
                )
            return self.subspace[edit.name]
        if by_task and self.tasks is not None:
            wanted = [[n for n, _ in edit.tasks if n in row] for row in self.tasks]
            return tuple(
                None
                if any(n not in by_task for n in row)
                else tuple(sorted({d for n in row for d in by_task[n]}))
                for row in wanted
            )
        return (edit.subspace,)


_PLAIN = Options()


def _listed(
    tasks: Any, subspace: Any, scale: Any, edits: Mapping[str, Edit]
) -> Iterator[tuple[str, str, int]]:
    """What a call gives row by row: how it is called, the edit that it is for, and how many rows it has."""
    if tasks is not None and not isinstance(tasks, str):
        yield "tasks", "", len(tasks)
    by_edit = subspace if isinstance(subspace, Mapping) else dict.fromkeys(edits, subspace)
    for name, value in by_edit.items():
        if isinstance(value, list | tuple) and _nested(value):
            yield f"subspace[{name!r}]", name, len(value)
    for name, value in (scale or {}).items():
        if isinstance(value, list | tuple) or (hasattr(value, "tolist") and value.ndim):
            yield f"scale[{name!r}]", name, len(value)


def _each(values: Sequence[Any], rows: Int[Tensor, " n"]) -> Tensor:
    table = torch.tensor(values)
    return table[rows] if len(table) > 1 else table.expand(len(rows))


def _named(what: str, name: Any, edits: Mapping[str, Edit]) -> str:
    if not isinstance(name, str) or name not in edits:
        raise RunError(
            f"{what}: there is no edit {name!r}; there is {list(edits)}.{did_you_mean(str(name), edits)}"
        )
    return str(name)


def _selected(given: Any, edits: Mapping[str, Edit]) -> frozenset[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise RunError(f"select={given!r}: expected names of edits")
    return frozenset(_named("select", name, edits) for name in names)


def _tasks(given: Any, graph: InterventionGraph) -> tuple[frozenset[str], ...]:
    rows = [given] if isinstance(given, str) else given
    if not isinstance(rows, Sequence) or not rows:
        raise RunError(f"tasks={given!r}: expected a task or None for each row, as in ['emoji', None]")
    known, result = graph.tasks, []
    for row in rows:
        names = [] if row is None else row.split("+") if isinstance(row, str) else row
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise RunError(f"tasks={given!r}: {row!r} is no task; expected 'emoji', 'formal+emoji' or None")
        for name in names:
            if name.strip() not in known:
                raise RunError(
                    f"tasks: there is no task {name!r}; there is "
                    f"{list(known)}.{did_you_mean(str(name), known)}"
                )
        result.append(frozenset(name.strip() for name in names))
    return tuple(result)


def _subspaces(given: Any, edits: Mapping[str, Edit]) -> dict[str, tuple[Directions, ...]]:
    if not isinstance(given, Mapping):
        based = [name for name, edit in edits.items() if edit.intervention.takes_subspace == "basis"]
        if not based:
            raise RunError(
                f"subspace={given!r}: no edit has a basis; name the edit whose features are meant, "
                "subspace={'edit': [0, 2]}"
            )
        given = dict.fromkeys(based, given)
    found = {}
    for name, value in given.items():
        intervention = edits[_named("subspace", name, edits)].intervention
        if intervention.takes_subspace == "no":
            raise RunError(
                f"subspace: edit {name!r}: {type(intervention).__name__} has no directions to choose from"
            )
        rows = value if isinstance(value, list | tuple) and _nested(value) else [value]
        found[name] = tuple(_numbers(f"subspace[{name!r}]", row) for row in rows)
    return found


def _nested(value: Sequence[Any]) -> bool:
    return any(item is None or isinstance(item, list | tuple) for item in value)


def _numbers(what: str, given: Any) -> Directions:
    if given is None:
        return None
    if not isinstance(given, list | tuple | range) or any(type(n) is not int or n < 0 for n in given):
        raise RunError(
            f"{what}={given!r}: expected whole numbers from 0, a list of them for each row, or None"
        )
    return tuple(given)


def _scales(given: Any, edits: Mapping[str, Edit]) -> dict[str, tuple[float, ...]]:
    if not isinstance(given, Mapping):
        raise RunError(f"scale={given!r}: expected a factor by edit, as in scale={{'emoji': 0.5}}")
    found = {}
    for name, value in given.items():
        rows = value.tolist() if hasattr(value, "tolist") else value
        rows = rows if isinstance(rows, list | tuple) else [rows]
        if not rows:
            raise RunError(f"scale[{name!r}]={value!r}: expected a factor, or one a row")
        try:
            found[_named("scale", name, edits)] = tuple(number(row, f"scale[{name!r}]") for row in rows)
        except ReftlabError as error:
            raise RunError(str(error)) from error
    return found


def _positions(given: Any, edits: Mapping[str, Edit]) -> dict[str, Position]:
    if not isinstance(given, Mapping):
        raise RunError(
            f"positions={given!r}: expected positions by edit, as in positions={{'emoji': [[3], [4]]}}"
        )
    found = {}
    for name, value in given.items():
        own = str(name).removesuffix(".source")
        edit = edits[_named("positions", own, edits)]
        if own != name and edit.source is None:
            raise RunError(f"positions: edit {own!r} has no source")
        try:
            position = parse_position(value)
        except ReftlabError as error:
            raise RunError(f"positions[{name!r}]: {error}") from error
        if position.joins != edit.positions.joins:
            raise RunError(
                f"positions[{name!r}]={value!r}: the edit was bound for vectors of {edit.positions.joins} "
                f"joined tokens, these join {position.joins}; write joined(...) as in the edit"
            )
        found[str(name)] = position
    return found

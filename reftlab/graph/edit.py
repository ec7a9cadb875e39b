"""Edits: an intervention at a site, at positions, in a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reftlab.address import Position, SitePath, View, parse_path, parse_position
from reftlab.address.components import component_path
from reftlab.errors import GraphError, InterventionError, ReftlabError
from reftlab.graph.condition import Condition
from reftlab.graph.nodes import BASE, Read, Source, check_name, replace_read, set_fields
from reftlab.interventions import Intervention
from reftlab.interventions.base import number

__all__ = ["Edit", "Node", "Phase"]

Phase = Literal["prompt", "decode", "both"]


@dataclass(frozen=True, eq=False)
class Edit:
    """An intervention at a site, at positions, in a run.

    Args:
        name: unique in the graph.
        at: site, a path string such as `model.layers[15].output` or `blocks[4,10,16].output`. A
            path that names several places makes one intervention, with parameters of its own, for
            each of them. Also one of pyvene's component names, such as `block_output`, with `layer=`.
        layer: number of the block, for a component name.
        positions: which tokens of each row, see `reftlab.address.parse_position`.
        intervention: the mathematics, such as `LoReFT(rank=4)`.
        run: the run to act in, `base` or the name of a `Source`.
        source: where the source's vectors come from, for interventions that take them.
        phase: `prompt` acts on tokens of the prompt; `decode` on generated tokens, whose positions
            count from the first generated one; `both` on both. Left out, it is `decode` for
            positions such as `generated(0:5)` and `prompt` for all others.
        heads: attention heads to act on, numbers.
        features: features of the last axis to act on, a slice or numbers.
        strength: share of the edit that is applied: `h + strength · (new − h)`.
        when: the condition under which it acts, such as `rl.cosine(a, b) > 0.8`; of a soft one, the
            share of the edit that is applied.
        tasks: the tasks that it belongs to, a name or several; or which directions of the
            intervention's basis each task has, `{"emoji": [0, 1], "formal": [2, 3]}`. Left out, its
            own name is its task.
        subspace: the directions of the intervention's basis (or features, where it acts on each
            feature by itself) in which it acts; all unless given.
        share: all places and edits with the same word here have one intervention together.

    Raises:
        GraphError: arguments that contradict each other; the message names the edit.
    """

    name: str
    at: SitePath
    positions: Position
    intervention: Intervention
    run: str
    source: Read | None
    phase: Phase
    heads: tuple[int, ...] | None
    features: Any
    strength: float
    when: Condition | None
    tasks: tuple[tuple[str, tuple[int, ...] | None], ...]
    subspace: tuple[int, ...] | None
    share: str | None

    def __init__(
        self,
        name: str,
        *,
        at: str | SitePath,
        layer: int | None = None,
        positions: str | Position | int | Sequence[Any] = "all",
        intervention: Intervention,
        run: str = BASE,
        source: Read | None = None,
        phase: Phase | None = None,
        heads: int | Iterable[int] | None = None,
        features: slice | int | Iterable[int] | None = None,
        strength: float = 1.0,
        when: Condition | None = None,
        tasks: str | Iterable[str] | Mapping[str, Iterable[int] | None] | None = None,
        subspace: Iterable[int] | None = None,
        share: str | None = None,
    ) -> None:
        check_name("Edit", name)
        where = f"Edit {name!r}: "
        if not isinstance(intervention, Intervention):
            given = "a class; call it" if isinstance(intervention, type) else repr(intervention)
            raise GraphError(f"{where}intervention must be one such as LoReFT(rank=4), not {given}")
        if intervention.width is not None:
            raise GraphError(
                f"{where}this {type(intervention).__name__} is built already, with parameters of its own, "
                f"and a graph holds descriptions alone; give {intervention.describe()}, and copy the "
                "parameters into the bound model"
            )
        if source is not None and not isinstance(source, Read):
            raise GraphError(f"{where}source must be a Read, as in Read(run='corrupt'), not {source!r}")
        if phase is not None and phase not in get_args(Phase):
            raise GraphError(f"{where}phase={phase!r}: expected 'prompt', 'decode' or 'both'")
        if when is not None and not isinstance(when, Condition):
            raise GraphError(
                f"{where}when={when!r}: expected a condition, as in rl.norm('blocks[4].output') > 3"
            )
        try:
            strength = number(strength, "strength")
            own_tasks, directions = _tasks(tasks), _directions("subspace", subspace)
        except InterventionError as error:
            raise GraphError(f"{where}{error}") from error
        check_name("Edit run", run)
        if share is not None:
            check_name("Edit share", share)
        if directions is not None and any(chosen is not None for _, chosen in own_tasks):
            raise GraphError(f"{where}tasks= gives each task its directions, so subspace= says them twice")
        try:
            path = parse_path(at if layer is None else component_path(at, layer))
            place, view = parse_position(positions), View.of(heads, features)
            phase = phase or ("decode" if place.generated else "prompt")
            if place.generated and phase != "decode":
                raise GraphError(
                    f"phase={phase!r}: positions {str(place)!r} are generated tokens; use 'decode'"
                )
            if phase != "prompt":
                place.select_generated(0)
            intervention.check_source(source is not None)
        except ReftlabError as error:
            raise type(error)(f"{where}{error}") from error
        if phase != "prompt" and source is not None:
            raise GraphError(
                f"{where}phase={phase!r} and a source: a source has no generated tokens to match; "
                "use phase='prompt'"
            )
        set_fields(
            self,
            name=name,
            at=path,
            positions=place,
            intervention=intervention,
            run=run,
            source=source,
            phase=phase,
            heads=view.heads,
            features=features if isinstance(features, slice) else view.features,
            strength=strength,
            when=when,
            tasks=own_tasks,
            subspace=directions,
            share=share,
        )

    @property
    def view(self) -> View:
        """The heads or features that it acts on."""
        return View.of(self.heads, self.features)

    @property
    def source_read(self) -> Read | None:
        """The source with the edit's own site, positions and view filled in where it leaves them out."""
        if self.source is None:
            return None
        read = self.source
        own = read.at is None
        return Read(
            self.at if own else read.at,
            self.positions if read.positions is None else read.positions,
            run=read.run,
            name=read.name,
            heads=self.heads if own and read.view.whole else read.heads,
            features=self.features if own and read.view.whole else read.features,
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that the edit belongs to; its own name where it says none."""
        return tuple(name for name, _ in self.tasks) or (self.name,)

    @property
    def reads(self) -> tuple[Read, ...]:
        """What the edit needs to know: its source's and its condition's reads."""
        source = self.source_read
        return (*(() if source is None else (source,)), *self.condition_reads)

    @property
    def condition_reads(self) -> tuple[Read, ...]:
        """What its condition looks at; nothing without one."""
        return () if self.when is None else self.when.reads

    @property
    def written_tasks(self) -> Any:
        """The tasks as `tasks=` takes them: None, names, or directions by name."""
        if any(chosen is not None for _, chosen in self.tasks):
            return {name: None if chosen is None else list(chosen) for name, chosen in self.tasks}
        return [name for name, _ in self.tasks] or None

    def with_strength(self, strength: float) -> Edit:
        """The same edit at another strength."""
        return self._with(strength=strength)

    def with_name(self, name: str) -> Edit:
        """The same edit under another name."""
        return self._with(name=name)

    def _with(self, **changes: Any) -> Edit:
        arguments = {key: getattr(self, key) for key in self.__dataclass_fields__}
        arguments.update(tasks=self.written_tasks, **changes)
        return Edit(arguments.pop("name"), **arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and all(
            alike(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__
        )

    def __hash__(self) -> int:
        return hash((self.name, self.at, self.positions, self.run))

    def __str__(self) -> str:
        return f"edit {self.name}"

    def __repr__(self) -> str:
        parts = [repr(self.name), f"at={str(self.at)!r}", f"positions={str(self.positions)!r}"]
        parts.append(f"intervention={self.intervention.describe()}")
        parts += [f"run={self.run!r}"] if self.run != BASE else []
        parts += [f"source={self.source!r}"] if self.source is not None else []
        parts += [f"phase={self.phase!r}"] if self.phase != "prompt" else []
        parts += [] if self.view.whole else [str(self.view)]
        parts += [f"strength={self.strength:g}"] if self.strength != 1.0 else []
        parts += [f"when={self.when!r}"] if self.when is not None else []
        parts += [f"tasks={self.written_tasks!r}"] if self.tasks else []
        parts += [f"subspace={list(self.subspace)}"] if self.subspace is not None else []
        parts += [f"share={self.share!r}"] if self.share is not None else []
        return f"Edit({', '.join(parts)})"


Node = Source | Read | Edit


def renamed(node: Node, names: dict[str, str]) -> Node:
    """The node with every name in it that is a key of `names` replaced."""

    def moved(read: Read) -> Read:
        return replace_read(read, run=names.get(read.run, read.run))

    if isinstance(node, Source):
        inputs = None if node.inputs is None else names.get(node.inputs, node.inputs)
        return Source(names.get(node.name, node.name), inputs, node.grad)
    if isinstance(node, Read):
        return replace_read(moved(node), name=names.get(node.label, node.name))
    return node._with(
        name=names.get(node.name, node.name),
        run=names.get(node.run, node.run),
        source=None if node.source is None else moved(node.source),
        when=None if node.when is None else node.when.with_reads(moved),
    )


def _tasks(given: Any) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Iterable) or not given:
        raise InterventionError(f"tasks={given!r}: expected a name, several, or directions by name")
    pairs = given.items() if isinstance(given, Mapping) else [(name, None) for name in given]
    for name, _ in pairs:
        check_name("task", name)
    if len({name for name, _ in pairs}) < len(pairs):
        raise InterventionError(f"tasks={given!r}: a task stands there twice")
    return tuple((name, _directions(f"tasks[{name!r}]", chosen)) for name, chosen in pairs)


def _directions(what: str, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    numbers = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not numbers or any(type(n) is not int or n < 0 for n in numbers) or len(set(numbers)) < len(numbers):
        raise InterventionError(f"{what}={given!r}: expected different whole numbers from 0, one or more")
    return numbers


def alike(a: Any, b: Any) -> bool:
    """Whether two interventions, or any two values, are described alike: type and arguments, bit for bit."""
    if a is b:
        return True
    if isinstance(a, Intervention):
        return type(a) is type(b) and alike(a.config, b.config)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(_bytes(a), _bytes(b).to(a.device))
    return not isinstance(b, Tensor) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

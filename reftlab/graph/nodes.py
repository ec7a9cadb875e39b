"""The nodes of an intervention graph: small frozen objects that are checked when they are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, get_args

from reftlab.address import Position, SitePath, View, parse_path, parse_position
from reftlab.errors import GraphError, InterventionError, ReftlabError
from reftlab.interventions import Intervention
from reftlab.interventions.base import number

__all__ = ["BASE", "Edit", "Node", "Phase", "Read", "Source"]

BASE = "base"
"""The run that always exists: the forward pass that the caller asked for."""

Phase = Literal["prompt", "decode", "both"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*\Z")


@dataclass(frozen=True)
class Source:
    """A further forward pass with inputs of its own, which edits can take values from.

    Args:
        name: how reads and edits refer to it, and the key of its inputs in
            `reft(**inputs, sources={name: source_inputs})`.
    """

    name: str

    def __post_init__(self) -> None:
        _check_name("Source", self.name)
        if self.name == BASE:
            raise GraphError("Source('base'): the base run always exists; give the source another name")

    def __str__(self) -> str:
        return f"source {self.name}"


@dataclass(frozen=True)
class Read:
    """The vectors at a site and positions in a run.

    Args:
        at: site, a path string such as `blocks[5].output`, or `"path @ positions"` for both at
            once. As the source of an edit it may be left out: the edit's own site.
        positions: which tokens, see `reftlab.address.parse_position`; `all` unless given. As the
            source of an edit it may be left out: the edit's own positions.
        run: the run to read in, `base` or the name of a `Source`.
        name: name of the result; the site's path unless given.
        heads: attention heads to read, numbers.
        features: features of the last axis to read, a slice or numbers.

    >>> Read("blocks[5].output @ last")
    Read('blocks[5].output @ last')
    """

    at: SitePath | None = None
    positions: Position | None = None
    _: KW_ONLY
    run: str = BASE
    name: str | None = None
    heads: tuple[int, ...] | None = None
    features: Any = field(default=None, hash=False)

    def __init__(
        self,
        at: str | SitePath | None = None,
        positions: str | Position | int | Sequence[int] | None = None,
        *,
        run: str = BASE,
        name: str | None = None,
        heads: int | Iterable[int] | None = None,
        features: slice | int | Iterable[int] | None = None,
    ) -> None:
        if isinstance(at, str) and "@" in at:
            if positions is not None:
                raise GraphError(f"Read({at!r}): positions are given twice, behind '@' and as positions=")
            at, _, written = at.partition("@")
            at, positions = at.strip(), written.strip()
        _check_name("Read run", run)
        if name is not None:
            _check_name("Read", name)
        view = View.of(heads, features)
        _set(
            self,
            at=None if at is None else parse_path(at),
            positions=None if positions is None else parse_position(positions),
            run=run,
            name=name,
            heads=view.heads,
            features=features if isinstance(features, slice) else view.features,
        )

    @property
    def view(self) -> View:
        return View.of(self.heads, self.features)

    @property
    def label(self) -> str:
        """The name of the result: `name`, or what was read."""
        return self.name or f"{self.at} @ {self.positions or 'all'}"

    def with_positions(self, positions: str | Position | int | Sequence[int]) -> Read:
        return replace_read(self, positions=positions)

    def __str__(self) -> str:
        return f"read {self.label}" + ("" if self.run == BASE else f" in {self.run}")

    def __repr__(self) -> str:
        where = " @ ".join(str(part) for part in (self.at, self.positions) if part is not None)
        parts = [repr(where)] if where else []
        parts += [f"run={self.run!r}"] if self.run != BASE else []
        parts += [f"name={self.name!r}"] if self.name else []
        parts += [] if self.view.whole else [str(self.view)]
        return f"Read({', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class Edit:
    """An intervention at a site, at positions, in a run.

    Args:
        name: unique in the graph.
        at: site, a path string such as `model.layers[15].output` or `blocks[4,10,16].output`. A
            path that names several places makes one intervention, with parameters of its own, for
            each of them.
        positions: which tokens of each row's prompt, see `reftlab.address.parse_position`.
        intervention: the mathematics, such as `LoReFT(rank=4)`.
        run: the run to act in, `base` or the name of a `Source`.
        source: where the source's vectors come from, for interventions that take them.
        phase: `prompt` acts on tokens of the prompt; `decode` on generated tokens, whose positions
            count from the first generated one; `both` on both.
        heads: attention heads to act on, numbers.
        features: features of the last axis to act on, a slice or numbers.
        strength: share of the edit that is applied: `h + strength · (new − h)`.

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

    def __init__(
        self,
        name: str,
        *,
        at: str | SitePath,
        positions: str | Position | int | Sequence[int] = "all",
        intervention: Intervention,
        run: str = BASE,
        source: Read | None = None,
        phase: Phase = "prompt",
        heads: int | Iterable[int] | None = None,
        features: slice | int | Iterable[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        _check_name("Edit", name)
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
        if phase not in get_args(Phase):
            raise GraphError(f"{where}phase={phase!r}: expected 'prompt', 'decode' or 'both'")
        if phase != "prompt" and source is not None:
            raise GraphError(
                f"{where}phase={phase!r} and a source: a source has no generated tokens to match; "
                "use phase='prompt'"
            )
        try:
            strength = number(strength, "strength")
        except InterventionError as error:
            raise GraphError(f"{where}{error}") from error
        _check_name("Edit run", run)
        try:
            path, place, view = parse_path(at), parse_position(positions), View.of(heads, features)
            if phase != "prompt":
                place.select_generated(1)
            intervention.check_source(source is not None)
        except ReftlabError as error:
            raise type(error)(f"{where}{error}") from error
        _set(
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
        )

    @property
    def view(self) -> View:
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

    def with_strength(self, strength: float) -> Edit:
        return self._with(strength=strength)

    def with_name(self, name: str) -> Edit:
        return self._with(name=name)

    def _with(self, **changes: Any) -> Edit:
        arguments = {key: getattr(self, key) for key in self.__dataclass_fields__}
        arguments.update(changes)
        return Edit(arguments.pop("name"), **arguments)

    def _key(self) -> tuple[Any, ...]:
        config = {key: _plain(value) for key, value in self.intervention.config.items()}
        fields = [getattr(self, f) for f in self.__dataclass_fields__ if f != "intervention"]
        return (*fields, type(self.intervention), config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self._key() == other._key()

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
        return f"Edit({', '.join(parts)})"


Node = Source | Read | Edit


def renamed(node: Node, names: dict[str, str]) -> Node:
    """The node with every name in it that is a key of `names` replaced."""
    if isinstance(node, Source):
        return Source(names.get(node.name, node.name))
    if isinstance(node, Read):
        name = names.get(node.label, node.name)
        return replace_read(node, name=name, run=names.get(node.run, node.run))
    source = node.source
    if source is not None:
        source = replace_read(source, run=names.get(source.run, source.run))
    return node._with(name=names.get(node.name, node.name), run=names.get(node.run, node.run), source=source)


def replace_read(read: Read, **changes: Any) -> Read:
    """A read with some arguments changed."""
    return replace(read, **changes)


def _plain(value: Any) -> Any:
    return (str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value


def _set(node: Any, **values: Any) -> None:
    for key, value in values.items():
        object.__setattr__(node, key, value)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.match(name):
        raise GraphError(
            f"{what} name {name!r}: expected letters, digits, '_' or '-', beginning with a letter"
        )

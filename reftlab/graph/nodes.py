"""Runs and reads, two of the kinds of nodes: small frozen objects that are checked when they are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from reftlab.address import Position, SitePath, View, parse_path, parse_position
from reftlab.address.components import component_path
from reftlab.errors import GraphError

__all__ = ["BASE", "Read", "Source"]

BASE = "base"
"""The run that always exists: the forward pass that the caller asked for."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*\Z")


@dataclass(frozen=True)
class Source:
    """A further forward pass with inputs of its own, which edits can take values from.

    Args:
        name: how reads and edits refer to it, and the key of its inputs in
            `reft(**inputs, sources={name: source_inputs})`.
        inputs: another run whose inputs this one takes where a call gives it none: `base`, or the
            name of a `Source`.
        grad: whether gradients flow through this run, into its edits.
    """

    name: str
    inputs: str | None = None
    grad: bool = False

    def __post_init__(self) -> None:
        check_name("Source", self.name)
        if self.name == BASE:
            raise GraphError("Source('base'): the base run always exists; give the source another name")
        if self.inputs is not None:
            check_name("Source inputs", self.inputs)
        if self.inputs == self.name or type(self.grad) is not bool:
            raise GraphError(f"{self!r}: inputs= names another run, not its own, and grad= is True or False")

    def __str__(self) -> str:
        return f"source {self.name}"

    def __repr__(self) -> str:
        inputs = f", inputs={self.inputs!r}" if self.inputs is not None else ""
        return f"Source({self.name!r}{inputs}{', grad=True' if self.grad else ''})"


@dataclass(frozen=True)
class Read:
    """The vectors at a site and positions in a run.

    Args:
        at: site, a path string such as `blocks[5].output`, or `"path @ positions"` for both at
            once. As the source of an edit it may be left out: the edit's own site.
        positions: which tokens, see `reftlab.address.parse_position`; `all` unless given. As the
            source of an edit it may be left out: the edit's own positions.
        layer: number of the block, where `at` is one of pyvene's component names.
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
        positions: str | Position | int | Sequence[Any] | None = None,
        *,
        layer: int | None = None,
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
        check_name("Read run", run)
        if name is not None:
            check_name("Read", name)
        view = View.of(heads, features)
        set_fields(
            self,
            at=None if at is None else parse_path(at if layer is None else component_path(at, layer)),
            positions=None if positions is None else parse_position(positions),
            run=run,
            name=name,
            heads=view.heads,
            features=features if isinstance(features, slice) else view.features,
        )

    @property
    def view(self) -> View:
        """The heads or features that are read."""
        return View.of(self.heads, self.features)

    @property
    def label(self) -> str:
        """The name of the result: `name`, or what was read, as in `blocks[2].attn.heads (heads 3) @ last`."""
        return self.name or f"{self.at}{self.view.suffix} @ {self.positions or 'all'}"

    def with_positions(self, positions: str | Position | int | Sequence[Any]) -> Read:
        """The same read at other tokens."""
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


def replace_read(read: Read, **changes: Any) -> Read:
    """A read with some arguments changed."""
    return replace(read, **changes)


def set_fields(node: Any, **values: Any) -> None:
    for key, value in values.items():
        object.__setattr__(node, key, value)


def check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.match(name):
        raise GraphError(
            f"{what} name {name!r}: expected letters, digits, '_' or '-', beginning with a letter"
        )

"""The nodes of a graph at their places in one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from reftlab.address import Position, Site, View
from reftlab.graph import Edit, Phase, Read
from reftlab.runtime.axes import Axes, Stream

__all__ = ["BoundEdit", "BoundRead", "Place"]


@dataclass(frozen=True, eq=False)
class Place:
    """What a site of one model is like.

    Attributes:
        site: the place.
        order: when it is reached in a forward pass.
        axes: how its tensor becomes (row, token, feature).
        stream: whose tokens its token axis holds.
        site_width: number of features of each of its tokens; None for attention scores and
            patterns, which are as wide as the sequence is long.
        index: which of them are read or edited, `(k,)` int64, or None for all.
        heads: which heads of scores or a pattern, or None for all.
        head_count: how many heads scores or a pattern have.
    """

    site: Site
    order: int
    axes: Axes
    stream: Stream
    site_width: int | None
    index: Tensor | None
    heads: tuple[int, ...] | None = None
    head_count: int = 1

    @property
    def keys_of(self) -> int | None:
        """How many heads' keys stand in each vector of attention; None for all other sites."""
        if self.site_width is not None:
            return None
        return self.head_count if self.heads is None else len(self.heads)

    def features(self, width: int) -> Tensor | None:
        """Which of a site's `width` features are meant, or None for all."""
        if self.heads is None:
            return self.index
        return View(heads=self.heads).index(width, str(self.site), width // self.head_count)


class _Placed:
    """What has a place in one model."""

    place: Place

    @property
    def site(self) -> Site:
        return self.place.site

    @property
    def order(self) -> int:
        return self.place.order


@dataclass(frozen=True, eq=False)
class BoundRead(_Placed):
    """A read at one place of one model.

    Attributes:
        label: name of the result.
        place: the place.
        width: number of features read, of all joined tokens together; 0 where it varies.
        positions: which tokens.
        run: in which run.
        phase: whether `positions` are in the prompt or among generated tokens.
        owner: the edit whose own tokens are read, and `.source` for its source, or empty.
        follows: whether it has no positions of its own, so that it goes where its edit goes.
    """

    label: str
    place: Place
    width: int
    positions: Position
    run: str
    phase: Phase = "prompt"
    owner: str = ""
    follows: bool = False


@dataclass(frozen=True, eq=False)
class BoundEdit(_Placed):
    """An edit at one place of one model.

    Attributes:
        key: the edit's name, and `name[label]` where the edit's path names several places.
        module: name of its intervention in `BoundModel.interventions`: the key, or what it shares.
        edit: the node.
        place: the place.
        width: number of features of each vector that the intervention is given; 0 where it varies.
        source: where its source's vectors come from, or None.
        when: the reads of its condition.
    """

    key: str
    module: str
    edit: Edit
    place: Place
    width: int
    source: BoundRead | None
    when: Mapping[Read, BoundRead]

    @property
    def positions(self) -> Position:
        return self.edit.positions

    @property
    def phase(self) -> Phase:
        return self.edit.phase

    @property
    def owner(self) -> str:
        return self.edit.name

    @property
    def follows(self) -> bool:
        return True

    def shares_place(self, other: BoundEdit) -> bool:
        """Whether another edit is given the same features of the same site in the same run."""
        here, there = ((s.module, s.side, s.leaf, s.part) for s in (self.site, other.site))
        mine, theirs = ((e.width, e.edit.run, e.edit.view) for e in (self, other))
        return here == there and mine == theirs

    @property
    def reads(self) -> tuple[BoundRead, ...]:
        """Its source's and its condition's reads."""
        return ((self.source,) if self.source is not None else ()) + tuple(self.when.values())

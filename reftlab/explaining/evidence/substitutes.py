"""What an explanation says that an edit adds, as something that can be added in the edit's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reftlab.explaining.altering import Change, Written, only_along
from reftlab.explaining.geometry.directions import CONSTANT, Directions, find_directions
from reftlab.explaining.geometry.vectors import EditVectors
from reftlab.interventions import Affine, Intervention

if TYPE_CHECKING:
    from reftlab.explaining.geometry.record import Recorded
    from reftlab.runtime import BoundModel

__all__ = [
    "Claim",
    "Control",
    "Fit",
    "Pool",
    "What",
    "claimed",
    "control_for",
    "control_of",
    "fit",
    "pools",
]

What = Literal[
    "constant",
    "mean per position",
    "steering",
    "norm-matched steering",
    "directions",
    "reading",
    "linearised",
]

ControlKind = Literal["constant", "per position", "length", "directions", "reading"]


class Claim(NamedTuple):
    """One explanation of every edit.

    Attributes:
        what: its kind, see `reftlab.explaining.evidence.faithfulness.CLAIMS`.
        k: how many directions, for `directions` and `reading`; else 0.
    """

    what: What
    k: int = 0

    @property
    def label(self) -> str:
        return f"{self.what} {self.k}" if self.what in ("directions", "reading") else self.what


class Control(NamedTuple):
    """A random explanation of the same form.

    Attributes:
        kind: `constant`: a random direction of the whole space at the length of the mean change;
            `per position`: one for each of the edit's tokens, at the length of the mean change there;
            `length`: a random direction at the length of each change; `directions`: the change's part
            along k random directions of the span of the write directions; `reading`: the mean change,
            and the variation about it along k such directions.
        k: how many directions.
    """

    kind: ControlKind
    k: int = 0


@dataclass(frozen=True, eq=False)
class Pool:
    """The vectors of all places of one intervention, before the strength of its edits.

    Attributes:
        module: its key in `BoundModel.interventions`.
        built: the intervention.
        vectors: what it was given and adds.
        subspace: the directions of its basis that it is confined to, or None.
        by_example: whether each vector's example is known; not in source runs.
        slots: `(vector,)`, which of the edit's tokens in its example each is, from 0; None where it does not
            act on as many in every example.
    """

    module: str
    built: nn.Module
    vectors: EditVectors
    subspace: tuple[int, ...] | None
    by_example: bool
    slots: Int[Tensor, " vector"] | None


def pools(reft: BoundModel, recorded: Recorded) -> dict[str, Pool]:
    """The vectors of each intervention that acted, by its key, but for edits of strength 0."""
    found: dict[str, Pool] = {}
    for module in dict.fromkeys(bound.module for bound in reft.edits):
        places = [
            bound
            for bound in reft.edits
            if bound.module == module and bound.key in recorded.vectors and bound.edit.strength != 0
        ]
        if not places:
            continue
        parts = [(recorded.vectors[bound.key], bound.edit.strength) for bound in places]
        sources = [part.source for part, _ in parts if part.source is not None]
        joined = EditVectors(
            module,
            torch.cat([part.base for part, _ in parts]),
            torch.cat([part.delta / strength for part, strength in parts]),
            torch.stack(sources).mean(0) if sources else None,
            torch.cat([part.rows for part, _ in parts]),
            torch.cat([part.positions for part, _ in parts]),
        )
        subspaces = {bound.edit.subspace for bound in places}
        by_example = all(bound.edit.run == "base" for bound in places)
        found[module] = Pool(
            module,
            reft.interventions[module],
            joined,
            subspaces.pop() if len(subspaces) == 1 else None,
            by_example,
            _slots([part for part, _ in parts]) if by_example else None,
        )
    return found


def _slots(places: Sequence[EditVectors]) -> Int[Tensor, " vector"] | None:
    """Which of its tokens in an example each vector is, where all places have as many in every example."""
    counts = torch.cat([place.rows.unique(return_counts=True)[1] for place in places])
    if bool((counts != counts[0]).any()):
        return None
    return torch.cat([_numbered(place.rows, place.positions) for place in places])


def _numbered(rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The place of each token among the tokens of its row, from 0."""
    span = int(positions.max()) + 1 if len(positions) else 1
    order = (rows * span + positions).argsort(stable=True)
    _, counts = rows[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - starts
    return found


@dataclass(frozen=True, eq=False)
class Fit:
    """What the explanations say of one intervention, from the vectors that it was fitted on.

    Attributes:
        directions: its directions, before strength.
        mean: mean change, `(width,)`.
        centre: mean of the vectors that it is given, `(width,)`.
        length: root of the mean squared length of the change.
        relative: α of the norm-matched steering vector `α ‖h‖ m / ‖m‖`, by least squares.
        write, read: the linear part M is `write @ read`, `(width, rank)` and `(rank, width)`.
        means: mean change at each of the edit's tokens, `(slot, width)`; None where their number differs
            between examples.
    """

    directions: Directions
    mean: Float[Tensor, " width"]
    centre: Float[Tensor, " width"]
    length: float
    relative: float
    write: Float[Tensor, "width rank"]
    read: Float[Tensor, "rank width"]
    means: Float[Tensor, "slot width"] | None = None

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def reading(self) -> tuple[int, ...]:
        """Numbers of the directions whose amount depends on the input, the most varying first."""
        order = self.directions.std.argsort(descending=True, stable=True).tolist()
        return tuple(n for n in order if self.directions.labels[n] != CONSTANT)

    @property
    def largest(self) -> tuple[int, ...]:
        """Numbers of all directions, the one with the largest typical amount first."""
        return tuple(self.directions.rms.argsort(descending=True, stable=True).tolist())

    def numbers(self, claim: Claim) -> int:
        """How many numbers a claim takes to write down.

        A direction that reads is a write direction, a read direction and an offset; the constant one and
        every steering vector are one vector.
        """
        one = 2 * self.width + 1
        if claim.what == "directions":
            kept = self.largest[: claim.k]
            return sum(self.width if self.directions.labels[n] == CONSTANT else one for n in kept)
        if claim.what == "reading":
            return min(claim.k, len(self.reading)) * one + self.width
        if claim.what == "linearised":
            return self.write.shape[1] * one + self.width
        if claim.what == "mean per position" and self.means is not None:
            return self.means.numel()
        return self.width


def fit(pool: Pool, rows: Bool[Tensor, " vector"] | None = None) -> Fit:
    """Fit what the explanations say of an intervention.

    Args:
        pool: its vectors.
        rows: which of them; all unless given.
    """
    vectors, slots = pool.vectors, pool.slots
    if rows is not None:
        slots = None if slots is None else slots[rows]
        vectors = EditVectors(
            vectors.edit, vectors.base[rows], vectors.delta[rows], vectors.source, vectors.rows[rows],
            vectors.positions[rows],
        )  # fmt: skip
    directions = find_directions(pool.built, 1.0, vectors, pool.subspace)
    base, delta = vectors.base, vectors.delta
    mean = delta.mean(0)
    lengths = base.norm(dim=1)
    relative = float((delta @ _unit(mean) * lengths).sum() / lengths.square().sum().clamp(min=1e-30))
    affine = pool.built.affine() if isinstance(pool.built, Intervention) and pool.subspace is None else None
    if isinstance(affine, Affine):
        # The whole linear part, of which `directions` names at most 16.
        write, read = affine.write.detach().float().cpu(), affine.read.detach().float().cpu()
    else:
        write = directions.write.T * directions.gain
        read = directions.read
    length = float(delta.square().sum(1).mean().sqrt())
    means = None
    if slots is not None:
        means = torch.stack([delta[slots == slot].mean(0) for slot in range(int(slots.max()) + 1)])
    return Fit(directions, mean, base.mean(0), length, relative, write, read, means)


def claimed(claim: Claim, fitted: Fit) -> Change:
    """What to add in the place of an edit, by what an explanation says of it."""
    if claim.what == "constant":
        return _always(fitted.mean)
    if claim.what == "mean per position":
        assert fitted.means is not None
        return _by_slot(fitted.means)
    if claim.what == "steering":
        return _always(fitted.length * _unit(fitted.mean))
    if claim.what == "norm-matched steering":
        vector = fitted.relative * _unit(fitted.mean)
        return lambda written: written.base.norm(dim=1, keepdim=True) * vector.to(written.base)
    if claim.what == "linearised":
        return _linear(fitted)
    if claim.what == "directions":
        return only_along(fitted.directions.write[list(fitted.largest[: claim.k])])
    return _varying(fitted.mean, fitted.directions.write[list(fitted.reading[: claim.k])])


def control_of(control: Control, fitted: Fit, generator: torch.Generator) -> Change:
    """A random explanation of the same form as a claim."""
    if control.kind in ("constant", "length"):
        way = _unit(torch.randn(fitted.width, generator=generator))
        if control.kind == "constant":
            return _always(float(fitted.mean.norm()) * way)
        return lambda written: written.delta.norm(dim=1, keepdim=True) * way.to(written.delta)
    if control.kind == "per position":
        assert fitted.means is not None
        ways = torch.randn(fitted.means.shape, generator=generator)
        return _by_slot(fitted.means.norm(dim=1, keepdim=True) * ways / ways.norm(dim=1, keepdim=True))
    reading = control.kind == "reading"
    span = fitted.directions.write[list(fitted.reading if reading else fitted.largest)]
    count = min(control.k, len(span))
    mixed = torch.linalg.qr(torch.randn(len(span), count, generator=generator)).Q.T @ span
    return _varying(fitted.mean, mixed) if reading else only_along(mixed)


def control_for(claim: Claim, fits: Sequence[Fit]) -> Control:
    """The control that a claim about several edits is held against."""
    if claim.what == "constant":
        return Control("constant")
    if claim.what == "mean per position":
        return Control("per position")
    if claim.what == "directions" and any(claim.k < len(one.largest) for one in fits):
        return Control("directions", claim.k)
    if claim.what == "reading" and any(claim.k < len(one.reading) for one in fits):
        return Control("reading", claim.k)
    # All directions of the span leave no others in it to choose from.
    return Control("length")


def _always(vector: Tensor) -> Change:
    return lambda written: vector.to(written.delta).expand_as(written.delta)


def _by_slot(means: Tensor) -> Change:
    """The change of each of the edit's tokens, the same in every row."""

    def change(written: Written) -> Tensor:
        assert written.rows is not None
        assert written.positions is not None
        slots = _numbered(written.rows, written.positions).clamp(max=len(means) - 1)
        return means.to(written.delta)[slots.to(written.delta.device)]

    return change


def _linear(fitted: Fit) -> Change:
    def change(written: Written) -> Tensor:
        moved = written.base - fitted.centre.to(written.base)
        return fitted.mean.to(moved) + (moved @ fitted.read.to(moved).T) @ fitted.write.to(moved).T

    return change


def _varying(mean: Tensor, along: Tensor) -> Change:
    """The mean change, and what the change differs from it along some directions."""

    def change(written: Written) -> Tensor:
        rows, middle = along.to(written.delta), mean.to(written.delta)
        return middle + ((written.delta - middle) @ rows.T) @ rows

    return change


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=torch.finfo(torch.float32).tiny)

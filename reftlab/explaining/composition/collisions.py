"""Directions in which two edits collide: what both write along, and whether it adds up or cancels."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.explaining.geometry.directions import Directions, directions_of
from reftlab.explaining.geometry.tokens import token_effects

if TYPE_CHECKING:
    from reftlab.explaining.geometry.record import Recorded
    from reftlab.explaining.geometry.vectors import EditVectors
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["Collision", "find_collisions"]

_WRITTEN = 0.01
"""Share of what an edit writes that has to lie along a direction for it to count."""
_AGREES = 0.3


@dataclass(frozen=True, eq=False)
class Collision:
    """A direction of the residual stream, or of one site, that two edits both write along.

    Attributes:
        a, b: keys of the edits, the one that acts first first.
        place: the site, or both with an arrow between; what a writes at an earlier site goes on in the
            residual stream, as far as the blocks between leave it alone.
        direction: unit vector, `(width,)`, turned so that a's mean amount is positive.
        angle: between the two parts of it that lie in what each edit writes in, in degrees: 0 is shared.
        chance: the angle that random subspaces of these sizes come below in 5% of cases, in degrees;
            every `angle` here is below it.
        mean: mean amounts that a and b write along it, in the units of the site.
        typical: the same, root mean square.
        share: which share of the squared length of what each writes lies along it.
        agreement: mean product of the two amounts over the product of their typical sizes, −1 to 1.
        vectors: how many pairs of vectors this is of: those of the tokens that both act on, or else one
            an example, the mean over its tokens.
        promoted, suppressed: tokens that adding it promotes and suppresses most, by the model's own
            readout; empty where there is none.
    """

    a: str
    b: str
    place: str
    direction: Float[Tensor, " width"]
    angle: float
    chance: float
    mean: tuple[float, float]
    typical: tuple[float, float]
    share: tuple[float, float]
    agreement: float
    vectors: int
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`adds up`, `cancels`, or `mixed` where it depends on the input."""
        if abs(self.agreement) < _AGREES:
            return "mixed"
        return "adds up" if self.agreement > 0 else "cancels"

    @property
    def size(self) -> float:
        """Product of the typical amounts with their agreement's size, by which collisions are ordered."""
        return self.typical[0] * self.typical[1] * abs(self.agreement)

    def __repr__(self) -> str:
        return (
            f"Collision({self.a!r} {self.mean[0]:+.3g} and {self.b!r} {self.mean[1]:+.3g} at {self.place}: "
            f"{self.kind})"
        )


def find_collisions(
    reft: BoundModel,
    recorded: Recorded,
    pairs: Iterable[tuple[tuple[str, ...], tuple[str, ...]]],
    *,
    top: int = 4,
) -> tuple[Collision, ...]:
    """Find the directions in which edits collide.

    The subspaces are those of the directions along which each edit wrote 1% or more for these examples.
    Of their principal vectors those count whose angle is smaller than random subspaces have in 95% of
    cases. Where several do, the part they span is turned to where the products of the two amounts are
    largest: to the eigenvectors of their symmetrised cross moment. Edits at two sites are compared where
    both write to the residual stream.

    Args:
        reft: the bound model.
        recorded: what each edit was given and made.
        pairs: names of edits on the one side and on the other.
        top: how many promoted and suppressed tokens to name.

    Returns:
        The collisions, the largest first.

    Source: principal vectors, Björck and Golub, "Numerical methods for computing angles between linear
    subspaces" (1973).
    """
    bound = [edit for edit in reft.edits if edit.key in recorded.vectors]
    directions = directions_of(reft, recorded.vectors)
    found: list[Collision] = []
    for first, second in pairs:
        for number, x in enumerate(bound):
            for y in bound[number + 1 :]:
                names = (x.edit.name, y.edit.name)
                crosses = (names[0] in first and names[1] in second) or (
                    names[1] in first and names[0] in second
                )
                if crosses and _comparable(x, y, recorded):
                    found += _between(reft, recorded, x, y, directions, top)
    return tuple(sorted(found, key=lambda one: one.size, reverse=True))


def _comparable(x: BoundEdit, y: BoundEdit, recorded: Recorded) -> bool:
    if x.shares_place(y):
        return True
    lens = recorded.lens
    both = all((one.site.module, one.site.side) in lens.stream for one in (x, y))
    whole = x.width == y.width == lens.width and x.edit.run == y.edit.run
    return lens.missing is None and both and whole


def _between(
    reft: BoundModel,
    recorded: Recorded,
    x: BoundEdit,
    y: BoundEdit,
    directions: Mapping[str, Directions],
    top: int,
) -> list[Collision]:
    bases = [_written(directions[one.key]) for one in (x, y)]
    if not all(len(basis) for basis in bases):
        return []
    first, second = (basis.double() for basis in bases)
    limit = _chance(first.shape[1], *sorted((len(first), len(second))))
    left, cosines, right = torch.linalg.svd(first @ second.T, full_matrices=False)
    kept = cosines > limit
    if not bool(kept.any()):
        return []
    middle = (left.T @ first + right @ second)[kept]
    middle = middle / middle.norm(dim=1, keepdim=True)
    one, other = _paired(recorded.vectors[x.key], recorded.vectors[y.key])
    if not len(one):
        return []
    shared = _turned(middle, one, other)
    angles = [_angle(way, first, second) for way in shared]
    amounts = (one @ shared.T, other @ shared.T)
    shares = [
        part.square().sum(0) / whole.square().sum().clamp(min=1e-30)
        for part, whole in zip(amounts, (one, other), strict=True)
    ]
    named = _named(reft, recorded, y, shared, amounts[1], top)
    place = str(x.site) if x.shares_place(y) else f"{x.site} → {y.site}"
    chance = float(torch.rad2deg(torch.arccos(torch.tensor(limit))))
    found = []
    for number, way in enumerate(shared):
        if min(float(share[number]) for share in shares) < _WRITTEN:
            continue
        a, b = amounts[0][:, number], amounts[1][:, number]
        sizes = (float(a.square().mean().sqrt()), float(b.square().mean().sqrt()))
        found.append(
            Collision(
                x.key, y.key, place, way.float(), angles[number], chance, (float(a.mean()), float(b.mean())),
                sizes, (float(shares[0][number]), float(shares[1][number])),
                float((a * b).mean()) / max(sizes[0] * sizes[1], 1e-30), len(a), *named[number],
            )
        )  # fmt: skip
    return found


def _written(directions: Directions) -> Tensor:
    """The directions along which something is written, `(direction, width)`."""
    return directions.write[directions.share >= _WRITTEN]


def _paired(x: EditVectors, y: EditVectors) -> tuple[Tensor, Tensor]:
    """What two edits add to the same tokens, or else to the same examples on average, `(n, width)` each."""
    if torch.equal(x.rows, y.rows) and torch.equal(x.positions, y.positions):
        return x.delta.double(), y.delta.double()
    both = sorted(set(x.rows.tolist()) & set(y.rows.tolist()))
    if not both:
        nothing = x.delta.new_zeros(0, x.delta.shape[1]).double()
        return nothing, nothing
    means = [torch.stack([v.delta[v.rows == row].double().mean(0) for row in both]) for v in (x, y)]
    return means[0], means[1]


def _turned(middle: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The directions of a shared part along which the products of the amounts are largest, largest first."""
    cross = (one @ middle.T).T @ (other @ middle.T) / len(one)
    values, axes = torch.linalg.eigh((cross + cross.T) / 2)
    shared = axes.T[values.abs().argsort(descending=True)] @ middle
    return shared * torch.where((one @ shared.T).mean(0) < 0, -1.0, 1.0)[:, None]


def _angle(way: Tensor, first: Tensor, second: Tensor) -> float:
    """Angle in degrees between the parts of a direction that lie in two subspaces."""
    parts = [basis.T @ (basis @ way) for basis in (first, second)]
    sizes = parts[0].norm() * parts[1].norm()
    cosine = (parts[0] @ parts[1]) / sizes.clamp(min=1e-30)
    return float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))))


@functools.cache
def _chance(width: int, small: int, large: int, draws: int = 400) -> float:
    """The largest cosine that 95% of pairs of random subspaces of these sizes stay below."""
    if small + large > width:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    largest = []
    for _ in range(draws):
        drawn = torch.randn(width, small, generator=generator, dtype=torch.float64)
        # The other subspace may be the first axes, since this one points anywhere.
        basis = torch.linalg.qr(drawn).Q[:large]
        largest.append(torch.linalg.matrix_norm(basis, 2))
    return min(1.0, float(torch.stack(largest).quantile(0.95)))


def _named(
    reft: BoundModel, recorded: Recorded, y: BoundEdit, shared: Tensor, amounts: Tensor, top: int
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The tokens of each direction where the later edit writes to the residual stream."""
    nothing: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())] * len(shared)
    if (y.site.module, y.site.side) not in recorded.lens.stream:
        return nothing
    write = shared.float()
    labels = tuple(str(number) for number in range(1, len(write) + 1))
    ways = Directions(
        y.key, "written", labels, write, torch.zeros_like(write), write.new_zeros(len(write)),
        amounts.float(), 0.0, None,
    )  # fmt: skip
    effects = token_effects(recorded.lens, reft.tokenizer, ways, recorded.centres.get(y.key), top=top)
    if effects.missing is not None:
        return nothing
    return [
        (tuple(token.text for token in up), tuple(token.text for token in down))
        for up, down in zip(effects.promoted, effects.suppressed, strict=True)
    ]

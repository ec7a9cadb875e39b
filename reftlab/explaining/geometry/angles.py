"""Angles between subspaces, against those of random ones."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Null", "Spread", "SubspaceAngles", "compared", "principal_angles", "span", "subspace_angles"]

Null = Literal["isotropic", "data", "labels"]

NULLS: dict[Null, str] = {
    "isotropic": "every direction is as likely as any other",
    "data": "directions drawn from a Gaussian with the covariance of the vectors",
    "labels": "the same fit with shuffled labels, to the vectors less their classes' means",
}

_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class SubspaceAngles:
    """Principal angles of two subspaces, and those that chance gives.

    Attributes:
        angles: ascending, in degrees: 0 is a shared direction, 90 none; as many as the smaller one has
            dimensions.
        overlap: mean squared cosine, 0 to 1: the share of the smaller subspace that lies in the larger.
        dimensions: of both.
        width: of the space that they lie in.
        null: what stands for chance, see `NULLS`; the second subspace is the one put at random.
        draws: how many random subspaces.
        band: quantiles 2.5%, 50% and 97.5% of each of the angles at random, in degrees, `(angle, 3)`.
        chance: quantiles 2.5%, 50% and 97.5% of the overlap at random.
        p_overlap: how often chance overlaps as much or more, `(1 + count) / (1 + draws)`.
        p_angle: how often chance has a smallest angle as small or smaller, likewise.
    """

    angles: tuple[float, ...]
    overlap: float
    dimensions: tuple[int, int]
    width: int
    null: Null
    draws: int
    band: tuple[tuple[float, float, float], ...]
    chance: tuple[float, float, float]
    p_overlap: float
    p_angle: float

    @property
    def smallest(self) -> float:
        """The smallest angle, in degrees."""
        return self.angles[0]

    def to_frame(self) -> pd.DataFrame:
        """One line an angle: number, angle, and its 2.5%, 50% and 97.5% quantiles at random, in degrees."""
        import pandas as pd

        low, middle, high = zip(*self.band, strict=True)
        return pd.DataFrame(
            {
                "number": range(1, len(self.angles) + 1),
                "angle": self.angles,
                "random_low": low,
                "random_median": middle,
                "random_high": high,
            }
        )

    def plot(self) -> Figure:
        """The angles in order, over the band in which 95% of random subspaces have theirs."""
        from reftlab.plotting.angles import spectrum_figure

        return spectrum_figure(self.angles, self.band, NULLS[self.null])

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format)
        return f"<p>{html.escape(repr(self))}</p>{table}"

    def __repr__(self) -> str:
        return (
            f"SubspaceAngles({self.dimensions[0]} and {self.dimensions[1]} of {self.width}: smallest "
            f"{self.smallest:.3g}°, p {self.p_angle:.2g}; overlap {self.overlap:.2g}, "
            f"{self.chance[1]:.2g} at random, p {self.p_overlap:.2g}; null {self.null!r})"
        )


@dataclass(frozen=True, eq=False)
class Spread:
    """How vectors vary: their principal axes and the standard deviations along them.

    Attributes:
        axes: orthonormal, `(axis, width)`, by falling deviation.
        deviations: `(axis,)`, in the units of the vectors.
    """

    axes: Float[Tensor, "axis width"]
    deviations: Float[Tensor, " axis"]

    @classmethod
    def of_vectors(cls, vectors: Float[Tensor, "n width"]) -> Spread:
        centred = vectors.double() - vectors.double().mean(0)
        _, values, axes = torch.linalg.svd(centred, full_matrices=False)
        return cls._kept(axes, values / max(1, len(vectors) - 1) ** 0.5)

    @classmethod
    def of_covariance(cls, covariance: Float[Tensor, "width width"]) -> Spread:
        values, axes = torch.linalg.eigh(covariance.double())
        return cls._kept(axes.T.flip(0), values.flip(0).clamp(min=0).sqrt())

    @classmethod
    def _kept(cls, axes: Tensor, deviations: Tensor) -> Spread:
        kept = deviations > 1e-6 * deviations.max().clamp(min=1e-30)
        return cls(axes[kept], deviations[kept])


def principal_angles(a: Float[Tensor, "width r"], b: Float[Tensor, "width s"]) -> Float[Tensor, " k"]:
    """Principal angles between two subspaces, ascending, in degrees.

    Args:
        a, b: orthonormal bases, a direction a column.

    Source: Björck and Golub, "Numerical methods for computing angles between linear subspaces" (1973).

    >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).tolist()
    [0.0, 90.0]
    """
    small, large = sorted((a.double(), b.double()), key=lambda basis: basis.shape[1])
    inside = large.T @ small
    cosines = torch.linalg.svdvals(inside).clamp(-1, 1)
    # Small angles from their sines, which the cosine is too flat to tell.
    rest = small - large @ inside
    sines = torch.linalg.svdvals(rest).clamp(0, 1).flip(0)[: len(cosines)]
    angles = torch.where(cosines**2 > 0.5, torch.arcsin(sines), torch.arccos(cosines))
    return torch.rad2deg(angles).float()


def subspace_angles(
    a: Float[Tensor, "width r"],
    b: Float[Tensor, "width s"],
    *,
    null: Null = "isotropic",
    covariance: Float[Tensor, "width width"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> SubspaceAngles:
    """Compare two subspaces, and say how often random ones come as close.

    Chance keeps the first subspace and draws the second one anew. With `null="isotropic"` every
    subspace is as likely as any other. Vectors of a model vary much more along some directions than
    along others, so that any two directions taken from them are closer than that;
    `null="data"` draws directions from N(0, covariance), as sums of the vectors would be.

    Args:
        a, b: their directions, one a column, independent or not; they need not be orthonormal.
        null: `isotropic` or `data`.
        covariance: Σ of the vectors at the site, for `data`.
        draws: how many random subspaces; no p-value is below 1 / (1 + draws).
        seed: of the draws.

    Returns:
        A `SubspaceAngles`.

    Raises:
        DataError: directions, covariance or numbers that cannot be used.

    >>> eye = torch.eye(64)
    >>> subspace_angles(eye[:, :2], eye[:, 1:3], draws=200).angles
    (0.0, 90.0)
    """
    if null not in ("isotropic", "data"):
        raise DataError(f"null={null!r}: expected 'isotropic' or 'data'")
    if (null == "data") != (covariance is not None):
        raise DataError(
            "null='data' needs covariance=, that of the vectors at the site"
            if covariance is None
            else f"covariance= is for null='data', and null is {null!r}; leave one of them out"
        )
    draws = whole("draws", draws, 1)
    first, second = span(a, "a"), span(b, "b")
    if len(first) != len(second):
        raise DataError(f"a has vectors of {len(first)} numbers and b of {len(second)}; they need the same")
    spread = None
    if covariance is not None:
        if covariance.shape != (len(first), len(first)) or not bool(torch.isfinite(covariance).all()):
            raise DataError(
                f"covariance of shape {tuple(covariance.shape)}: expected finite numbers "
                f"{(len(first), len(first))}"
            )
        spread = Spread.of_covariance(covariance)
        if not len(spread.axes):
            raise DataError("covariance is 0 everywhere, so no direction can be drawn from it")
    return compared(first, second, null, cosines_at_random(first, second.shape[1], draws, seed, spread))


def span(vectors: Float[Tensor, "width r"], name: str = "vectors") -> Float[Tensor, "width rank"]:
    """An orthonormal basis, float64, of what the columns span.

    Raises:
        DataError: numbers that are not finite, or nothing but zeros.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise DataError(f"{name} of shape {tuple(vectors.shape)} holds NaN or infinity")
    lengths = vectors.double().norm(dim=0)
    used = vectors.double()[:, lengths > 0] / lengths[lengths > 0]
    if not used.numel():
        raise DataError(f"{name} of shape {tuple(vectors.shape)} holds no direction: all its numbers are 0")
    left, sizes, _ = torch.linalg.svd(used, full_matrices=False)
    return left[:, sizes > 1e-6 * sizes.max()]


def cosines_at_random(
    a: Float[Tensor, "width r"], size: int, draws: int, seed: int, spread: Spread | None = None
) -> Float[np.ndarray, "draw k"]:
    """Cosines of the principal angles between a subspace and random ones, largest first.

    Args:
        a: orthonormal basis.
        size: dimensions of the random subspaces.
        draws: how many.
        seed: of the draws.
        spread: of the vectors that their directions are drawn as; every direction alike without one.
    """
    # In coordinates in which each draw is independent numbers; of the axes only those that vary count.
    inside = a.double() if spread is None else spread.axes @ a.double()
    scales = inside.new_ones(len(inside)) if spread is None else spread.deviations
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(inside))
    some = max(1, _AT_ONCE // (len(inside) * size))
    found = []
    for start in range(0, draws, some):
        count = min(some, draws - start)
        noise = torch.randn(count, len(inside), size, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(noise * scales[:, None]).Q
        found.append(torch.linalg.svdvals(inside.T @ basis).clamp(0, 1))
    return torch.cat(found).numpy()


def cosines_of(a: Float[Tensor, "width r"], others: Sequence[Tensor]) -> Float[np.ndarray, "draw k"]:
    """Cosines of the principal angles between a subspace and each of others, largest first.

    Args:
        a: orthonormal basis, float64.
        others: orthonormal bases, a direction a column; 0 where one has fewer than the largest.
    """
    found = [torch.linalg.svdvals(a.T @ other).clamp(0, 1).numpy() for other in others]
    most = max(map(len, found))
    return np.stack([np.pad(one, (0, most - len(one))) for one in found])


def compared(
    a: Float[Tensor, "width r"],
    b: Float[Tensor, "width s"],
    null: Null,
    cosines: Float[np.ndarray, "draw k"],
) -> SubspaceAngles:
    """The angles of two subspaces beside those that chance gave.

    Args:
        a, b: orthonormal bases.
        null: what chance is.
        cosines: of the principal angles at random, largest first.
    """
    assert null in get_args(Null)
    angles = principal_angles(a, b).double().numpy()
    overlap = float((np.cos(np.radians(angles)) ** 2).mean())
    count = len(angles)
    # A random subspace with fewer directions than asked for shares nothing along the others.
    padded = np.zeros((len(cosines), count))
    padded[:, : cosines.shape[1]] = cosines[:, :count]
    random = np.degrees(np.arccos(padded))
    overlaps = (padded**2).mean(1)
    ends: Any = [0.025, 0.5, 0.975]
    # The same subspace drawn again must count as close, whatever the rounding.
    as_small = int((random[:, 0] <= angles[0] + 1e-4).sum())
    as_large = int((overlaps >= overlap - 1e-7).sum())
    return SubspaceAngles(
        tuple(angles.tolist()),
        overlap,
        (a.shape[1], b.shape[1]),
        len(a),
        null,
        len(cosines),
        tuple(tuple(row) for row in np.quantile(random, ends, axis=0).T.tolist()),
        tuple(np.quantile(overlaps, ends).tolist()),
        (1 + as_large) / (1 + len(cosines)),
        (1 + as_small) / (1 + len(cosines)),
    )
